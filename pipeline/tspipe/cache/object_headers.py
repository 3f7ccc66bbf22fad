"""Walk the superblock and object headers of an HDF5 file before the HDF5 library opens it.

HDF5 follows trees and shared messages wherever they lead. A reference cycle overflows its stack and ends the process.
"""

import os
import struct
from collections.abc import Iterator

from tspipe.errors import NotACache

SUPERBLOCK_BYTES = 96  # in version 0
DAMAGED = "its HDF5 structure is damaged. Get the file again from its source."
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# The bytes after the signature: 8-byte addresses and default node sizes.
_VERSIONS = bytes([0, 0, 0, 0, 0, 8, 8, 0, 4, 0, 16, 0, 0, 0, 0, 0])
_UNDEFINED_ADDRESS = 2**64 - 1
_NIL, _ATTRIBUTE, _CONTINUATION, _SYMBOL_TABLE = 0x00, 0x0C, 0x10, 0x11  # object header message types
_MAX_CHUNK_BYTES, _MAX_CHUNKS = 8192, 8  # of an object header; CacheWriter uses a few hundred bytes
_SHARED = 2  # message flag: the message is stored in another object
_MAX_DATASETS = 64
_NOT_PLAIN = "its HDF5 structure uses features that the format does not allow."


def recorded_size(head: bytes) -> int | None:
    """Return the file size that a superblock records, or None if this is none."""
    return int(struct.unpack_from("<Q", head, 40)[0]) if head.startswith(_SIGNATURE) else None


def check_superblock(descriptor: int, size: int) -> None:
    """Check the superblock, the file size it records, and all object headers; raise NotACache if one is invalid."""
    head = os.pread(descriptor, SUPERBLOCK_BYTES, 0)
    if not head.startswith(_SIGNATURE):
        if any(os.pread(descriptor, 8, 2**power) == _SIGNATURE for power in range(9, 40)):
            raise NotACache("it begins with an HDF5 user block, which is not allowed.")
        raise NotACache("it is not an HDF5 file, so not a tspipe cache.")
    if len(head) < SUPERBLOCK_BYTES:
        raise NotACache(f"it is truncated: {size} bytes, fewer than any HDF5 file has.")
    base, _, recorded, driver = struct.unpack_from("<4Q", head, 24)
    if head[8:24] != _VERSIONS or base != 0 or driver != _UNDEFINED_ADDRESS:
        raise NotACache("its HDF5 superblock is not of version 0, the only one allowed.")
    if size != recorded:
        state = "truncated" if size < recorded else "too long"
        raise NotACache(f"it is {state}: {size:,} bytes, not {recorded:,}. Get it again from its source.")
    try:
        _check_objects(descriptor, head)
    except (OSError, OverflowError, struct.error) as problem:  # an impossible address or length
        raise NotACache(DAMAGED) from problem


def _check_objects(descriptor: int, head: bytes) -> None:
    """Check that the file has no reference cycles.

    All names must be in one tree node, which has room for every dataset of the format, and no object may share a
    message with another. New-style groups, which external links require, have more trees and are refused.
    """
    root, names = struct.unpack_from("<Q", head, 64)[0], head[80:96]
    for message, data in _messages(descriptor, root):
        if message not in (_NIL, _ATTRIBUTE, _CONTINUATION) and (message, data) != (_SYMBOL_TABLE, names):
            raise NotACache("its root group is of a kind that can link to other files, which is not allowed.")
    tree = os.pread(descriptor, 544, struct.unpack_from("<Q", names)[0])
    if tree[:6] != b"TREE\0\0":  # a node of names, at level 0
        raise NotACache("it has more datasets than the format allows.")
    leaves = [os.pread(descriptor, 328, address) for address in _addresses(tree, 32, 16, 32)]
    objects = [address for leaf in leaves for address in _addresses(leaf, 16, 40, 8)]
    if len(objects) > _MAX_DATASETS:
        raise NotACache("it has more datasets than the format allows.")
    for address in objects:
        if address != _UNDEFINED_ADDRESS:  # soft links have none
            list(_messages(descriptor, address))


def _addresses(node: bytes, start: int, step: int, most: int) -> list[int]:
    """Return the addresses in a B-tree node: one every `step` bytes, as many as the node records."""
    count = min(most, struct.unpack_from("<H", node, 6)[0])
    return [struct.unpack_from("<Q", node, start + step * i)[0] for i in range(count)]


def _messages(descriptor: int, address: int) -> Iterator[tuple[int, bytes]]:
    """Yield the messages of an object header as (type, data); raise NotACache for an unsupported one."""
    version, length = struct.unpack("<B7xI4x", os.pread(descriptor, 16, address))
    chunks = [(address + 16, length)]
    for at, length in chunks:  # continuation messages append chunks
        if version != 1 or length > _MAX_CHUNK_BYTES or len(chunks) > _MAX_CHUNKS:
            raise NotACache(_NOT_PLAIN)
        chunk = os.pread(descriptor, length, at)
        while len(chunk) >= 8:
            number, size, flags = struct.unpack_from("<HHB", chunk)
            data, chunk = chunk[8 : 8 + size], chunk[8 + size :]
            if flags & _SHARED or (number == _ATTRIBUTE and data[:1] != b"\1"):  # newer attributes share types
                raise NotACache(_NOT_PLAIN)
            if number == _CONTINUATION:
                chunks.append(struct.unpack("<QQ", data))
            yield number, data
