"""Atomic writes of files, and locks for folders that one process writes at a time."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tspipe.errors import TspipeError
from tspipe.utils.reading import read_file

TEMPORARY_NAME = re.compile(r"\..+\.(\d+)@(.+)\.[0-9a-f]{16}\.tmp")  # process, host
_DAY = 24 * 3600  # seconds
_HOST = socket.gethostname()  # the same while a process runs, though the name may change with the network


@contextlib.contextmanager
def writing(path: Path, error: type[TspipeError] = TspipeError) -> Iterator[None]:
    """Raise `error`, with the file and a remedy, in place of an OSError (no space, no permission)."""
    try:
        yield
    except OSError as problem:
        why = "it is a link to another file" if problem.errno == errno.ELOOP else problem.strerror or problem
        raise error(
            f"{path} cannot be written: {why}. Existing files are kept. Fix this, then run the same command again."
        ) from problem


def check_writable(path: Path) -> None:
    """Raise TspipeError unless a file can be written to this path, whose folder is created; leaves no file."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so that it is complete or absent."""
    with writing(path), new_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new empty file that becomes `path` when the block ends, and is removed if the block raises.

    Its temporary name is unpredictable and is not created through a link, so in a folder that is writable for all,
    nobody can divert what is written. Files that killed processes have left in the folder are removed.
    """
    remove_abandoned(path.parent)
    temporary = path.with_name(temporary_name(path.name))
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def temporary_name(name: str) -> str:
    """Return an unpredictable name for a file that is later renamed to `name`; it states this process and host."""
    return f".{name[:100]}.{os.getpid()}@{_HOST}.{secrets.token_hex(8)}.tmp"


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of dead processes of this host, and those of other hosts after a day."""
    with contextlib.suppress(OSError):  # a folder that cannot be listed may still be writable
        for file in folder.iterdir():
            if match := TEMPORARY_NAME.fullmatch(file.name):
                with contextlib.suppress(OSError):  # another process removes it too, or it is another user's
                    if _is_abandoned(file, int(match[1]), match[2]):
                        file.unlink()


def _is_abandoned(file: Path, process: int, host: str) -> bool:
    if host != _HOST:
        return time.time() - file.lstat().st_mtime > _DAY
    try:
        os.kill(process, 0)  # sends no signal, only checks that the process exists
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # the process exists and belongs to another user
        pass
    return False


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable through a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_without_links(path: str | Path, flags: int) -> int:
    """Open a file and return its descriptor. Raises OSError if it is a link, which somebody may have planted."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    status = os.fstat(descriptor)
    if status.st_nlink == 1 and stat.S_ISREG(status.st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file, or has a second name")


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at an offset of an open file."""
    remaining = memoryview(data)
    while remaining:
        written = os.pwrite(descriptor, remaining, offset)
        remaining, offset = remaining[written:], offset + written


@contextlib.contextmanager
def lock(path: Path, error: type[TspipeError], target: Path | None = None) -> Iterator[None]:
    """Hold `<path>.lock`, which names the holder's process and host; raise `error` if another process holds it.

    The error names what is written: `target`, by default `path`.

    The operating system releases the lock when its process dies, so a stale file blocks no process. The holder removes
    what killed processes have left in the folder.
    """
    name = path.with_name(path.name + ".lock")
    with writing(name, error):
        while (descriptor := _create_lock(name)) is None:
            pass
        if isinstance(descriptor, str):
            raise error(f"{target or path} is being written by {descriptor}. Wait for it to end, or stop it.")
    try:
        remove_abandoned(path.parent)
        yield
    finally:
        if _is_held(name):
            name.unlink(missing_ok=True)
        os.close(descriptor)


def check_lock(path: Path, error: type[TspipeError], target: Path) -> None:
    """Raise `error` if this process no longer holds `<path>.lock`, since `target` was deleted or replaced."""
    if not _is_held(path.with_name(path.name + ".lock")):
        raise error(f"{target} was deleted or replaced while this process was writing it. Run the command again.")


def _is_held(name: Path) -> bool:
    """Return whether a lock file names this process."""
    try:
        return read_file(name) == _holder()
    except OSError:
        return False


def _holder() -> bytes:
    return f"process {os.getpid()} on {_HOST}".encode()


def remove_stale_lock(path: Path) -> None:
    """Remove `<path>.lock` if it was left by a killed process, and its temporary files with it."""
    if os.path.lexists(path.with_name(path.name + ".lock")):
        with contextlib.suppress(TspipeError), lock(path, TspipeError):
            pass


def _create_lock(name: Path) -> int | str | None:
    """Return the descriptor of a new lock file, the holder of an existing one, or None if that one has just ended.

    Only a new file is written to: in a folder that is writable for all, an existing one may be a planted link.
    """
    flags, new = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, True
    try:
        descriptor = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        try:
            descriptor, new = os.open(name, flags), False
        except FileNotFoundError:
            return None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
        # The last holder may have removed the file between the open and the lock.
        if not (name.exists() and os.path.samestat(os.fstat(descriptor), name.lstat())):
            return None
        if not new:  # its holder has died
            name.unlink()
            return None
        os.pwrite(descriptor, _holder(), 0)
        stack.pop_all()
        return descriptor
