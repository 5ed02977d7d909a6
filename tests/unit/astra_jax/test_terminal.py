"""What is printed is the text, exactly; on a terminal it drives nothing; and a reader that is gone stops no work."""

import io
import os
import pty
import sys

import pytest

from astra_jax import terminal
from astra_jax.cli import main
from astra_jax.report import Report, progress
from astra_jax.terminal import visible

# What rich makes something else of: names of emoji, markup, links, tabs; and what a terminal does.
ODD = "a:b:c :smile: [bold]x[/bold] [link=x]y[/link] \t| 1_0 \\[z] 👍🏽 é\u00a0ü\u3000漢"
DRIVES = "\x1b[31m\x1b]0;title\x07\x9b2J\r\b\x00\x7f"


@pytest.fixture
def stdout(monkeypatch):
    """Replaces stdout by one of an encoding; returns what came out, as bytes."""

    def replace(**options):
        file = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, **options))
        return file.getvalue

    return replace


def test_generated_text_is_exact(stdout):
    out = stdout(encoding="utf-8")
    report = Report("run")
    for piece in (ODD[:7], ODD[7:], DRIVES, "\n" + 300 * "x" + "\n"):
        report.show(piece)
    assert out().decode() == ODD + DRIVES + "\n" + 300 * "x" + "\n"


def test_a_line_is_what_it_says_and_drives_no_terminal(stdout):
    out = stdout(encoding="utf-8")
    Report("run").say(f"wrote {ODD}{DRIVES}caf\udce9 and {300 * 'x'}\nnext")
    shown = ODD.replace("\t", "\\t") + r"\x1b[31m\x1b]0;title\x07\x9b2J\r\x08\x00\x7f" + r"caf\xe9"
    assert out().decode() == f"wrote {shown} and {300 * 'x'}\nnext\n"


def test_a_table_holds_its_texts_whole(stdout):
    out = stdout(encoding="utf-8")
    long = " ".join(["word"] * 100)
    Report("run").table(
        "rows", f"{ODD} {long}", [{":smile:[b]": ODD, "more\x1b[1m": f"{DRIVES}\n\u202ex", "long": long}]
    )
    text = out().decode()
    assert ODD.replace("\t", "\\t") in text.split("\n")[0] and long in text.split("\n")[0]
    row = next(line for line in text.split("\n")[1:] if ":b:c" in line)
    assert ODD.replace("\t", "\\t") in row and long in row and r"\x9b2J" in row and r"\n\u202ex" in row
    assert ":smile:[b]" in text and r"more\x1b[1m" in text and not set("\x1b\x07\x9b\r\t") & set(text)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_what_an_encoding_lacks_is_replaced(stdout, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    out = stdout(encoding=encoding)
    terminal.prepare()
    report = Report("run")
    report.show("é漢👍")
    report.table("rows", "é漢", [{"name": "é漢"}])
    expected = "é漢👍" if encoding == "utf-8" else "é??" if encoding == "latin-1" else "???"
    assert out().decode(encoding).startswith(expected)


def test_a_pipe_gets_utf8_whatever_the_locale(stdout, monkeypatch):
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    out = stdout(encoding="latin-1")
    terminal.prepare()
    Report("run").show(ODD)
    assert out() == ODD.encode()


def test_on_a_terminal_text_drives_nothing(monkeypatch):
    ours, its = pty.openpty()
    with open(its, "w", encoding="utf-8") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        Report("run").show(f"é:smile:{DRIVES}\tx\n")
    assert os.read(ours, 1000).decode() == "é:smile:" + r"\x1b[31m\x1b]0;title\x07\x9b2J\r\x08\x00\x7f" + "\tx\r\n"
    os.close(ours)


def test_progress_shows_labels_as_they_are(monkeypatch):
    ours, its = pty.openpty()
    with open(its, "w", encoding="utf-8") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setenv("COLUMNS", "200")
        with progress("a:b:c :smile: [x] [/bold] \x1b[5m", 3) as advance:
            advance(way="[/y] :smile:\x07")
    shown = os.read(ours, 100_000).decode()
    assert "a:b:c :smile: [x] [/bold] \\x1b[5m" in shown and "way [/y] :smile:\\x07" in shown
    os.close(ours)


class Gone(io.TextIOWrapper):
    """Stdout that fails from some write on."""

    def __init__(self, error):
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.error, self.writes = error, 0

    def write(self, text):
        self.writes += 1
        if self.writes > 1:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BrokenPipeError(32, "Broken pipe"), 0, ""),
        (OSError(28, "No space left on device"), 2, "astra: error: not all could be written to stdout: No space left"),
    ],
)
def test_work_goes_on_where_nobody_reads(monkeypatch, capsys, tmp_path, error, code, said):
    def work():
        report = Report("work", tmp_path / "all.json")
        for line in "abc":
            report.say(line, **{line: 1})
        report.close()

    monkeypatch.setattr(sys, "stdout", Gone(error))
    assert main.guarded(work) == code
    assert capsys.readouterr().err.startswith(said)
    assert '"c": 1' in (tmp_path / "all.json").read_text()


def test_no_stdout_at_all(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert main.guarded(lambda: Report("work").say("a")) == 0
    assert capsys.readouterr().err == ""


def test_what_is_kept_is_kept():
    assert visible("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"
    assert visible("a\n\tb") == "a\\n\\tb"
    assert visible("\ud800\udc80\u2028") == "\\ud800\\x80\\u2028"
