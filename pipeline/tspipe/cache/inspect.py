"""Is this file a cache, and one that is safe to read?

A file from someone else may be hostile: HDF5 can name other files on the reader's disk, declare terabytes in a
kilobyte, or run filters. So everything the format does not use is refused before a single row is read, and
the bytes are then read by offset, without HDF5.
"""

import hashlib
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tspipe.cache.layout import (
    FORMAT,
    ID_BYTES,
    MANIFEST_BYTES,
    SPLITS,
    VERSION,
    Dimensions,
    Manifest,
    decode_manifest,
)
from tspipe.errors import CacheDamaged, CacheIncomplete, NotACache

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK = 96  # its bytes, in version 0
_VERSIONS = bytes(
    [0, 0, 0, 0, 0, 8, 8, 0, 4, 0, 16, 0, 0, 0, 0, 0]
)  # after the signature: 8-byte addresses, usual nodes
_NOWHERE = 2**64 - 1  # an address that is not used
_NOTHING, _ATTRIBUTE, _CONTINUATION, _NAMES = 0x00, 0x0C, 0x10, 0x11  # messages of an object header
_LONGEST_CHUNK, _MOST_CHUNKS = 8192, 8  # of an object header; the writer's take some hundred bytes
_SHARED = 2  # a message's flag: it lies in another object
_LAYOUTS = {h5py.h5d.COMPACT: "compact", h5py.h5d.CHUNKED: "chunked", h5py.h5d.VIRTUAL: "virtual"}
_MOST_DATASETS = 64
_LONGEST_NAME = 4096  # bytes of a key or a class name
_READ_WHOLE = ("classes", "labels", "keys", "digests", "views", "checksums")
_MOST_AT_ONCE = 2**30  # bytes of each of these: a sparse file of a few kilobytes can be of any size
_DAMAGED = "its HDF5 structure is damaged. Get the file again from where it came from."
_NOT_PLAIN = "its HDF5 structure is not of the plain kind that the format uses."
# h5py turns what HDF5 finds wrong into any of these, so a damaged or hostile file may raise them anywhere.
_TROUBLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Region:
    """Where one dataset's bytes lie in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Its length in bytes, in Python's unbounded integers: a hostile shape cannot overflow it."""
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class Structure:
    """What a checked file holds."""

    manifest: Manifest
    dimensions: Dimensions
    regions: dict[str, Region]


def inspect(path: Path, *, finished: bool = True, identified: bool = True) -> Structure:
    """Check a file's structure against the format and note where its datasets lie. Reads no rows.

    Raises NotACache, naming the file and the rule it breaks; CacheIncomplete and CacheDamaged when the format is
    kept but the id is still zero or is not that of the manifest and checksums. `finished=False` is for a
    writer that goes on with its own part file, `identified=False` for finding out what damage made the id wrong.
    """
    try:
        return _inspect(path, finished, identified)
    except (NotACache, CacheIncomplete, CacheDamaged) as problem:
        raise type(problem)(f"{path}: {problem}") from problem.__cause__
    except FileNotFoundError:
        raise NotACache(f"There is no file {path}. Make the cache first: tspipe cache --dataset NAME") from None
    except OSError as problem:
        raise NotACache(f"{path}: cannot be read ({problem.strerror or problem}).") from problem


