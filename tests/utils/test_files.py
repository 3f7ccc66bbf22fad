"""Files are whole or not there, and what a killed process leaves is removed."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tspipe.errors import CacheBusy, TspipeError
from tspipe.utils import files
from tspipe.utils.files import check_lock, lock, open_without_links, remove_stale_lock, write_whole
from tspipe.utils.reading import read_file


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    """Not what those of other hosts left, or those that are still there."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    host = socket.gethostname()
    token = "0123456789abcdef"
    kept = [
        f".x.{os.getppid()}@{host}.{token}.tmp",
        f".x.1@elsewhere.{token}.tmp",
        f".x.{process.pid}@{host}.notes.tmp",
    ]
    for name in (*kept, f".y.json.{process.pid}@{host}.{token}.tmp", f".x.2@elsewhere.{token}.tmp"):
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / f".x.2@elsewhere.{token}.tmp", (0, 0))
    write_whole(tmp_path / "x", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "x"])
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_the_lock_of_a_killed_process_is_removed_and_a_held_one_is_not(tmp_path: Path) -> None:
    stale, held = tmp_path / "stale", tmp_path / "held"
    (tmp_path / "stale.lock").write_text("process 1 on elsewhere")
    with lock(held, CacheBusy):
        for path in (stale, held, tmp_path / "none"):
            remove_stale_lock(path)
        assert [path.name for path in tmp_path.iterdir()] == ["held.lock"]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "x.lock").symlink_to(victim)
    with pytest.raises(CacheBusy) as refused, lock(tmp_path / "x", CacheBusy):
        pass
    assert str(refused.value) == (
        f"{tmp_path}/x.lock cannot be written: it is a link to another file. Existing files are kept. Fix "
        "this, then run the same command again."
    )
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("plant", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_a_planted_link_is_never_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path, Path], None]
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 16)
    temporary = tmp_path / f".x.{os.getpid()}@{socket.gethostname()}.{'0' * 16}.tmp"
    plant(temporary, victim)
    with pytest.raises(TspipeError):
        write_whole(tmp_path / "x", b"data")
    plant(tmp_path / "y", victim)
    with pytest.raises(OSError, match=r"link|second name"):
        open_without_links(tmp_path / "y", os.O_RDWR)
    plant(tmp_path / "z.lock", victim)
    with contextlib.suppress(CacheBusy), lock(tmp_path / "z", CacheBusy):
        pass
    assert victim.read_bytes() == b"precious"


def test_a_lock_removes_what_a_dead_process_left_in_the_folder(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    name = f".summary.json.{process.pid}@{socket.gethostname()}.0123456789abcdef.tmp"
    (tmp_path / name).write_bytes(b"half")
    (tmp_path / "run.lock").write_text("process 1 on elsewhere")
    with lock(tmp_path / "run", CacheBusy):
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
        assert (tmp_path / "run.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert list(tmp_path.iterdir()) == []


def test_a_lock_stays_held_when_the_name_of_the_machine_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lock(tmp_path / "run", CacheBusy):
        monkeypatch.setattr(socket, "gethostname", lambda: "another-network")
        check_lock(tmp_path / "run", CacheBusy, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_in_place_of_a_held_lock_is_not_waited_for(tmp_path: Path) -> None:
    with lock(tmp_path / "run", CacheBusy):
        (tmp_path / "run.lock").unlink()
        os.mkfifo(tmp_path / "run.lock")
        with pytest.raises(CacheBusy, match="was deleted or replaced while this process was writing it"):
            check_lock(tmp_path / "run", CacheBusy, tmp_path)


def test_a_lock_names_what_is_written(tmp_path: Path) -> None:
    with (
        lock(tmp_path / "run", CacheBusy),
        pytest.raises(CacheBusy) as refused,
        lock(tmp_path / "run", CacheBusy, tmp_path),
    ):
        pass
    assert str(refused.value).startswith(f"{tmp_path} is being written by process {os.getpid()} on ")


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "pipe")


def test_a_pipe_in_place_of_a_lock_file_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.lock")
    with lock(tmp_path / "x", CacheBusy):
        assert (tmp_path / "x.lock").is_file()
