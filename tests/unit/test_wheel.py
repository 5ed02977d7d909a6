"""What users install: a wheel has everything that the verbs need, wherever they are called from."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from astra_jax.cli.main import main

ROOT = Path(__file__).parents[2]
ROOMS = ("astra_jax", "checkpoints", "eval", "train")

pytestmark = pytest.mark.slow


def run(*command: str | Path, **options) -> str:
    """What a command prints, once it has gone well."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what a wheel has, and nothing else. It is built without a network, from a copy: setuptools leaves
    a `build` folder beside the sources, whose files go into the next wheel."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    run("pip", "wheel", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-w", wheels, source)
    (wheel,) = wheels.iterdir()
    run("pip", "install", "-q", "--no-index", "--no-deps", "--target", target, wheel)
    return target


def files(folder: Path) -> set[Path]:
    found = (path for room in ROOMS for path in (folder / room).rglob("*") if path.is_file())
    return {path.relative_to(folder) for path in found if path.suffix != ".pyc"}


def test_a_wheel_has_the_files_of_all_rooms_and_no_other_package(installed):
    assert files(installed) == files(ROOT)
    others = {path.name for path in installed.iterdir()} - {*ROOMS, "bin"}
    assert len(others) == 1 and others.pop().endswith(".dist-info")
    assert (installed / "bin" / "astra").is_file()


def test_an_installed_wheel_converts_calibrates_and_runs_a_model_from_another_folder(installed, gpt2s, tmp_path):
    folder = gpt2s(saved=None)
    assert main(["export", str(folder / "saved"), str(folder / "huggingface")]) == 0

    def astra(*arguments: str) -> str:
        command = ("astra_jax.cli.main", *arguments)
        return run(*command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)})

    assert "calibrate" in astra("--help")
    assert "wrote gpt2" in astra("convert", "huggingface", "gpt2")
    astra("calibrate", "gpt2", "coded", "--data", "text.txt", "--groups", "2", "--codewords", "4")
    said = astra("run", "coded", "--prompt", "w1 w2 w3 w4", "--max-new-tokens", "2", "--devices", "2")
    assert said.startswith("w1 w2 w3 w4 ") and "each device sent" in said
