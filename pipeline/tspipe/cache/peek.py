"""Describes a remote cache from the head of its file."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tspipe.cache.address import file_name
from tspipe.cache.checksums import checksum_names
from tspipe.cache.column import Column
from tspipe.cache.inspect import inspect
from tspipe.cache.manifest import Manifest
from tspipe.cache.remote import Remote, driver_errors, open_remote
from tspipe.cache.transfer import local_errors, renamed_errors
from tspipe.errors import CacheError

_HEAD = 200 * 2**10  # bytes that contain HDF5's metadata, the manifest, the id and the first class names
_PEEK = 252 * 2**10  # the most that a peek reads

ReadPiece = Callable[[int, int], tuple[bytes, int]]  # start, stop -> the bytes, and the size of the whole file


@dataclass(frozen=True)
class Peek:
    """What the head of a remote cache contains.

    Its structure and manifest are checked as a local file's are. `identified` says whether its id is checked too, which
    takes all checksums; a large cache has too many.
    """

    name: str
    size: int
    id: str
    classes: list[str]  # the first ones; their number is in the manifest
    manifest: Manifest
    has_images: bool
    has_teacher: bool
    identified: bool


def peek(url: str) -> Peek:
    """Describe a remote cache of any size with at most four requests and 256 KiB.

    Raises NotACache, CacheIncomplete or CacheDamaged as for a local file, and CacheError.
    """
    remote = open_remote(url)
    with tempfile.TemporaryDirectory(prefix="tspipe-") as folder:
        # The head goes into a sparse file of the full size, so that the checks work as for a local file.
        sparse = Path(folder) / file_name(url)
        with renamed_errors(sparse, remote.address), _pieces(remote) as read:
            head, size = read(0, _HEAD)
            with local_errors(sparse):
                sparse.write_bytes(head)
                try:
                    os.truncate(sparse, size)
                except OSError as problem:
                    raise CacheError(
                        f"{remote.address}: its server claims that the file has {size:,} bytes, more than a file can "
                        "have on this machine. Ask its owner."
                    ) from problem
            identified = _complete(sparse, inspect(sparse, identified=False).columns, read, 3 if remote.web else 2)
            structure = inspect(sparse, identified=identified)
            columns, names = structure.columns, structure.columns["classes"]
            in_head = names[: max(0, len(head) - names.offset) // names.dtype.itemsize]
            return Peek(
                name=sparse.name,
                size=size,
                id=columns["id"].load().tobytes().decode("ascii", "replace"),
                classes=[name.decode("utf-8", "replace") for name in in_head.tolist()],
                manifest=structure.manifest,
                has_images="train_images" in columns,
                has_teacher="teacher_weights" in columns,
                identified=identified,
            )


def _complete(sparse: Path, columns: dict[str, Column], read: ReadPiece, requests: int) -> bool:
    """Fetch the checksums that are not in the head, unless they are too many; return whether all are present."""
    left = [columns[name] for name in checksum_names(columns)]
    left = [column for column in left if column.offset + column.nbytes > _HEAD]
    if len(left) > requests or sum(column.nbytes for column in left) > _PEEK - _HEAD:
        return False
    with local_errors(sparse), sparse.open("r+b") as file:
        for column in left:
            file.seek(column.offset)
            file.write(read(column.offset, column.offset + column.nbytes)[0])
    return True


@contextlib.contextmanager
def _pieces(remote: Remote) -> Iterator[ReadPiece]:
    """Yield a function that reads a piece of the file with one request."""
    with contextlib.ExitStack() as stack:
        opened = None if remote.web else stack.enter_context(remote.open_at(0))[0]

        def read(start: int, stop: int) -> tuple[bytes, int]:
            if opened is not None:
                with driver_errors(remote.address):
                    opened.seek(start)
                    return opened.read(stop - start), opened.size
            with remote.open_at(start, stop) as (file, begins_there):
                if not begins_there or file.size is None:
                    raise CacheError(
                        f"{remote.address}: its server does not support range requests. Download all of it: "
                        f"tspipe pull {remote.address}"
                    )
                return b"".join(remote.chunks(file, stop - start)), file.size

        yield read
