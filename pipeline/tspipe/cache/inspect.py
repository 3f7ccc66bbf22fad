"""Check that a file is a cache and safe to read.

A downloaded file may be hostile: HDF5 can refer to other files on the reader's disk, declare terabytes in a kilobyte,
or run filters. Therefore every HDF5 feature that the format does not use is refused before any row is read. Rows are
then read by offset, without HDF5.
"""

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tspipe.cache.layout import FORMAT, ID_BYTES, MANIFEST_BYTES, SPLITS, VERSION, Dimensions
from tspipe.cache.manifest import Manifest, decode_manifest
from tspipe.cache.object_headers import DAMAGED, SUPERBLOCK_BYTES, check_superblock
from tspipe.errors import CacheDamaged, CacheIncomplete, NotACache

_LAYOUTS = {h5py.h5d.COMPACT: "compact", h5py.h5d.CHUNKED: "chunked", h5py.h5d.VIRTUAL: "virtual"}
_MAX_NAME_BYTES = 4096  # bytes of a key or a class name
_LOADED_AT_ONCE = ("classes", "labels", "keys", "digests", "views", "checksums")
_MAX_LOADED_BYTES = 2**30  # bytes of each of these: a sparse file of a few kilobytes can be of any size
# h5py raises any of these for an error in HDF5, so a damaged or hostile file may raise them anywhere.
_HDF5_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Region:
    """The location of a dataset's bytes in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """The length in bytes; Python integers do not overflow, whatever the shape."""
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class Structure:
    """The structure of a checked file."""

    manifest: Manifest
    dimensions: Dimensions
    regions: dict[str, Region]


def inspect(path: Path, *, finished: bool = True, identified: bool = True) -> Structure:
    """Check a file's structure against the format and locate its datasets. Reads no rows.

    Raises NotACache, naming the file and the rule that it breaks; CacheIncomplete if the id is still zero;
    CacheDamaged if the id does not match the manifest and checksums. `finished=False` is for a writer that resumes its
    own part file, `identified=False` for finding the damage that makes the id wrong.
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
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a pipe would wait for its other end
        raise NotACache("it is not a regular file, so not a tspipe cache.")
    with path.open("rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        check_superblock(raw.fileno(), path, size)
        regions = _read_structure(path)
        _check_offsets(regions, size)
        if finished and not any(_bytes(raw.fileno(), regions, "id", ID_BYTES)):
            raise CacheIncomplete("it is not finished. Run the command that makes it again to resume it.")
        manifest = decode_manifest(_bytes(raw.fileno(), regions, "manifest", MANIFEST_BYTES), finished=finished)
        dimensions = _dimensions(manifest, regions)
        _check_shapes(dimensions, regions)
        if finished and identified:
            _check_id(raw.fileno(), regions)
    return Structure(manifest, dimensions, regions)


def _read_structure(path: Path) -> dict[str, Region]:
    try:
        file = h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError, ValueError) as problem:
        raise NotACache("it is truncated or not a valid HDF5 file.") from problem
    with file:
        try:
            _check_attributes(file)
            return _regions(file)
        except _HDF5_ERRORS as problem:
            raise NotACache(DAMAGED) from problem


def _check_attributes(file: h5py.File) -> None:
    expected = {b"format": np.dtype(f"S{len(FORMAT)}"), b"version": np.dtype("<i8")}
    if h5py.h5a.get_num_attrs(file.id) != len(expected) or not all(h5py.h5a.exists(file.id, name) for name in expected):
        raise NotACache("it is an HDF5 file, but not a tspipe cache (root attributes `format` and `version`).")
    values = {}
    for name, dtype in expected.items():
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
    regions = {}
    for name in names:
        label = _printable(name)
        if names.count(name) > 1:
            raise NotACache(f"it holds {label!r} twice.")
        try:
            regions[label] = _region(file, name)
        except _HDF5_ERRORS as problem:
            raise NotACache(f"{label!r} is damaged, or extends beyond the end of the file.") from problem
    return regions


def _printable(name: bytes) -> str:
    return name.decode("ascii", "backslashreplace")[:100]


