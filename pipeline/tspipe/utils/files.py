"""Atomic writes of files, and locks for folders that one process writes at a time."""

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
    """Raise `error`, with the file and a remedy, in place of an OSError (no space, no permission)."""
    try:
        yield
    except OSError as problem:
        raise error(
            f"{path} cannot be written: {problem.strerror or problem}. "
            "What is already there is kept: run the same command again when this is put right."
        ) from problem


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so that it is complete or absent."""
    prefix = f".{path.name}.{socket.gethostname()}."
    temporary = path.with_name(f"{prefix}{os.getpid()}")
    with writing(path):
        _remove_abandoned(path.parent, prefix)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove the temporary files of killed processes of this host."""
    for file in folder.glob(f"{glob.escape(prefix)}*"):
        process = file.name.removeprefix(prefix)
        try:
            if process.isdigit():
                os.kill(int(process), 0)  # sends no signal, only checks that the process exists
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except OSError:  # the process exists and belongs to another user
            continue


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable through a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at an offset of an open file."""
    remaining = memoryview(data)
    while remaining:
        written = os.pwrite(descriptor, remaining, offset)
        remaining, offset = remaining[written:], offset + written


@contextlib.contextmanager
def lock(path: Path, error: type[TspipeError]) -> Iterator[None]:
    """Hold `<path>.lock`, which names the holder's process and host; raise `error` if another process holds it.

    The operating system releases the lock when its process dies, so a stale file blocks no process.
    """
    name = path.with_name(path.name + ".lock")
    while True:
        # O_NOFOLLOW: in a folder that is writable for all, another user may have created a link.
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as problem:
                if problem.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
                raise error(f"{path} is being written by {holder}. Wait for it to end, or stop it.") from None
            # The last holder may have removed the file between the open and the lock; then a new file counts.
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