def _inspect(path: Path, finished: bool, identified: bool) -> Structure:
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to open a pipe is to wait for its other end
        raise NotACache("it is not a regular file, so not a tspipe cache.")
    with path.open("rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        _check_superblock(raw.fileno(), path, size)
        found = _read_structure(path)
        _check_offsets(found, size)
        if finished and not any(_bytes(raw.fileno(), found, "id", ID_BYTES)):
            raise CacheIncomplete(
                "it is not finished. Run the command that makes it again: it goes on where it stopped."
            )
        manifest = decode_manifest(_bytes(raw.fileno(), found, "manifest", MANIFEST_BYTES), finished=finished)
        dimensions = _dimensions(manifest, found)
        _check_shapes(dimensions, found)
        if finished and identified:
            _check_id(raw.fileno(), found)
    return Structure(manifest, dimensions, found)


def _check_superblock(descriptor: int, path: Path, size: int) -> None:
    """Check that a file begins as the writer's do, states its own size, and can be walked by HDF5."""
    head = os.pread(descriptor, _SUPERBLOCK, 0)
    if not head.startswith(_SIGNATURE):
        if h5py.is_hdf5(path):
            raise NotACache("it begins with a user block, which a cache has not.")
        raise NotACache("it is not an HDF5 file, so not a tspipe cache.")
    if len(head) < _SUPERBLOCK:
        raise NotACache(f"it was cut short: {size} bytes, fewer than any HDF5 file has.")
    base, _, stated, driver = struct.unpack_from("<4Q", head, 24)
    if head[8:24] != _VERSIONS or base != 0 or driver != _NOWHERE:
        raise NotACache("its HDF5 superblock is not that of version 0, the one the format uses.")
    if size != stated:
        how = "cut short" if size < stated else "grown"
        raise NotACache(f"it was {how}: {size:,} bytes, not {stated:,}. Get it again from where it came from.")
    try:
        _check_objects(descriptor, head)
    except (OSError, OverflowError, struct.error) as problem:  # of an address or a length that cannot be
        raise NotACache(_DAMAGED) from problem


def _check_objects(descriptor: int, head: bytes) -> None:
    """Check that HDF5 can walk the file without end: it follows trees and shared messages wherever they lead.

    One that leads back to itself overflows the stack, which ends the process. So all names are in one node of a
    tree, which has room for as many as the format has, and no object has a message that lies in another. Groups of
    the newer kind, which external links need, have more trees.
    """
    root, names = struct.unpack_from("<Q", head, 64)[0], head[80:96]
    for message, data in _messages(descriptor, root):
        if message not in (_NOTHING, _ATTRIBUTE, _CONTINUATION) and (message, data) != (_NAMES, names):
            raise NotACache("its root group is of the kind that can link to other files; a cache's is not.")
    tree = os.pread(descriptor, 544, struct.unpack_from("<Q", names)[0])
    if tree[:6] != b"TREE\0\0":  # a node of names, at level 0
        raise NotACache("it holds more datasets than the format has.")
    leaves = [os.pread(descriptor, 328, address) for address in _column(tree, 32, 16, 32)]
    objects = [address for leaf in leaves for address in _column(leaf, 16, 40, 8)]
    if len(objects) > _MOST_DATASETS:
        raise NotACache("it holds more datasets than the format has.")
    for address in objects:
        if address != _NOWHERE:  # of a soft link
            list(_messages(descriptor, address))


def _column(node: bytes, start: int, step: int, most: int) -> list[int]:
    """The addresses in a node of a tree of names: one every `step` bytes, as many as the node says it has."""
    count = min(most, struct.unpack_from("<H", node, 6)[0])
    return [struct.unpack_from("<Q", node, start + step * i)[0] for i in range(count)]


def _messages(descriptor: int, address: int) -> Iterator[tuple[int, bytes]]:
    """The messages of an object header, (number, data); raises NotACache for one that is not plain."""
    version, length = struct.unpack("<B7xI4x", os.pread(descriptor, 16, address))
    chunks = [(address + 16, length)]
    for at, length in chunks:  # the header goes on in those that are added on the way
        if version != 1 or length > _LONGEST_CHUNK or len(chunks) > _MOST_CHUNKS:
            raise NotACache(_NOT_PLAIN)
        chunk = os.pread(descriptor, length, at)
        while len(chunk) >= 8:
            number, size, flags = struct.unpack_from("<HHB", chunk)
            data, chunk = chunk[8 : 8 + size], chunk[8 + size :]
            if flags & _SHARED or (number == _ATTRIBUTE and data[:1] != b"\1"):  # later attributes share their types
                raise NotACache(_NOT_PLAIN)
            if number == _CONTINUATION:
                chunks.append(struct.unpack("<QQ", data))
            yield number, data


def _read_structure(path: Path) -> dict[str, Region]:
    try:
        file = h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError, ValueError) as problem:
        raise NotACache("it is cut short or not a sound HDF5 file.") from problem
    with file:
        try:
            _check_attributes(file)
            return _regions(file)
        except _TROUBLE as problem:
            raise NotACache(_DAMAGED) from problem