def _region(file: h5py.File, name: bytes) -> Region:
    label = repr(_printable(name))
    if file.id.links.get_info(name).type != h5py.h5l.TYPE_HARD:
        raise NotACache(f"{label} is a soft or external link; only hard links are allowed.")
    dataset = h5py.h5o.open(file.id, name)  # not get_info, which walks the trees of what it is asked about
    if not isinstance(dataset, h5py.h5d.DatasetID):
        raise NotACache(f"{label} is not a dataset.")
    plan = dataset.get_create_plist()
    if plan.get_external_count():
        raise NotACache(f"{label} stores its bytes in another file, which is not allowed.")
    if plan.get_nfilters():
        raise NotACache(f"{label} is filtered (compressed), which is not allowed.")
    if plan.get_layout() != h5py.h5d.CONTIGUOUS:
        raise NotACache(f"{label} is {_LAYOUTS[plan.get_layout()]}; only contiguous datasets are allowed.")
    if h5py.h5a.get_num_attrs(dataset):
        raise NotACache(f"{label} has attributes, which are not allowed.")
    space = dataset.get_space()
    shape = space.get_simple_extent_dims()
    if space.get_simple_extent_type() != h5py.h5s.SIMPLE or space.get_simple_extent_dims(True) != shape:
        raise NotACache(f"{label} has no fixed shape.")
    offset = dataset.get_offset()
    region = Region(-1 if offset is None else offset, shape, _dtype(dataset.get_type(), label))
    if offset is None or dataset.get_storage_size() != region.nbytes:
        raise NotACache(f"{label} has storage of the wrong size.")
    return region


def _dtype(kind: Any, label: str) -> np.dtype[Any]:
    """The numpy dtype an HDF5 type equals exactly; big-endian, padded or variable-length ones equal none."""
    candidates = ["u1", "<i2", "<i8", "<f2", "<f4"]
    if kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str() and kind.get_size() <= _MAX_NAME_BYTES:
        candidates = [f"S{kind.get_size()}"]
    for candidate in candidates:
        if kind.equal(h5py.h5t.py_create(np.dtype(candidate))):
            return np.dtype(candidate)
    raise NotACache(f"{label} has a type that the format does not allow.")


def _check_offsets(regions: dict[str, Region], size: int) -> None:
    before, end = "the HDF5 superblock", SUPERBLOCK_BYTES
    for name, region in sorted(regions.items(), key=lambda item: item[1].offset):
        if region.offset < end:
            raise NotACache(f"{name!r} overlaps {before}.")
        before, end = repr(name), region.offset + region.nbytes
        if end > size:
            raise NotACache(f"{name!r} extends beyond the end of the file.")


def _dimensions(manifest: Manifest, regions: dict[str, Region]) -> Dimensions:
    """The sizes the manifest states, with those that only the datasets tell."""

    def of(name: str) -> Region:
        if name not in regions:
            raise NotACache(f"the dataset {name!r} is missing.")
        return regions[name]

    images = regions.get("train_images")
    if images and manifest["views"] and manifest["preprocess"]["crop"]:
        raise NotACache("its images are cropped, and so cannot be used for its views.")
    weights = regions.get("teacher_weights")
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


def _check_shapes(dimensions: Dimensions, regions: dict[str, Region]) -> None:
    expected = dimensions.datasets()
    if missing := [name for name in expected if name not in regions]:
        raise NotACache(f"the dataset {missing[0]!r} is missing.")
    if extra := sorted(regions.keys() - expected.keys()):
        raise NotACache(f"it holds {extra[0]!r}, which is not in the format.")
    for name, (dtype, shape) in expected.items():
        region = regions[name]
        if (region.dtype, region.shape) != (dtype, shape):
            raise NotACache(f"{name!r} is {region.dtype.str} {region.shape}; its manifest says {dtype.str} {shape}.")
        if name.rpartition("_")[2] in _LOADED_AT_ONCE and region.nbytes > _MAX_LOADED_BYTES:
            raise NotACache(f"{name!r} has {region.nbytes:,} bytes; the format allows {_MAX_LOADED_BYTES:,}.")


def _bytes(descriptor: int, regions: dict[str, Region], name: str, length: int | None = None) -> bytes:
    region = regions.get(name)
    if region is None:
        raise NotACache(f"the dataset {name!r} is missing.")
    if length is not None and region.nbytes != length:
        raise NotACache(f"{name!r} has {region.nbytes:,} bytes, not {length:,}.")
    return os.pread(descriptor, region.nbytes, region.offset)


def _check_id(descriptor: int, regions: dict[str, Region]) -> None:
    checksums = [_bytes(descriptor, regions, name) for name in checksum_names(regions)]
    if _bytes(descriptor, regions, "id", ID_BYTES) != identify(_bytes(descriptor, regions, "manifest"), checksums):
        raise CacheDamaged("its id does not match its manifest and checksums. Get the file again.")


def checksum_names(names: Iterable[str]) -> list[str]:
    """Return those of `names` that are checksum datasets, in file order."""
    names = set(names)
    return [name for name in (f"{split}_checksums" for split in (*SPLITS, "random")) if name in names]


def identify(manifest: bytes, checksums: Iterable[bytes]) -> bytes:
    """Return a cache's id, 64 hex digits: SHA-256 over the manifest's 65,536 bytes and all checksums in file order."""
    digest = hashlib.sha256(manifest)
    for part in checksums:
        digest.update(part)
    return digest.hexdigest().encode("ascii")
