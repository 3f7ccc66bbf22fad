"""Files are whole or not there, and what a killed process leaves is removed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tspipe.errors import CacheBusy
from tspipe.utils.files import lock, write_whole


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


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "x.lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"), lock(tmp_path / "x", CacheBusy):
        pass
    assert victim.read_bytes() == b"precious"