def _check_attributes(file: h5py.File) -> None:
    wanted = {b"format": np.dtype(f"S{len(FORMAT)}"), b"version": np.dtype("<i8")}
    if h5py.h5a.get_num_attrs(file.id) != len(wanted) or not all(h5py.h5a.exists(file.id, name) for name in wanted):
        raise NotACache("it is an HDF5 file, but not a tspipe cache (root attributes `format` and `version`).")
    values = {}
    for name, dtype in wanted.items():
        attribute = h5py.h5a.open(file.id, name)
        if attribute.shape != () or not attribute.get_type().equal(h5py.h5t.py_create(dtype)):
            raise NotACache(f"its root attribute {name.decode()!r} has the wrong type.")
        value = np.empty((), dtype)
        attribute.read(value)
        values[name] = value.item()
    if values[b"format"] != FORMAT:
        raise NotACache("it is an HDF5 file, but not a tspipe cache (root attribute `format`).")
    if values[b"version"] != VERSION:
        raise NotACache(
            f"it has format version {values[b'version']}; this tspipe reads version {VERSION}. "
            "A newer tspipe may read it: pip install --upgrade tspipe"
        )


def _regions(file: h5py.File) -> dict[str, Region]:
    names: list[bytes] = []
    file.id.links.iterate(names.append)  # names only: following a link would open what it points to
    found = {}
    for name in names:
        shown = _printable(name)
        if names.count(name) > 1:
            raise NotACache(f"it holds {shown!r} twice.")
        try:
            found[shown] = _region(file, name)
        except _TROUBLE as problem:
            raise NotACache(f"{shown!r} is damaged, or reaches beyond the end of the file.") from problem
    return found


def _printable(name: bytes) -> str:
    return name.decode("ascii", "backslashreplace")[:100]


def _region(file: h5py.File, name: bytes) -> Region:
    shown = repr(_printable(name))
    if file.id.links.get_info(name).type != h5py.h5l.TYPE_HARD:
        raise NotACache(f"{shown} is a soft or external link; a cache has hard links only.")
    dataset = h5py.h5o.open(file.id, name)  # not get_info, which walks the trees of what it is asked about
    if not isinstance(dataset, h5py.h5d.DatasetID):
        raise NotACache(f"{shown} is not a dataset.")
    plan = dataset.get_create_plist()
    if plan.get_external_count():
        raise NotACache(f"{shown} keeps its bytes in another file.")
    if plan.get_nfilters():
        raise NotACache(f"{shown} is filtered (compressed); a cache's datasets are not.")
    if plan.get_layout() != h5py.h5d.CONTIGUOUS:
        raise NotACache(f"{shown} is {_LAYOUTS[plan.get_layout()]}; a cache's datasets are contiguous.")
    if h5py.h5a.get_num_attrs(dataset):
        raise NotACache(f"{shown} has attributes; a cache's datasets have none.")
    space = dataset.get_space()
    shape = space.get_simple_extent_dims()
    if space.get_simple_extent_type() != h5py.h5s.SIMPLE or space.get_simple_extent_dims(True) != shape:
        raise NotACache(f"{shown} has no fixed shape.")
    offset = dataset.get_offset()
    region = Region(-1 if offset is None else offset, shape, _dtype(dataset.get_type(), shown))
    if offset is None or dataset.get_storage_size() != region.nbytes:
        raise NotACache(f"{shown} has no storage of its size.")
    return region


def _dtype(kind: Any, shown: str) -> np.dtype[Any]:
    """The numpy dtype an HDF5 type equals exactly; big-endian, padded or variable-length ones equal none."""
    candidates = ["u1", "<i2", "<i8", "<f2", "<f4"]
    if kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str() and kind.get_size() <= _LONGEST_NAME:
        candidates = [f"S{kind.get_size()}"]
    for candidate in candidates:
        if kind.equal(h5py.h5t.py_create(np.dtype(candidate))):
            return np.dtype(candidate)
    raise NotACache(f"{shown} has a type the format does not use.")


