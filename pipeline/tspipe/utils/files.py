"""Files that are whole or not there, and folders that one process writes at a time."""

import contextlib
import errno
import fcntl
import glob
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tspipe.errors import TspipeError


@contextlib.contextmanager
def writing(path: Path, error: type[TspipeError] = TspipeError) -> Iterator[None]:
    """Say of a write that the system refuses (no room, no permission) which file it was and what to do, as `error`."""
    try:
        yield
    except OSError as problem:
        raise error(
            f"{path} cannot be written: {problem.strerror or problem}. "
            "What is already there is kept: run the same command again when this is put right."
        ) from problem


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it: under its own name it is never half there."""
    beginning = f".{path.name}.{socket.gethostname()}."
    temporary = path.with_name(f"{beginning}{os.getpid()}")
    with writing(path):
        _remove_abandoned(path.parent, beginning)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def _remove_abandoned(folder: Path, beginning: str) -> None:
    """Remove the temporary files of processes of this host that were killed."""
    for left in folder.glob(f"{glob.escape(beginning)}*"):
        process = left.name.removeprefix(beginning)
        try:
            if process.isdigit():
                os.kill(int(process), 0)  # sends nothing; only asks whether it is there
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except OSError:  # it is there, and another user's
            continue


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder last through a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at an offset of an open file."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[done:], offset + done


@contextlib.contextmanager
def lock(path: Path, error: type[TspipeError]) -> Iterator[None]:
    """Hold `<path>.lock`, in which the holder's process and host stand; raise `error` if another process holds it.

    The operating system lets go of the lock when its process dies, so a stale file blocks nobody.
    """
    name = path.with_name(path.name + ".lock")
    while True:
        # Not through a link, which another may have laid in a folder that all can write to.
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as problem:
                if problem.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
                raise error(f"{path} is being written by {holder}. Wait for it to end, or stop it.") from None
            # Its last holder may have removed the file between our open and our lock; then a new one counts.
            if name.exists() and os.path.samestat(os.fstat(descriptor), name.stat()):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                try:
                    yield
                finally:
                    name.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)
