"""The house rules of DESIGN section 5, read from the syntax tree of every file."""

import ast
import os
import pkgutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT

ROOMS = {
    "astra_jax": set(),
    "checkpoints": {"astra_jax"},
    "eval": {"astra_jax", "checkpoints"},
    "train": {"astra_jax", "checkpoints", "eval"},
}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
COLLECTIVES = {
    "all_gather", "all_to_all", "axis_index", "axis_size", "pbroadcast", "pmax", "pmean", "pmin", "ppermute",
    "pshuffle", "psum", "psum_scatter", "pswapaxes", "ragged_all_to_all",
}  # fmt: skip
# What runs code of a repository, or asks whether it may, unless `trust_remote_code` says no.
ASK = {"from_pretrained", "from_config", "load_dataset", "pipeline"}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imports(tree):
    """Names of the modules that are imported anywhere in a file, and the names taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@each_file
def test_arrows_between_rooms_go_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    imported = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
    assert imported & set(ROOMS) <= ROOMS[room] | {room}
    assert not imported & {"tests", "torch"}


@each_file
def test_collectives_live_in_one_file(path):
    tree = ast.parse(path.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & COLLECTIVES
    used |= {name for name in imports(tree) if name.startswith("jax.lax.")}
    assert not used or path.name == "collectives.py", f"{used} belong into astra_jax/mesh/collectives.py"


@each_file
def test_nothing_runs_code_from_a_file(path):
    """No pickle, and no code from the hub: where a library could run it, or ask on the terminal, it is told not to."""
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name in imports(tree)} & {"pickle", "cloudpickle", "dill", "joblib", "marshal"}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        decided = [ast.unparse(word.value) for word in call.keywords if word.arg == "trust_remote_code"]
        assert decided == ["False"] * (name in ASK or bool(decided)), ast.unparse(call)
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "allow_pickle" and n.value.value]


def test_importing_everything_starts_nothing():
    """No device query and no change of the environment at import time; torch stays outside."""
    modules = [
        module.name
        for room in ROOMS
        for module in pkgutil.walk_packages([str(ROOT / room)], f"{room}.")
        if not module.name.endswith("__main__")
    ]
    program = (
        "import importlib, os, sys\n"
        "before = dict(os.environ)\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'an import asked for devices'\n"
        "changed = set(os.environ.items()) ^ set(before.items())\n"
        "assert not changed, changed\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