def _check_offsets(found: dict[str, Region], size: int) -> None:
    before, end = "HDF5's superblock", _SUPERBLOCK
    for name, region in sorted(found.items(), key=lambda item: item[1].offset):
        if region.offset < end:
            raise NotACache(f"{name!r} overlaps {before}.")
        before, end = repr(name), region.offset + region.nbytes
        if end > size:
            raise NotACache(f"{name!r} reaches beyond the end of the file.")


def _dimensions(manifest: Manifest, found: dict[str, Region]) -> Dimensions:
    """The sizes the manifest states, with those that only the datasets tell."""

    def of(name: str) -> Region:
        if name not in found:
            raise NotACache(f"the dataset {name!r} is missing.")
        return found[name]

    images = found.get("train_images")
    if images and manifest["views"] and manifest["preprocess"]["crop"]:
        raise NotACache("its images are cropped, which has taken away what its views need.")
    weights = found.get("teacher_weights")
    return Dimensions(
        rows={split: manifest["dataset"]["rows"][split] for split in SPLITS},
        width=manifest["features"]["width"],
        classes=manifest["dataset"]["classes"],
        feature_dtype=manifest["features"]["dtype"],
        block_rows=manifest["block_rows"],
        class_bytes=of("classes").dtype.itemsize,
        key_bytes={split: of(f"{split}_keys").dtype.itemsize for split in SPLITS},
        weights_bytes=0 if weights is None else weights.nbytes,
        views=manifest["views"] and manifest["views"]["count"],
        image_shape=images.shape[1:] if images and len(images.shape) == 4 else None,
        random_rows=manifest["random"] and manifest["random"]["rows"],
    )


def _check_shapes(dimensions: Dimensions, found: dict[str, Region]) -> None:
    expected = dimensions.datasets()
    if missing := [name for name in expected if name not in found]:
        raise NotACache(f"the dataset {missing[0]!r} is missing.")
    if extra := sorted(found.keys() - expected.keys()):
        raise NotACache(f"it holds {extra[0]!r}, which the format does not know.")
    for name, (dtype, shape) in expected.items():
        region = found[name]
        if (region.dtype, region.shape) != (dtype, shape):
            raise NotACache(f"{name!r} is {region.dtype.str} {region.shape}; its manifest says {dtype.str} {shape}.")
        if name.rpartition("_")[2] in _READ_WHOLE and region.nbytes > _MOST_AT_ONCE:
            raise NotACache(f"{name!r} has {region.nbytes:,} bytes; the format allows {_MOST_AT_ONCE:,}.")


def _bytes(descriptor: int, found: dict[str, Region], name: str, length: int | None = None) -> bytes:
    region = found.get(name)
    if region is None:
        raise NotACache(f"the dataset {name!r} is missing.")
    if length is not None and region.nbytes != length:
        raise NotACache(f"{name!r} has {region.nbytes:,} bytes, not {length:,}.")
    return os.pread(descriptor, region.nbytes, region.offset)


def _check_id(descriptor: int, found: dict[str, Region]) -> None:
    checksums = [_bytes(descriptor, found, name) for name in checksum_names(found)]
    if _bytes(descriptor, found, "id", ID_BYTES) != identify(_bytes(descriptor, found, "manifest"), checksums):
        raise CacheDamaged("its id is not that of its manifest and checksums. Get the file again.")


def checksum_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that are checksum datasets, in file order."""
    names = set(names)
    return [name for name in (f"{split}_checksums" for split in (*SPLITS, "random")) if name in names]


def identify(manifest: bytes, checksums: Iterable[bytes]) -> bytes:
    """A cache's id, 64 hex digits: SHA-256 over the manifest's 65,536 bytes, then all checksums in file order."""
    digest = hashlib.sha256(manifest)
    for part in checksums:
        digest.update(part)
    return digest.hexdigest().encode("ascii")
