"""Check that a file is a cache and safe to read.

A downloaded file may be hostile: HDF5 can refer to other files on the reader's disk, declare terabytes in a kilobyte,
or run filters. Therefore every HDF5 feature that the format does not use is refused before any row is read. Rows are
then read by offset, without HDF5.
"""

import errno
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tspipe.cache.address import is_url
from tspipe.cache.checksums import checksum_names, identify
from tspipe.cache.column import Column, OpenFile
from tspipe.cache.layout import FORMAT, ID_BYTES, MANIFEST_BYTES, VERSION, Dimensions
from tspipe.cache.manifest import Manifest, decode_manifest
from tspipe.cache.object_headers import DAMAGED, SUPERBLOCK_BYTES, check_superblock
from tspipe.errors import CacheDamaged, CacheIncomplete, NotACache

_LAYOUTS = {h5py.h5d.COMPACT: "compact", h5py.h5d.CHUNKED: "chunked", h5py.h5d.VIRTUAL: "virtual"}
MAX_NAME_BYTES = 4096  # bytes of a key or a class name
_LOADED_AT_ONCE = ("classes", "labels", "keys", "digests", "views", "candidates", "checksums", "program")
_MAX_LOADED_BYTES = 2**30  # bytes of each of these: a sparse file of a few kilobytes can be of any size
# h5py raises any of these for an error in HDF5, so a damaged or hostile file may raise them anywhere.
_HDF5_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Structure:
    """The structure of a checked file, and its datasets by name."""

    manifest: Manifest
    dimensions: Dimensions
    columns: dict[str, Column]


def inspect(path: Path, *, finished: bool = True, identified: bool = True, writable: bool = False) -> Structure:
    """Open a file, check its structure against the format and locate its datasets. Reads no rows.

    Raises NotACache, naming the file and the rule that it breaks; CacheIncomplete if the id is still zero;
    CacheDamaged if the id does not match the manifest and checksums. `finished=False` is for a writer that resumes its
    part file, `identified=False` for finding the damage that makes the id wrong, `writable` for `Column.write`.
    """
    try:
        # A part file is written to before its bytes are known to be right, so it must not be a link to another file.
        return _inspect(OpenFile(path, writable=writable, allow_links=finished or not writable), finished, identified)
    except (NotACache, CacheIncomplete, CacheDamaged) as problem:
        raise type(problem)(f"{path}: {problem}") from problem.__cause__
    except FileNotFoundError:
        if is_url(str(path)):  # not repeated: it may contain a password
            raise NotACache("This is an address, not a file. Download it first: tspipe pull URL") from None
        raise NotACache(f"There is no file {path}. Make the cache first: tspipe cache --dataset NAME") from None
    except OSError as problem:
        raise NotACache(f"{path}: cannot be read ({problem.strerror or problem}).") from problem


