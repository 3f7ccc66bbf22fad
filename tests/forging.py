"""Malicious changes to a valid cache: its bytes, its HDF5 structure, its manifest."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from tspipe.cache import open_cache
from tspipe.cache.checksums import checksum_names, identify
from tspipe.errors import CacheError, NotACache

Change = Callable[[Path], None]


def refusal(path: Path, error: type[CacheError] = NotACache) -> str:
    """Return the message with which a file is refused, after the file's name."""
    with pytest.raises(error) as refused:
        open_cache(path)
    assert type(refused.value) is error
    text = str(refused.value)
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def overwrite(path: Path, name: str, data: bytes, at: int = 0) -> None:
    """Overwrite bytes of a dataset whose layout has an offset."""
    with h5py.File(path, "r") as file:
        offset = file[name].id.get_offset()
    poke(path, offset + at, data)


def poke(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of the file."""
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(data)


def forge(path: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest, and adjust the id."""
    with h5py.File(path, "r") as file:
        manifest = json.loads(file["manifest"][()].tobytes().rstrip(b"\0"))
    change(manifest)
    forge_text(path, json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())


def forge_text(path: Path, text: bytes) -> None:
    """Replace the manifest's text, and adjust the id."""
    with h5py.File(path, "r") as file:
        checksums = [file[name][()].tobytes() for name in checksum_names(file)]
    overwrite(path, "manifest", text.ljust(65536, b"\0"))
    overwrite(path, "id", identify(text.ljust(65536, b"\0"), checksums))


def message(path: Path, name: str, number: int) -> int:
    """Return the offset of a message's data in a dataset's object header (HDF5's version 1)."""
    with h5py.File(path, "r") as file:
        at = h5py.h5o.get_info(file[name].id).addr + 16
    with path.open("rb") as raw:
        data = raw.read(2**17)  # the writer puts all of HDF5's metadata here
    while (result := struct.unpack_from("<HH", data, at))[0] != number:
        at += 8 + result[1]
    return at + 8


DATASPACE, DATATYPE, LAYOUT = 0x01, 0x03, 0x08  # messages with a dataset's shape, its type, its address and size


def move(path: Path, name: str, address: int) -> None:
    """Change the address of a dataset."""
    poke(path, message(path, name, LAYOUT) + 2, struct.pack("<Q", address))


def stretch(path: Path, name: str, rows: int, row_bytes: int) -> None:
    """Change the number of rows that a dataset declares, and its bytes accordingly."""
    space, layout = message(path, name, DATASPACE), message(path, name, LAYOUT)
    with path.open("rb") as raw:
        rank = raw.read(space + 2)[-1]
    poke(path, layout + 10, struct.pack("<Q", rows * row_bytes % 2**64))
    for at in (space + 8, space + 8 + 8 * rank):  # the current and the maximum number
        poke(path, at, struct.pack("<Q", rows))


def resize(path: Path, size: int) -> None:
    """Extend the file by a hole, or truncate it, and adjust its superblock."""
    with path.open("r+b") as raw:
        raw.truncate(size)
    poke(path, 40, struct.pack("<Q", size))
