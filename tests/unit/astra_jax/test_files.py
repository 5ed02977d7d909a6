"""Files are written whole or not at all, and what a path names stays what it is."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from astra_jax import files
from astra_jax.errors import AstraError
from astra_jax.files import check_output, replacing, write_atomically, write_output
from eval.plots import _save

each_writer = pytest.mark.parametrize("write", [write_atomically, write_output])


@each_writer
def test_a_file_is_replaced_whole_or_not_at_all(write, tmp_path):
    path = tmp_path / "file"
    write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write(path, "half \ud800")
    assert path.read_text() == "old"
    write(path, "new \N{SNOWMAN}")
    assert path.read_text(encoding="utf8") == "new \N{SNOWMAN}"
    write(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_nobody_else_has_the_name_that_is_written_to(tmp_path):
    path = tmp_path / ("n" * 250)  # as long as names may be
    with replacing(path) as one, replacing(path) as other:
        assert one != other and {one.parent, other.parent} == {tmp_path}
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


@each_writer
def test_a_file_keeps_its_permissions(write, tmp_path):
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o600)
    write(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o600
    write(tmp_path / "file", "new")
    (tmp_path / "plain").write_text("as open as others")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed(there, tmp_path):
    (tmp_path / "place").mkdir()
    if there:
        (tmp_path / "place" / "file").write_text("old")
    (tmp_path / "one").symlink_to("place/file")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    check_output("--json", tmp_path / "two")
    write_output(tmp_path / "two", "new")
    assert (tmp_path / "two").is_symlink() and (tmp_path / "one").is_symlink()
    assert (tmp_path / "place" / "file").read_text() == "new"
    assert len(list(tmp_path.rglob("*"))) == 4


def test_a_pipe_is_written_into(tmp_path):
    path, found = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: found.append(path.read_text()))
    reader.start()
    check_output("--json", path)
    write_output(path, "text")
    reader.join(10)
    assert found == ["text"] and path.is_fifo()


@pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
def test_a_device_is_written_into(device, tmp_path):
    (tmp_path / "link").symlink_to(device)
    check_output("--json", tmp_path / "link")
    if device == "/dev/full":
        with pytest.raises(AstraError, match="link: the disk is full"):
            write_output(tmp_path / "link", "text")
    else:
        write_output(tmp_path / "link", "text")
    assert stat.S_ISCHR(os.stat(device).st_mode) and list(tmp_path.iterdir()) == [tmp_path / "link"]


@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}"])
def test_what_is_open_already_is_written_behind_what_it_has(name, tmp_path):
    with (tmp_path / "log").open("ab") as file:
        file.write(b"first\n")
        file.flush()
        path = Path(name.format(file.fileno()))
        check_output("--json", path)
        write_output(path, "second\n")
        assert not file.closed
    assert (tmp_path / "log").read_text() == "first\nsecond\n"
    with pytest.raises(AstraError, match=r"nothing is open there: write `987>FILE`"):
        check_output("--json", Path(name.format(987)))


@pytest.mark.parametrize(("path", "stream"), [("-", "out"), ("/dev/stdout", "out"), ("/dev/stderr", "err")])
def test_standard_streams(path, stream, capfd):
    print("before")
    check_output("--json", Path(path))
    write_output(Path(path), "text")
    assert getattr(capfd.readouterr(), stream) == ("before\ntext" if stream == "out" else "text")


def test_a_verb_writes_to_what_the_shell_opened(tmp_path):
    program = "from pathlib import Path; from astra_jax.report import Report; Report('v', Path('/dev/fd/3')).close()"
    command = f'"{sys.executable}" -c "{program}" 3>&1 >/dev/null | cat; "{sys.executable}" -c "{program}" 3>out.json'
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == (tmp_path / "out.json").read_text() == '{\n  "verb": "v"\n}\n'


def test_what_cannot_be_written_is_said_before_any_work(tmp_path):
    for path, expected in ((tmp_path, "is a folder"), (tmp_path / "no" / "file", "does not exist: create it first")):
        with pytest.raises(AstraError, match=f"--csv {path}: .*{expected}"):
            check_output("--csv", path)
    (tmp_path / "link").symlink_to("no/file")
    with pytest.raises(AstraError, match=f"the folder {tmp_path / 'no'} does not exist"):
        check_output("--csv", tmp_path / "link")


def test_a_file_that_may_not_be_written_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may everything
    with pytest.raises(AstraError, match="file: cannot be written: Permission denied"):
        write_output(path, "new")
    assert path.read_text() == "old"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(AstraError, match="file: the disk is full"):
        write_output(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_plots_are_written_the_same_way(tmp_path):
    (tmp_path / "file.svg").write_text("old")
    (tmp_path / "link.svg").symlink_to("file.svg")
    _save(Figure(), tmp_path / "link.svg")
    _save(Figure(), tmp_path / "plot.png")
    assert (tmp_path / "link.svg").is_symlink() and "<svg" in (tmp_path / "file.svg").read_text()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