def _inspect(file: OpenFile, finished: bool, identified: bool) -> Structure:
    status = os.fstat(file.descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise NotACache("it is not a regular file, so not a tspipe cache.")
    check_superblock(file.descriptor, status.st_size)
    columns = _read_structure(file)
    _check_offsets(columns, status.st_size)
    if finished and not any(_bytes(columns, "id", ID_BYTES)):
        raise CacheIncomplete("it is not finished. Run the command that makes it again to resume it.")
    manifest = _bytes(columns, "manifest", MANIFEST_BYTES)
    decoded = decode_manifest(manifest, finished=finished)
    dimensions = _dimensions(decoded, columns)
    _check_shapes(dimensions, columns)
    if finished and identified:
        checksums = [columns[name].load().tobytes() for name in checksum_names(columns)]
        if _bytes(columns, "id", ID_BYTES) != identify(manifest, checksums):
            raise CacheDamaged("its id does not match its manifest and checksums. Get the file again.")
    return Structure(decoded, dimensions, columns)


class _Reader(io.RawIOBase):
    """What h5py needs to read the file that is open, whatever file has its name now."""

    def __init__(self, descriptor: int):
        self.descriptor, self.position = descriptor, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset if whence == os.SEEK_SET else os.fstat(self.descriptor).st_size + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        if os.preadv(self.descriptor, [buffer], self.position) < len(buffer):
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # h5py would use what is in the memory
        return len(buffer)


def _read_structure(file: OpenFile) -> dict[str, Column]:
    try:
        hdf5 = h5py.File(_Reader(file.descriptor), "r", locking=False)
    except (OSError, RuntimeError, ValueError) as problem:
        raise _hdf5_error(problem, "it is truncated or not a valid HDF5 file.") from problem
    with hdf5:
        try:
            _check_attributes(hdf5)
            return _columns(hdf5, file)
        except _HDF5_ERRORS as problem:
            raise _hdf5_error(problem, DAMAGED) from problem


def _hdf5_error(problem: Exception, message: str) -> Exception:
    """Return the error for an exception of h5py: that of the disk, or else that the file is none of the format."""
    number = getattr(problem, "errno", None)
    return OSError(number, os.strerror(number)) if number in (errno.EIO, errno.ESTALE) else NotACache(message)


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


def _columns(hdf5: h5py.File, file: OpenFile) -> dict[str, Column]:
    names: list[bytes] = []
    hdf5.id.links.iterate(names.append)  # names only: following a link would open what it points to
    columns = {}
    for name in names:
        label = _printable(name)
        if names.count(name) > 1:
            raise NotACache(f"it holds {label!r} twice.")
        try:
            columns[label] = _column(hdf5, file, name)
        except _HDF5_ERRORS as problem:
            raise _hdf5_error(problem, f"{label!r} is damaged, or extends beyond the end of the file.") from problem
    return columns


def _printable(name: bytes) -> str:
    return name.decode("ascii", "backslashreplace")[:100]


def _column(hdf5: h5py.File, file: OpenFile, name: bytes) -> Column:
    label = repr(_printable(name))
    if hdf5.id.links.get_info(name).type != h5py.h5l.TYPE_HARD:
        raise NotACache(f"{label} is a soft or external link; only hard links are allowed.")
    dataset = h5py.h5o.open(hdf5.id, name)  # not get_info, which walks the trees of what it is asked about
    if not isinstance(dataset, h5py.h5d.DatasetID):
        raise NotACache(f"{label} is not a dataset.")
    properties = dataset.get_create_plist()
    if properties.get_external_count():
        raise NotACache(f"{label} stores its bytes in another file, which is not allowed.")
    if properties.get_nfilters():
        raise NotACache(f"{label} is filtered (compressed), which is not allowed.")
    if properties.get_layout() != h5py.h5d.CONTIGUOUS:
        raise NotACache(f"{label} is {_LAYOUTS[properties.get_layout()]}; only contiguous datasets are allowed.")
    if h5py.h5a.get_num_attrs(dataset):
        raise NotACache(f"{label} has attributes, which are not allowed.")
    space = dataset.get_space()
    shape = space.get_simple_extent_dims()
    if space.get_simple_extent_type() != h5py.h5s.SIMPLE or space.get_simple_extent_dims(True) != shape:
        raise NotACache(f"{label} has no fixed shape.")
    offset = dataset.get_offset()
    column = Column(file, -1 if offset is None else offset, shape, _dtype(dataset.get_type(), label))
    if offset is None or dataset.get_storage_size() != column.nbytes:
        raise NotACache(f"{label} has storage of the wrong size.")
    return column


def _dtype(kind: Any, label: str) -> np.dtype[Any]:
    """Return the numpy dtype that equals an HDF5 type; big-endian, padded or variable-length types equal none."""
    candidates = ["u1", "<i2", "<i8", "<f2", "<f4"]
    if kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str():
        if kind.get_size() > MAX_NAME_BYTES:
            raise NotACache(
                f"{label} has names of up to {kind.get_size():,} bytes; the format allows {MAX_NAME_BYTES:,}."
            )
        candidates = [f"S{kind.get_size()}"]
    for candidate in candidates:
        if kind.equal(h5py.h5t.py_create(np.dtype(candidate))):
            return np.dtype(candidate)
    raise NotACache(f"{label} has a type that the format does not allow.")


def _check_offsets(columns: dict[str, Column], size: int) -> None:
    before, end = "the HDF5 superblock", SUPERBLOCK_BYTES
    for name, column in sorted(columns.items(), key=lambda item: item[1].offset):
        if column.offset < end:
            raise NotACache(f"{name!r} overlaps {before}.")
        before, end = repr(name), column.offset + column.nbytes
        if end > size:
            raise NotACache(f"{name!r} extends beyond the end of the file.")


def _dimensions(manifest: Manifest, columns: dict[str, Column]) -> Dimensions:
    """Return the sizes in the manifest, with those that only the datasets have."""
    rows = manifest["dataset"]["rows"]
    for name in ("classes", *(f"{split}_keys" for split in rows)):
        _require(columns, name)
    images, weights = columns.get("train_images"), columns.get("teacher_weights")
    if images is not None and manifest["views"] and manifest["preprocess"]["crop"]:
        raise NotACache("its images are cropped, and so cannot be used for its views.")
    program = columns.get("teacher_program")
    if (program is None) != ("program_sha256" not in manifest["teacher"]) or (program and not weights):
        raise NotACache("its teacher's program has no SHA-256 or no weights, or is missing.")
    return Dimensions(
        rows=rows,
        width=manifest["features"]["width"],
        classes=manifest["dataset"]["classes"],
        feature_dtype=manifest["features"]["dtype"],
        block_rows=manifest["block_rows"],
        class_bytes=columns["classes"].dtype.itemsize,
        key_bytes={split: columns[f"{split}_keys"].dtype.itemsize for split in rows},
        weights_bytes=0 if weights is None else weights.nbytes,
        views=manifest["views"] and manifest["views"]["count"],
        image_shape=images.shape[1:] if images is not None and len(images.shape) == 4 else None,
        random_rows=manifest["random"] and manifest["random"]["rows"],
        program_bytes=0 if program is None else program.nbytes,
        balanced="rounds" in (manifest["random"] or {}),
    )


def _check_shapes(dimensions: Dimensions, columns: dict[str, Column]) -> None:
    expected = dimensions.datasets()
    for name in expected:
        _require(columns, name)
    if extra := sorted(columns.keys() - expected.keys()):
        raise NotACache(f"it holds {extra[0]!r}, which is not in the format.")
    for name, (dtype, shape) in expected.items():
        column = columns[name]
        if (column.dtype, column.shape) != (dtype, shape):
            raise NotACache(f"{name!r} is {column.dtype.str} {column.shape}; its manifest says {dtype.str} {shape}.")
        if name.rpartition("_")[2] in _LOADED_AT_ONCE and column.nbytes > _MAX_LOADED_BYTES:
            raise NotACache(f"{name!r} has {column.nbytes:,} bytes; the format allows {_MAX_LOADED_BYTES:,}.")


def _require(columns: dict[str, Column], name: str) -> Column:
    if name not in columns:
        raise NotACache(f"the dataset {name!r} is missing.")
    return columns[name]


def _bytes(columns: dict[str, Column], name: str, length: int) -> bytes:
    """Return the bytes of a dataset that must have this length."""
    column = _require(columns, name)
    if column.nbytes != length:
        raise NotACache(f"{name!r} has {column.nbytes:,} bytes, not {length:,}.")
    return column.load().tobytes()
