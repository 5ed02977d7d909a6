"""Reports say the same to people and to machines."""

import json
from pathlib import Path

import pytest

from astra_jax.errors import AstraError
from astra_jax.report import Report, progress


def test_a_report_is_printed_and_written(tmp_path, capsys):
    report = Report("work", tmp_path / "report.json")
    report.say("half a [bold] line", half=0.5)
    report.table("rows", "All [test] rows", [{"name": "a[b]", "share": 0.123456, "[red]": 12_345, "rest": None}])
    report.close()
    out = capsys.readouterr().out
    assert all(
        text in out for text in ("half a [bold] line", "All [test] rows", "a[b]", "[red]", "0.1235", "12,345", "-")
    )
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "verb": "work",
        "half": 0.5,
        "rows": [{"name": "a[b]", "share": 0.123456, "[red]": 12_345, "rest": None}],
    }


def test_nothing_is_written_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = Report("work")
    report.table("rows", "No rows", [])
    report.close()
    assert report.data == {"verb": "work", "rows": []}
    assert not list(tmp_path.iterdir())


def test_a_report_into_no_folder_is_refused_at_the_start(tmp_path):
    with pytest.raises(AstraError, match="the folder .* does not exist: create it first"):
        Report("work", tmp_path / "none" / "report.json")


def test_a_report_to_stdout_is_alone_there(capsys):
    report = Report("work", Path("-"))
    report.say("half a line", half=0.5)
    report.close()
    out, err = capsys.readouterr()
    assert json.loads(out) == {"verb": "work", "half": 0.5} and err == "half a line\n"
    Report("work").say("another")
    assert capsys.readouterr().out == "another\n"


def test_progress_advances():
    with progress("steps", 3) as advance:
        advance(loss=0.25)
        advance(2)
