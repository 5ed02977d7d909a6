"""What has to be the same on all hosts is told, and what is another thing has another text."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from astra_jax.hosts import agreement
from astra_jax.hosts.agreement import (
    MOST_INPUTS,
    contents,
    differences,
    fingerprint,
    inputs,
    options,
    settings,
    shown,
    versions,
)
from astra_jax.hosts.distributed import Hosts
from eval.service.service import Setup
from eval.verbs import bench, evaluate, run


def test_versions_are_of_what_computes_and_of_what_reads_inputs():
    assert {"jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "Pillow", "safetensors"} <= set(versions())
    assert "none" not in versions().values()


def test_the_hash_of_the_source_is_of_every_python_file(tmp_path, monkeypatch):
    """Also where the number of the version is the same."""
    monkeypatch.setattr(agreement, "__file__", str(tmp_path / "astra_jax" / "hosts" / "agreement.py"))

    def found() -> str:
        agreement.source.cache_clear()
        return agreement.source()

    (tmp_path / "eval" / "deep").mkdir(parents=True)
    (tmp_path / "eval" / "deep" / "a.py").write_text("x = 1")
    before = found()
    (tmp_path / "eval" / "notes.txt").write_text("no code")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.py").write_text("of somebody else")
    assert found() == before
    (tmp_path / "eval" / "deep" / "a.py").write_text("x = 2")
    changed = found()
    (tmp_path / "eval" / "deep" / "a.py").rename(tmp_path / "eval" / "deep" / "b.py")
    assert len({before, changed, found()}) == 3
    agreement.source.cache_clear()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("jax_enable_x64", True), ("jax_default_matmul_precision", "bfloat16"), ("jax_numpy_dtype_promotion", "strict")],
)
def test_settings_that_change_results_are_told(setting, value):
    before, was = settings(), jax.config.values[setting]
    jax.config.update(setting, value)
    try:
        after = settings()
    finally:
        jax.config.update(setting, was)
    assert {name for name in after if after[name] != before[name]} == {setting.upper()}


def test_settings_of_what_is_kept_and_said_are_each_hosts_own(monkeypatch):
    names = set(settings())
    for name in ("COMPILATION_CACHE_DIR", "LOG_COMPILES", "EXPLAIN_CACHE_MISSES", "NUM_CPU_DEVICES", "DUMP_IR_TO"):
        assert f"jax_{name}".lower() in jax.config.values and f"JAX_{name}" not in names
    before = settings()["XLA_FLAGS"]
    flags = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_dump_to=/tmp/x --xla_cpu_collective_timeout_seconds=9")
    assert settings()["XLA_FLAGS"] == before
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_enable_fast_math=true {flags}")
    assert "fast_math" in settings()["XLA_FLAGS"]


def test_options_of_a_host_and_what_host_0_writes_may_be_others():
    setup = Setup(Path("a"), several=Hosts("10.0.0.1:7777", 2, 1))
    assert options(setup) == options(Setup(Path("elsewhere")))
    first = run.Args(setup, (Path("x.png"),), ("text",), json=Path("a.json"))
    assert options(first) == options(run.Args(Setup(Path("b"))))
    measured = evaluate.Args(data="here", checkpoints=(Path("a"),), plot=Path("p.png"))
    assert options(measured) == options(evaluate.Args(data="there", checkpoints=()))
    assert options(bench.Args("vit", csv=Path("a.csv"))) == options(bench.Args("gpt2-s", save_profile=Path("a.json")))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"}, {"weights": "int8"}, {"strategy": "tp"}, {"groups": 8},
        {"devices": "2"},
    ],
    ids=str,
)  # fmt: skip
def test_every_other_option_is_told(change):
    setup = Setup(Path("a"))
    (name,), (value,) = change, change.values()
    part = {"loading": dataclasses.replace(setup.loading, **change)} if hasattr(setup.loading, name) else change
    before, after = options(setup), options(dataclasses.replace(setup, **part))
    option = f"--{name.replace('_', '-')}"
    assert {key for key in before if before[key] != after[key]} == {option}
    assert after[option] == str(value)


def test_values_that_differ_are_shown_differently():
    values = ["a", "a" * 61, "a" * 62, "b" * 61, "a\n", "a ", "a[b", "a(b", "\ud800", "é", 0, False, b"a", b"b", ("x",)]
    texts = list(map(shown, values))
    assert len(set(texts)) == len(texts)
    assert all(len(text) < 100 and "[" not in text and text.isprintable() for text in texts)
    assert shown("") == shown(()) == shown(None) == "not given"


def test_inputs_are_told_one_by_one_and_all_are():
    assert inputs("prompt", ["Once", ""]) == {"prompt 1": "'Once'", "prompt 2": "''"}
    many = [str(n).encode() for n in range(MOST_INPUTS + 5)]
    other = [*many[:-1], b"other"]
    assert len(inputs("picture", many)) == MOST_INPUTS + 1
    assert inputs("picture", many) != inputs("picture", other)


def test_arrays_that_differ_have_other_fingerprints():
    """Also where only shapes or types do."""
    pixels = np.arange(12, dtype=np.float32)
    others = [pixels[:-1], pixels.reshape(3, 4), pixels.reshape(4, 3), pixels.view(np.int32), [pixels, pixels], ()]
    assert len(set(map(fingerprint, [pixels, *others]))) == 1 + len(others)
    assert fingerprint(jax.numpy.asarray(pixels)) == fingerprint(pixels.reshape(2, 6)[:, ::1].reshape(12))


def test_files_that_systems_leave_behind_are_no_part_of_a_checkpoint(tmp_path):
    (tmp_path / "a").write_text("1")
    before = contents([tmp_path])
    (tmp_path / ".DS_Store").write_text("1")
    assert contents([tmp_path]) == before
    (tmp_path / os.fsdecode(b"\xff")).write_text("1")  # a name that is no UTF-8
    assert contents([tmp_path]) != before


def test_differences_are_named_and_counted():
    assert differences({"jax": "1"}, {"jax": "0"}) == "jax is 0 there and 1 here"
    assert differences({"jax": "1"}, {"jax": "1", "picture 2": "x"}) == "picture 2 is x there and not given here"
    assert differences({str(n): "1" for n in range(9)}, {}).endswith("; and 6 more")
    assert differences({"jax": "1"}, None) and not differences({"jax": "1"}, {"jax": "1"})
    assert differences({}, {"\x1b[2J": "\n" * 999}).isprintable()
