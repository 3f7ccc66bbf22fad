"""Is this file a cache, and one that is safe to read?

A file from someone else may be hostile: HDF5 can name other files on the reader's disk, declare terabytes in a
kilobyte, or run filters. So everything the format does not use is refused before a single row is read, and
the bytes are then read by offset, without HDF5.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tspipe.cache.layout import FORMAT, ID_BYTES, MANIFEST_BYTES, SPLITS, VERSION, Dimensions, Manifest, decode_manifest
from tspipe.errors import CacheDamaged, CacheIncomplete, NotACache

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MOST_DATASETS = 64
_LONGEST_NAME = 4096  # bytes of a key or a class name


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
    size = _file_size(path)
    try:
        file = h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError, ValueError) as problem:
        raise NotACache("it is cut short or not a sound HDF5 file.") from problem
    # h5py turns what HDF5 finds wrong into any of these, so a damaged or hostile file may raise them anywhere below.
    with file:
        try:
            _check_attributes(file)
            found = _regions(file)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as problem:
            raise NotACache("its HDF5 structure is damaged.") from problem
    _check_offsets(found, size)
    with path.open("rb") as raw:
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


def _file_size(path: Path) -> int:
    """The file's size, after checking that it begins with an HDF5 superblock that states the same size."""
    with path.open("rb") as raw:
        head = raw.read(48)
        size = os.fstat(raw.fileno()).st_size
    if not head.startswith(_SIGNATURE):
        raise NotACache("it is not an HDF5 file, so not a tspipe cache.")
    # Superblock version 0 with 8-byte offsets: the address of the end of the file is at byte 40.
    if len(head) < 48 or head[8] != 0 or head[13] != 8 or head[14] != 8:
        raise NotACache("its HDF5 superblock is not of version 0, the one the format uses.")
    stated = struct.unpack_from("<Q", head, 40)[0]
    if size != stated:
        how = "cut short" if size < stated else "grown"
        raise NotACache(f"it was {how}: {size:,} bytes, not {stated:,}. Get it again from where it came from.")
    return size


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
    if file.id.get_num_objs() > _MOST_DATASETS:
        raise NotACache("it holds more datasets than the format has.")
    names: list[bytes] = []
    file.id.links.iterate(names.append)  # names only: following a link would open what it points to
    return {_printable(name): _region(file, name) for name in names}


def _printable(name: bytes) -> str:
    return name.decode("ascii", "backslashreplace")[:100]


def _region(file: h5py.File, name: bytes) -> Region:
    shown = repr(_printable(name))
    if file.id.links.get_info(name).type != h5py.h5l.TYPE_HARD:
        raise NotACache(f"{shown} is a soft or external link; a cache has hard links only.")
    if h5py.h5o.get_info(file.id, name).type != h5py.h5o.TYPE_DATASET:
        raise NotACache(f"{shown} is not a dataset.")
    dataset = h5py.h5d.open(file.id, name)
    plan = dataset.get_create_plist()
    if plan.get_layout() != h5py.h5d.CONTIGUOUS:
        raise NotACache(f"{shown} is chunked, compact or virtual; a cache's datasets are contiguous.")
    if plan.get_external_count():
        raise NotACache(f"{shown} keeps its bytes in another file.")
    if plan.get_nfilters():
        raise NotACache(f"{shown} is filtered (compressed); a cache's datasets are not.")
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
    end = 0
    for name, region in sorted(found.items(), key=lambda item: item[1].offset):
        if region.offset < max(end, 1):
            raise NotACache(f"{name!r} overlaps another dataset.")
        end = region.offset + region.nbytes
        if end > size:
            raise NotACache(f"{name!r} reaches beyond the end of the file.")


def _dimensions(manifest: Manifest, found: dict[str, Region]) -> Dimensions:
    """The sizes the manifest states, with those that only the datasets tell."""

    def of(name: str) -> Region:
        if name not in found:
            raise NotACache(f"the dataset {name!r} is missing.")
        return found[name]

    images = found.get("train_images")
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
