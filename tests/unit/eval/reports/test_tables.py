"""Tables of the pages in docs."""

import re
import subprocess

import pytest

from astra_jax import __version__
from astra_jax.errors import AstraError
from eval.reports import tables
from eval.reports.tables import commit, insert


def test_a_table_goes_between_its_marks_alone(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- x of `make paper` -->\nold\n<!-- end of x of `make paper` -->\nafter\n")
    insert(path, "x", "new", "make paper")
    found = re.fullmatch(r"(.*)<sub>(.*)</sub>\n(.*)", path.read_text(), re.S)
    assert found[1] == "before\n<!-- x of `make paper` -->\nnew\n\n"
    assert found[3] == "<!-- end of x of `make paper` -->\nafter\n"
    assert re.match(r"(commit|version) \S+.*; .*, \d+ cores; Python 3\.\d+\.\d+, jax 0\.\d+", found[2])
    with pytest.raises(AstraError, match="has no lines <!-- y of `make paper` -->"):
        insert(path, "y", "new", "make paper")
    with pytest.raises(AstraError, match="page.md/none: cannot be read"):
        insert(path / "none", "x", "new", "make paper")


def test_the_commit_of_changed_code_is_said_with_its_changes(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert commit() == f"version {__version__}"
    (tmp_path / "a.py").write_text("1\n")
    git("init", "-q")
    git("add", "a.py")
    git("commit", "-qm", "one")
    assert re.fullmatch("commit [0-9a-f]{7,}", commit())
    (tmp_path / "page.md").write_text("no code\n")
    assert " and changes" not in commit()
    (tmp_path / "a.py").write_text("2\n")
    assert commit().endswith(" and changes")
