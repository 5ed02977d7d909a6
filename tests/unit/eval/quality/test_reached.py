"""What is read of a file of `astra eval --json`, and what of it belongs to the codes that are planned with."""

import math

import pytest

from astra_jax.codecs.config import VQConfig, config_of
from astra_jax.errors import AstraError
from eval.quality.reached import Quality, read_quality
from tests.helpers.evaluated import ORIGINAL, coded, evaluated, nested

ROWS = [
    ORIGINAL,
    coded(4, 1, 89.0),
    coded(4, 16, 91.5),
    coded(4, 16, 91.0),
    coded(4, 32, math.nan),
    {"N": 4, "G": None, "astra": None, "accuracy %": 92.5},  # sp
]
NESTED = [ORIGINAL, nested(4, 1, 91.0), nested(4, 4, 92.4)]


def test_what_eval_wrote(tmp_path):
    quality = read_quality(evaluated(tmp_path / "eval.json", ROWS), None)
    assert quality == Quality("accuracy %", 92.5, {(4, 1): 89.0, (4, 16): 91.5}, VQConfig(32))
    assert quality.within(1.0) == {(4, 16)} and quality.within(0.9) == set()
    assert quality.of(None, 2) == 92.5 and quality.of(1, 4) == 89.0 and quality.of(1, 2) is None


def test_what_is_reached_is_that_of_the_codes_that_are_planned(tmp_path):
    both = evaluated(tmp_path / "both.json", [*ROWS, *NESTED[1:]])
    found = read_quality(both, VQConfig())
    assert found.reached == {(4, 1): 89.0, (4, 16): 91.5} and found.others == 2
    codes = config_of(NESTED[2]["astra"], "")
    found = read_quality(both, codes.with_groups(2))
    assert found.reached == {(4, 1): 91.0, (4, 4): 92.4} and found.others == 4 and found.codes == codes
    assert read_quality(evaluated(tmp_path / "nested.json", NESTED), None).codes == codes


@pytest.mark.parametrize(
    "rows, planned, message",
    [
        (
            [*ROWS, *NESTED[1:]],
            None,
            "is of codes made as vq, K=1024, site hidden; nested-pq.mlp.* one kind can be",
        ),
        (NESTED, VQConfig(), "is of codes made as nested-pq.mlp, .* and codes are planned as vq, K=1024, site hid"),
        (ROWS, VQConfig(site="kv"), "made as vq, K=1024, site hidden, and codes are planned as vq, K=1024, site kv"),
        (ROWS, VQConfig(class_token="single"), "planned as vq, K=1024, site hidden, a single class token: plan for"),
        ([ORIGINAL, {"N": 4, "G": 1, "accuracy %": 3}], None, "does not say how its codes are made: run astra eval"),
        ([ORIGINAL, coded(4, 1, 3.0) | {"astra": {"codec": "vq", "colour": 1}}], None, "unknown ..colour"),
    ],
)
def test_what_other_codes_reach_is_not_taken_for_these(tmp_path, rows, planned, message):
    with pytest.raises(AstraError, match=message):
        read_quality(evaluated(tmp_path / "eval.json", rows), planned)


def test_drops_of_other_metrics():
    assert Quality("perplexity", 14.8, {}).drop(16.84) == pytest.approx(100 * (16.84 / 14.8 - 1))
    assert Quality("perplexity", 14.8, {}).drop(14.0) < 0
    assert Quality("Spearman", 0.85, {}).drop(0.84) == pytest.approx(1)
    best = Quality("perplexity", 10.0, {(4, 1): 11.0, (4, 16): 10.1})
    assert best.within(5.0) == {(4, 16)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"verb": "bench", "rows": []}', "is not what `astra eval --json` wrote"),
        ('{"verb": "eval"}', "is not what `astra eval --json` wrote"),
        ('{"verb": "eval", "rows": [1]}', "is not what `astra eval --json` wrote"),
        ('{"verb": "eval", "rows": []}', "no row says what the original reaches"),
        (
            '{"verb": "eval", "rows": [{"N": 1, "G": null}]}',
            "row 1 has no column 'perplexity or accuracy % or Spearman or k-NN accuracy %'",
        ),
        ('{"verb": "eval", "rows": [{"N": 1, "accuracy %": 3}]}', "row 1 has no column 'G'"),
        ('{"verb": "eval", "rows": [{"N": 4, "G": 1, "accuracy %": 3}]}', "no row says what the original reaches"),
        ('{"verb": "eval", "rows": [{"N": 1, "G": null, "perplexity": NaN}]}', "no row says what the original reaches"),
        ('{"verb": "eval", "rows": [{"N": 1, "G": null, "perplexity": 0}]}', "perplexity is 0; it is from 1 to"),
        (
            '{"verb": "eval", "rows": [{"N": 1, "G": null, "accuracy %": 101}]}',
            "accuracy % is 101; it is from 0 to 100",
        ),
        ('{"verb": "eval", "rows": [{"N": 1, "G": null, "Spearman": -2.0}]}', "row 1: Spearman is -2.0; it is from -1"),
        ('{"verb": "eval", "rows": [{"N": 0, "G": null, "Spearman": 0.5}]}', "row 1: N is 0; it is from 1"),
        ('{"verb": "eval", "rows": [{"N": 4, "G": 0, "Spearman": 0.5}]}', "row 1: G is 0; it is from 1"),
        ('{"verb": "eval", "rows": [{"N": "1", "G": null, "perplexity": 9}]}', "row 1: N is '1'; it must be a number"),
        ('{"verb": "eval", "rows": [{"N": 1, "G": null, "perplexity": true}]}', "row 1: perplexity is True; it must"),
    ],
)
def test_what_eval_did_not_write_is_one_line(tmp_path, content, message):
    path = tmp_path / "eval.json"
    path.write_text(content)
    with pytest.raises(AstraError, match=message) as error:
        read_quality(path, None)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
