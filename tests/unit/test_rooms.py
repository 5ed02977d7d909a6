"""The house rules, read from the syntax tree of every file."""

import ast
import functools
import graphlib
import os
import pkgutil
import re
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
# What is inside the two rooms that have rooms: who imports whom there. Only the command line reaches all, lazily.
BASE = {"errors", "terminal", "files", "report"}
PARTS = {*BASE, "codecs", "mesh", "inputs"}
INSIDE = {
    "astra_jax": {
        "errors": set(),
        "terminal": {"errors"},
        "files": {"errors"},
        "report": {"errors", "terminal", "files"},
        "codecs": BASE,
        "mesh": BASE,
        "inputs": BASE,
        "models": PARTS,
        "strategies": {*PARTS, "models"},
        "serving": {*PARTS, "models", "strategies"},
        "hosts": {*BASE, "mesh"},
        "cli": {*PARTS, "models", "strategies", "serving", "hosts"},
    },
    "eval": {
        "datasets": set(),
        "network": set(),
        "quality": {"datasets", "network"},
        "cost": {"datasets", "network", "quality"},
        "plots": {"network"},
        "service": {"network", "quality", "cost"},
        "reports": {"datasets", "network", "quality", "cost", "plots"},
        "verbs": {"datasets", "network", "quality", "cost", "plots", "service"},
    },
}
MOST_ROOMS = {"astra_jax": 12, "eval": 8}
MOST_LINES = 500
# Optional features, and the names in code that speak of one: so many files may have them.
MOST_FILES = 5
FEATURES = {
    "packet loss": r"PacketLoss|network\.packet_loss",
    "predictors": r"[pP]redictor|^predicts?$",
    "blocks that are known, coded or predicted": r"^schedules?$|^Schedule$",
    "token ids as side information": r"TokenIds|token_ids",
    "weights of few bits": r"quantize_weights|weight_quantization|qwix",
    "low-rank adaptation": r"[Ll]o[Rr][Aa]|Adapter|adapter",
    "devices of several speeds": r"speeds$",
    "tables of keys and values": r"key_value_tables|fast_path|folding",
    "traces of a link": r"network\.traces|Trace$|read_trace",
    "class tokens for every device": r"class_token",
    "noise of training": r"^[nN]oise",
    "relative positions": r"^relative$|relative_positions|RelativePositions|^Bias$",
    "codes that go only where they are seen": r"^[hH]ops?$",
    "hosts with programs of their own": r"^OnHosts$",
    "codes for which a link has no room": r"^adapts$|^Room$|^in_time$",
    "copies of a checkpoint": r"^[oO]ffer$|^fetch$",
}
# Tests of what is no file or room of its own.
OTHER_TESTS = {"test_rooms.py", "test_wheel.py"} | {
    f"astra_jax/strategies/{name}" for name in ("test_loss_prediction.py", "test_virtual.py")
}

FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
COLLECTIVES = {
    "all_gather", "all_to_all", "axis_index", "axis_size", "pbroadcast", "pmax", "pmean", "pmin", "ppermute",
    "pshuffle", "psum", "psum_scatter", "pswapaxes", "ragged_all_to_all",
}  # fmt: skip
# What runs code of a repository, or asks whether it may, unless `trust_remote_code` says no.
ASK = {"from_pretrained", "from_config", "load_dataset", "pipeline"}


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(tree):
    """Names of the modules that are imported anywhere in a file, and the names taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def entries(room):
    """What a room holds: other rooms, and files, but for what Python makes."""
    return {p.stem for p in (ROOT / room).iterdir() if p.is_dir() or p.suffix == ".py"} - {"__init__", "__pycache__"}


@functools.cache
def names_in(path):
    """Every name that the code of a file has, of what is imported the whole path."""
    kinds = (getattr(node, kind, None) for node in ast.walk(tree_of(path)) for kind in ("id", "attr", "arg", "name"))
    return {name for name in kinds if isinstance(name, str)} | set(imports(tree_of(path)))


def test_arrows_between_rooms_go_one_way():
    for path in FILES:
        room = path.relative_to(ROOT).parts[0]
        imported = {name.split(".")[0] for name in imports(tree_of(path))}
        wrong = imported & set(ROOMS) - ROOMS[room] - {room}
        assert not wrong, f"{name_of(path)} must not import {wrong}: move what is shared to a room below both"
        assert not imported & {"tests", "torch"}, f"{name_of(path)}: tests and torch are for tests alone"


@pytest.mark.parametrize("room", INSIDE)
def test_arrows_inside_a_room_go_one_way(room):
    assert entries(room) == set(INSIDE[room]), f"say in INSIDE what each room of {room} may import"
    graphlib.TopologicalSorter(INSIDE[room]).prepare()  # raises CycleError
    for path in (path for path in FILES if path.is_relative_to(ROOT / room)):
        part = path.relative_to(ROOT / room).parts[0].removesuffix(".py")
        used = {name.split(".")[1] for name in imports(tree_of(path)) if name.startswith(f"{room}.")} & entries(room)
        wrong = used - INSIDE[room].get(part, used) - {part}  # __init__.py shows what all have
        assert not wrong, f"{name_of(path)} must not import {wrong} of {room}, which are beside it or above"


def test_no_module_needs_one_that_needs_it():
    modules = {name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        first = [node for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name for full in imports(ast.Module(first, [])) for name in (full, full.rpartition(".")[0])}
        graph[module] = names & set(modules) - {module}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_verbs_are_no_libraries_of_verbs():
    for path in (ROOT / "eval" / "verbs").glob("*.py"):
        wrong = [name for name in imports(tree_of(path)) if name.startswith("eval.verbs.")]
        assert not wrong, f"{path.name} imports {wrong}: what verbs share is a library"


@pytest.mark.parametrize("room", MOST_ROOMS)
def test_rooms_are_few(room):
    found = entries(room)
    assert len(found) <= MOST_ROOMS[room], f"{room} has {len(found)} entries: put the new one into one that is there"


def test_files_are_short():
    for path in [*FILES, *TESTS]:
        name, lines = name_of(path), len(path.read_text().splitlines())
        assert lines <= MOST_LINES, f"{name} has {lines} lines, {MOST_LINES} are the most: split it by what it does"


@pytest.mark.parametrize("feature", FEATURES)
def test_an_optional_feature_lives_in_few_files(feature):
    """Counted are names in code; what a text or a docstring says of it is free."""
    found = [name_of(path) for path in FILES if any(re.search(FEATURES[feature], name) for name in names_in(path))]
    assert len(found) <= MOST_FILES, f"{feature}: {found}, so few may know of it: ask an object that does"


def test_unit_tests_mirror_the_rooms():
    """`test_X.py` and `test_X_more.py` lie where X lies, a file or a room, or in the folder of the room X."""
    unit = ROOT / "tests" / "unit"
    for path in unit.rglob("test_*.py"):
        name, words = path.relative_to(unit), path.stem.removeprefix("test_").split("_")
        heads = {"_".join(words[:n]) for n in range(1, len(words) + 1)}
        fits = (ROOT / name.parent).is_dir() and heads & {*entries(name.parent), name.parent.name}
        assert fits or str(name) in OTHER_TESTS, f"{name}: name it after what it tests, and put it where that is"


def test_no_test_imports_another():
    for path in TESTS:
        names = [name for name in imports(tree_of(path)) if name.startswith("tests.")]
        wrong = [name for name in names if re.search(r"\.(test_\w+|conftest)\b", name)]
        assert not wrong, f"{name_of(path)} imports {wrong}: what tests share belongs into tests/helpers"


def test_collectives_live_in_one_file():
    for path in FILES:
        used = {node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)} & COLLECTIVES
        used |= {name for name in imports(tree_of(path)) if name.startswith("jax.lax.")}
        fits = not used or path.name == "collectives.py"
        assert fits, f"{name_of(path)}: {used} belong into astra_jax/mesh/collectives.py"


def test_nothing_runs_code_from_a_file():
    """No pickle, and no code from the hub: where a library could run it, or ask on the terminal, it is told not to."""
    for path in FILES:
        tree = tree_of(path)
        roots = {name.split(".")[0] for name in imports(tree)}
        assert not roots & {"pickle", "cloudpickle", "dill", "joblib", "marshal"}, name_of(path)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", None))
            decided = [ast.unparse(word.value) for word in call.keywords if word.arg == "trust_remote_code"]
            assert decided == ["False"] * (name in ASK or bool(decided)), f"{name_of(path)}: {ast.unparse(call)}"
        words = [node for node in ast.walk(tree) if isinstance(node, ast.keyword)]
        assert not [w for w in words if w.arg == "allow_pickle" and w.value.value], name_of(path)


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
