"""A host that has no checkpoint gets that of host 0: all of it, once, and nothing else."""

import contextlib
import json
import queue
from pathlib import Path

import numpy as np
import pytest

import checkpoints
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.hosts.company import Company
from astra_jax.hosts.control import connect
from astra_jax.hosts.invitation import new_secret
from checkpoints.tensor_maps import flat_state
from eval.service import copying
from eval.service.copying import Offer, fetch


@pytest.fixture
def original(tiny_llama, word_tokenizer, tmp_path):
    model = tiny_llama(VQConfig(groups=4, codewords=16))
    files = word_tokenizer(model.config.vocab_size - 4)
    meta = checkpoints.Checkpoint(
        "llama", model.config, model.astra, None, None, {}, "float32", (), model, tokenizer_files=files
    )
    checkpoints.save(tmp_path / "llama", meta)
    (tmp_path / "llama" / "train.jsonl").write_text("no part of it")
    return tmp_path / "llama"


@pytest.fixture
def company(original):
    with contextlib.closing(Company("127.0.0.1", 0, new_secret(), {}, {}, offer=Offer(original))) as found:
        yield found


def test_a_copy_is_the_checkpoint(company, original, tmp_path):
    said = []
    copy = fetch(company.invitation, said.append, tmp_path / "cache")
    assert copy == tmp_path / "cache" / checkpoints.read_meta(original).digest
    assert len(said) == 1 and str(copy) in said[0] and not (copy / "train.jsonl").exists()
    before, after = (flat_state(checkpoints.load(path).model) for path in (original, copy))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert fetch(company.invitation, said.append, tmp_path / "cache") == copy and len(said) == 1, "once is enough"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [copy.name]


def test_a_copy_that_was_cut_off_goes_on(company, original, tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "PIECE", 1000)
    part = tmp_path / f".{checkpoints.read_meta(original).digest}.part"
    names = sorted(checkpoints.files(original))
    for number, name in enumerate(names):  # whole, in part, nothing, and more than there is
        content = (original / name).read_bytes()
        if number % 4 != 2:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes((content, content[:7], b"", content + b"x")[number % 4])
    asked, piece = [], company._offer.piece
    company._offer.piece = lambda message: asked.append(message["name"]) or piece(message)
    copy = fetch(company.invitation, lambda line: None, tmp_path)
    assert set(asked) == {name for n, name in enumerate(names) if n % 4 and (original / name).stat().st_size}
    assert all((copy / name).read_bytes() == (original / name).read_bytes() for name in names)


def test_a_copy_that_is_another_one_is_thrown_away(company, tmp_path):
    company._offer._digest = "0" * 64
    with pytest.raises(AstraError, match="what came is not the checkpoint of host 0"):
        fetch(company.invitation, lambda line: None, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "listing",
    [
        {"files": {"astra.json": 1}},
        {"digest": "0" * 64, "files": {"weights-0001/x": 1}},
        {"digest": "../../x", "files": {"astra.json": 1}},
        {"digest": "0" * 64, "files": {"astra.json": -1}},
        {"digest": "0" * 64, "files": {"astra.json": 1, "/etc/passwd": 1}},
        {"digest": "0" * 64, "files": {"astra.json": 1, "weights-0001/../../x": 1}},
        {"digest": "0" * 64, "files": {"astra.json": 1, "weights-0001/..": 1}},
        {"digest": "0" * 64, "files": {"astra.json": 1, "evil": 1}},
        ["astra.json"],
        None,
    ],
    ids=range(10),
)
def test_names_and_sizes_are_not_trusted(company, tmp_path, listing):
    company._offer.listing = lambda: json.dumps(listing).encode()
    with pytest.raises(AstraError, match="what host 0 offers is no checkpoint"):
        fetch(company.invitation, lambda line: None, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("asked", [{"name": "train.jsonl", "offset": 0}, {"name": "astra.json", "offset": "x"}, {}])
def test_nothing_else_is_given(company, asked):
    messages = queue.Queue()
    connection = connect(company.invitation, {"role": "copy"}, messages.put)
    assert messages.get(timeout=10)["kind"] == "files"
    connection.send(kind="piece", **asked)
    assert messages.get(timeout=10) == {}, "the connection has ended"


def test_who_offers_nothing_lets_go(tmp_path):
    with (
        contextlib.closing(Company("127.0.0.1", 0, new_secret(), {}, {})) as company,
        pytest.raises(AstraError, match="host 0 ended"),
    ):
        fetch(company.invitation, lambda line: None, Path(tmp_path))
