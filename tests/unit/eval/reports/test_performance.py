"""The report of `make bench`: its arithmetic by hand, what is run and kept, and that its page fits it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import checkpoints
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.models.vit import ViTConfig
from astra_jax.strategies.coded import Astra, AstraPlain
from eval.cost.encoding import one_block
from eval.network.lab import Ended
from eval.reports import lab, performance
from eval.reports.performance import (
    SECTIONS,
    Args,
    against_torch,
    config_of,
    eight,
    hosts,
    llama,
    main,
    measured_once,
    picture_and_checkpoint,
    remote_attention,
    remote_rows,
    share_row,
    slower,
    start_rows,
    start_seconds,
    torch_rows,
)
from tests.helpers import ROOT

DOCS = ROOT / "docs" / "performance.md"
SINGLE, G1, G1_PLAIN, SP, TP = ("single", "astra G=1", "astra-plain G=1", "sp", "tp")
SECONDS = {SINGLE: 6.0, G1: 1.5, G1_PLAIN: 2.0, SP: 24.0, TP: 96.0}
VIT = ViTConfig(hidden_size=64, num_attention_heads=4, intermediate_size=128, image_size=32, num_labels=2)
CODEC = VQConfig(groups=1, codewords=16)


def measured(strategy, slower):
    ms = 1e3 * SECONDS[strategy] * slower
    names = ("compute ms", "predicted ms", "measured ms", "least ms", "most ms")
    return {"strategy": strategy, **dict(zip(names, (ms, ms, ms, 0.9 * ms, 1.1 * ms), strict=True))} | {
        "measured / predicted": 1.0
    }


@pytest.fixture
def labs(monkeypatch):
    """Stands in for the lab: writes what `astra bench` would, and records what it was asked to run. Every lab is slower
    than the one before."""
    made = []

    class Lab:
        def __init__(self, hosts, rate, cpu):
            self.made = (hosts, rate, cpu)

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            pass

        def run(self, argv):
            options = dict(zip(argv[5::2], argv[6::2], strict=True))
            made.append((*self.made, argv[4], options))
            names = options["--strategies"].split(",")
            rows = [measured(name + " G=1" * name.startswith("astra"), len(made)) for name in names]
            Path(options["--json"]).write_text(json.dumps({"measured": rows}))
            return [Ended(0, 1.0, 0, 0)] * 4

    monkeypatch.setattr(lab, "Lab", Lab)
    return made


@pytest.fixture
def tiny(tmp_path, tiny_vit):
    """A checkpoint of the tiny ViT."""
    vit = tiny_vit()
    checkpoints.save(
        tmp_path / "vit", checkpoints.Checkpoint("vit", vit.config, None, None, None, {}, "float32", (), vit)
    )
    return tmp_path / "vit"


def test_ratios_are_of_one_run(tmp_path, labs):
    """The second run is twice as slow as the first, as a whole: no ratio changes."""
    args = Args(folder=tmp_path / "bench")
    rows = {row["strategy"]: row for row in hosts(args)}
    assert list(rows) == [SINGLE, G1, G1_PLAIN, "single, again", SP, TP]
    assert rows[G1] == {
        "strategy": G1,
        "measured s": 1.5,
        "least s": pytest.approx(1.35),
        "most s": pytest.approx(1.65),
        "times faster than one device": 4.0,
        "times faster than sp": 16.0,
        "times faster than tp": 64.0,
    }
    assert rows["single, again"]["measured s"] == 12.0 and rows[SP]["measured s"] == 48.0
    assert rows[SP]["times faster than one device"] == 0.25 and rows[SP]["times faster than tp"] is None
    assert len({tuple(row) for row in rows.values()}) == 1


def test_what_hosts_are_asked_to_run(tmp_path, labs):
    args = Args(folder=tmp_path / "bench", repeats=7)
    for section in (hosts, slower, eight, llama):
        section(args)
    ours, theirs, slow, many, prompt = labs
    assert [run[:4] for run in labs] == [
        (4, 10e6, 0.4, "vit-base"),
        (4, 10e6, 0.4, "vit-base"),
        (4, 10e6, 0.2, "vit-base"),
        (8, 10e6, 0.2, "vit-base"),
        (4, 10e6, 0.4, "llama-s"),
    ]
    assert all(run[4]["--strategies"].split(",")[0] == "single" and run[4]["--tokens"] == "1024" for run in labs)
    assert (
        ours[4]["--strategies"] == "single,astra,astra-plain"
        and ours[4]["--groups"] == "1,32"
        and ours[4]["--repeats"] == "7"
    )
    assert theirs[4]["--strategies"] == "single,sp,tp" and theirs[4]["--repeats"] == "1"
    assert slow[4]["--groups"] == many[4]["--groups"] == "1" and prompt[4]["--site"] == "kv"
    before = hosts(args)
    assert len(labs) == 5 and len(list(args.folder.iterdir())) == 5, "what was measured is kept"
    Path(theirs[4]["--json"]).unlink()
    assert hosts(args)[-1]["measured s"] > before[-1]["measured s"] and len(labs) == 6


def test_rows_are_kept(tmp_path):
    path, answers = tmp_path / "a" / "rows.json", [[{"x": 1.0}], [{"x": 2.0}]]
    assert measured_once(path, lambda: answers.pop(0)) == measured_once(path, lambda: answers.pop(0)) == [{"x": 1.0}]
    path.unlink()
    assert measured_once(path, lambda: answers.pop(0)) == [{"x": 2.0}]


def test_torch_and_start_rows_by_hand():
    ours, theirs = torch_rows({"astra-jax": [3.0, 1.0, 2.0], "transformers": [4.0, 5.0, 3.0]})
    assert ours == {
        "pass of": "astra-jax",
        "measured s": 2.0,
        "least s": 1.0,
        "most s": 3.0,
        "over transformers": 0.5,
    }
    assert theirs["over transformers"] == 1.0
    first, second = start_rows([(8.0, 3.0), (6.0, 4.0), (7.0, 5.0)])
    assert first == {"start": "first", "measured s": 7.0, "least s": 6.0, "most s": 8.0}
    assert second == {"start": "second", "measured s": 4.0, "least s": 3.0, "most s": 5.0}


@pytest.mark.slow
def test_a_share_of_a_block_and_its_attention_to_remote_tokens():
    row = share_row(VIT, 96, 4, CODEC, repeats=1)
    assert row["times faster than one device"] == pytest.approx(row["one device ms"] / row["fast path ms"])
    assert row["plain"] == pytest.approx(row["one device ms"] / row["plain ms"])
    rows = remote_rows(VIT, 24, (2, 4), CODEC, repeats=1)
    assert [row["remote tokens"] for row in rows] == [24, 72]
    fast, plain = (remote_attention(one_block(VIT, 96, 4, CODEC, way))() for way in (Astra, AstraPlain))
    assert fast.numerator.shape == (1, 4, 25, 16)
    # Unnormalised sums belong to a maximum: of the same tokens, whatever they are called.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), fast, plain)


def test_only_a_vit(tmp_path, tiny):
    assert config_of(Args(model=str(tiny), tokens=25)).num_patches == 25
    with pytest.raises(AstraError, match="--model gpt2-s: is no ViT: try vit-base"):
        config_of(Args(model="gpt2-s"))


def test_without_torch_the_table_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(performance.importlib.util, "find_spec", lambda name: None)
    assert against_torch(Args(folder=tmp_path)) == [{"not measured": "torch is missing: make .venv/installed-test"}]
    assert not list(tmp_path.iterdir()), "it is measured once torch is there"


def test_the_page_is_written(tmp_path, monkeypatch, labs):
    rows = {
        "hosts": hosts,
        "eight": eight,
        "llama": llama,
        "remote": lambda args: [
            {"local tokens": 24, "remote tokens": R, "fast path ms": 1.0, "plain ms": R / 10} for R in (24, 72)
        ],
    }
    monkeypatch.setattr(performance, "SECTIONS", {name: (name, measure) for name, measure in rows.items()})
    page = tmp_path / "page.md"
    page.write_text(DOCS.read_text())
    main(Args(folder=tmp_path / "bench", markdown=page))
    text = page.read_text()
    assert "| astra G=1 | 1.5 | 1.35 | 1.65 | 4 | 16 | 64 |" in text and "| 24 | 72 | 1 | 7.2 |" in text
    for plot in ("page.png", "page-long.png"):
        assert (tmp_path / plot).stat().st_size > 10_000


def test_the_page_has_room_for_every_table():
    text = DOCS.read_text()
    assert re.findall("<!-- (.*) of `make bench` -->", text) == [
        words for name in SECTIONS for words in (name, f"end of {name}")
    ]


@pytest.mark.slow
def test_the_second_start_finds_what_the_first_compiled(tmp_path, monkeypatch):
    words, run, found = picture_and_checkpoint(VIT, tmp_path), subprocess.run, []

    def run_and_look(argv, env, **options):
        done = run(argv, env=env, **options)
        found.append(sorted(path.name for path in Path(env["XDG_CACHE_HOME"]).rglob("*-cache")))
        return done

    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    monkeypatch.setattr(performance.subprocess, "run", run_and_look)
    assert min(start_seconds(words)) > 0
    assert found[0] and found[0] == found[1]
    with pytest.raises(AstraError, match="`astra run` ended with exit code 2: .*there is no such checkpoint"):
        start_seconds([str(tmp_path / "nothing"), *words[1:]])


@pytest.mark.slow
def test_transformers_is_timed_beside_us(tmp_path, tiny):
    ours, theirs = against_torch(Args(model=str(tiny), tokens=25, repeats=3, folder=tmp_path))
    assert (ours["pass of"], theirs["pass of"]) == ("astra-jax", "transformers")
    assert 0 < ours["least s"] <= ours["measured s"] and theirs["over transformers"] == 1


@pytest.mark.slow
def test_the_program_beside_transformers_runs_from_anywhere():
    done = subprocess.run(
        [sys.executable, performance.SIDE_BY_SIDE, "--help"], cwd="/", capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0 and "--tokens" in done.stdout
