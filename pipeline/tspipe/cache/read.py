"""Reads a feature cache: columns by offset, without HDF5 and without torch."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tspipe.cache.inspect import Region, Structure, inspect
from tspipe.cache.layout import SPLITS, Dimensions
from tspipe.cache.manifest import Manifest
from tspipe.errors import CacheDamaged, CacheError

_AHEAD = getattr(os, "posix_fadvise", None)  # absent on macOS, where the system decides about reading ahead
_PAGE, _SPAN = 4096, 2**26  # bytes; the largest range read at once to select rows from

Stamp = tuple[int, int, int]


def _stamp(status: os.stat_result) -> Stamp:
    """Return what changes when a file is replaced or written to: inode, size, modification time (ns)."""
    return status.st_ino, status.st_size, status.st_mtime_ns


class Column(Sequence[Any]):
    """One dataset of the file as an array-like: `column[i]`, `column[3:7]`, `column[[5, 2]]`, `numpy.asarray(column)`.

    It holds (path, offset, shape, dtype) and a stamp that detects a replaced file. It opens the file on first use in
    each process, so it is cheap to pickle and works in data-loader workers, however they are started. Rows are copies.
    """

    def __init__(self, path: Path, region: Region, stamp: Stamp | None = None):
        self.path, self.offset, self.shape, self.dtype = path, region.offset, region.shape, region.dtype
        self.row_shape = self.shape[1:]
        self.row_bytes = region.nbytes // max(1, self.shape[0])
        self._stamp = stamp
        self._file: tuple[int, int] | None = None  # (process, descriptor)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """The size of the column in bytes."""
        return len(self) * self.row_bytes

    def __getitem__(self, index: int | slice | ArrayLike) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._contiguous(start, max(start, stop))
            return self.take(np.arange(start, stop, step))
        if isinstance(index, int | np.integer):  # not SupportsIndex: arrays have __index__ too
            return self.take(np.array([index]))[0]
        rows = np.asarray(index)
        return self.take(rows if rows.size else rows.astype(np.int64))  # numpy reads [] as floats

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.load(), dtype=dtype)

    def load(self) -> NDArray[Any]:
        """Read all rows at once."""
        return self._contiguous(0, len(self))

    def take(self, rows: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Return the rows with these indices (n,), in this order; negative indices count from the end.

        Each row is read separately, unless they are so dense that reading the whole range is faster.
        """
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        if rows.ndim == 1 and len(rows) and rows.min() < 0:
            rows = np.where(rows < 0, rows + len(self), rows)
        first, stop = _ends(rows)
        if rows.ndim != 1 or first < 0 or stop > len(self):
            raise IndexError(f"row indices must be one-dimensional and below {len(self)}")
        if self._dense(first, stop, len(rows)):
            return np.take(self._contiguous(first, stop), rows - first, axis=0)
        descriptor, size = self._descriptor(), self.row_bytes
        offsets = (rows.astype(np.int64, copy=False) * size + self.offset).tolist()
        # pread is twice as fast as preadv, including the copy.
        joined = bytearray().join([os.pread(descriptor, size, offset) for offset in offsets])
        if len(joined) == len(rows) * size:
            return np.frombuffer(joined, self.dtype).reshape(len(rows), *self.row_shape)
        out = np.empty((len(rows), *self.row_shape), self.dtype)
        for i, offset in enumerate(offsets):  # some reads were short
            self._read(descriptor, _buffer(out[i]), offset)
        return out

    def advise(self, rows: NDArray[np.integer[Any]]) -> None:
        """Announce to the system that these rows are needed soon, so that it reads them in the background."""
        if _AHEAD is None:
            return
        descriptor, span = self._descriptor(), _ends(rows)
        for first, stop in [span] if self._dense(*span, len(rows)) else [(row, row + 1) for row in rows.tolist()]:
            offset, count = self.offset + first * self.row_bytes, (stop - first) * self.row_bytes
            _AHEAD(descriptor, offset, count, os.POSIX_FADV_WILLNEED)

    def _dense(self, first: int, stop: int, count: int) -> bool:
        """Return whether rows are on average less than a page apart, so that every page is read anyway."""
        return (stop - first) * self.row_bytes <= min(_PAGE * count, _SPAN)

    def _contiguous(self, start: int, stop: int) -> NDArray[Any]:
        out = np.empty((stop - start, *self.row_shape), self.dtype)
        if out.size:
            self._read(self._descriptor(), _buffer(out), self.offset + start * self.row_bytes)
        return out

    def _read(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        while buffer:
            done = os.preadv(descriptor, [buffer], offset)
            if done == 0:
                raise CacheDamaged(f"{self.path} was truncated while it was read. Get the file again.")
            buffer, offset = buffer[done:], offset + done

    def _descriptor(self) -> int:
        if self._file is None or self._file[0] != os.getpid():
            try:
                self._file = os.getpid(), os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as problem:
                raise CacheError(f"{self.path} can no longer be read ({problem.strerror}).") from problem
            if self._stamp is not None and _stamp(os.fstat(self._file[1])) != self._stamp:
                raise CacheError(f"{self.path} was replaced while it was in use. Run the command again.")
        return self._file[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None and file[0] == os.getpid():
            os.close(file[1])


def _ends(rows: NDArray[np.integer[Any]]) -> tuple[int, int]:
    """Return the first of these rows and the one after the last."""
    return (int(rows.min()), int(rows.max()) + 1) if rows.size else (0, 0)


@dataclass(frozen=True)
class Split:
    """The columns of a split: n images, V views of each (1 in `test`), and a row of features and logits per view."""

    features: Column  # (n·V, d) float16 or float32
    logits: Column  # (n·V, c) float32
    labels: NDArray[np.int64]  # (n,), checked to be valid classes
    keys: Column  # (n,) bytes
    digests: Column  # (n, 8) uint8
    checksums: Column  # (blocks, columns, 32) uint8
    views: Column | None = None  # (n·V, 3) int16: dy, dx, flip
    images: Column | None = None  # (n, H, W, C) uint8

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Pool:
    """The columns of the random pool: P random images, whose pixels are drawn again from the manifest."""

    features: Column  # (P, d) float16 or float32
    logits: Column  # (P, c) float32
    checksums: Column  # (blocks, 2, 32) uint8

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Cache:
    """An open cache: its manifest and its columns."""

    path: Path
    id: str  # 64 hex digits
    manifest: Manifest
    dimensions: Dimensions
    classes: list[str]
    train: Split
    test: Split
    random: Pool | None = None
    _weights: Column | None = None
    identified: bool = True  # opening checks the id

    @property
    def name(self) -> str:
        """The file name."""
        return self.path.name

    @property
    def size(self) -> int:
        """The file size in bytes."""
        return self.path.stat().st_size

    def split(self, name: str) -> Split:
        """Return the split `train` or `test`."""
        return self.train if name == "train" else self.test

    @property
    def has_images(self) -> bool:
        """Whether the file contains the images' pixels, so that training needs no dataset."""
        return self.train.images is not None and self.test.images is not None

    @property
    def has_teacher(self) -> bool:
        """Whether the file contains the teacher's weights."""
        return self._weights is not None

    def teacher_weights(self) -> bytes:
        """Return the teacher's weights as safetensors bytes, checked against the manifest's SHA-256."""
        if self._weights is None:
            raise CacheError(
                f"{self.path.name} does not carry its teacher, so nothing can label random images. "
                "Train without them: --random-images 0"
            )
        data = self._weights.load().tobytes()
        if hashlib.sha256(data).hexdigest() != self.manifest["teacher"]["weights_sha256"]:
            raise CacheDamaged(f"{self.path}: the teacher's weights are not those of the manifest. Get the file again.")
        return data


def open_cache(path: str | os.PathLike[str]) -> Cache:
    """Open and check a finished cache. Reads the manifest, the checksums, the classes and the labels, no other rows.

    Raises NotACache, CacheIncomplete or CacheDamaged.
    """
    path = Path(path)
    cache = assemble(path, inspect(path))
    for split in SPLITS:
        labels = cache.split(split).labels
        if not (labels.min() >= 0 and labels.max() < len(cache.classes)):
            raise CacheDamaged(f"{path}: {split}_labels has labels outside its {len(cache.classes)} classes.")
    return cache


def assemble(path: Path, structure: Structure, *, watched: bool = True) -> Cache:
    """Return a Cache of this structure, without checking labels; `watched` refuses to read once the file changes."""
    path = path.absolute()  # columns open it later, perhaps from another working directory
    stamp = _stamp(path.stat()) if watched else None
    columns = {name: Column(path, region, stamp) for name, region in structure.regions.items()}
    splits = {split: split_columns(columns, split) for split in SPLITS}
    return Cache(
        path=path,
        id=columns["id"].load().tobytes().decode("ascii"),
        manifest=structure.manifest,
        dimensions=structure.dimensions,
        classes=[name.decode("utf-8", "replace") for name in columns["classes"].load().tolist()],
        train=splits["train"],
        test=splits["test"],
        random=_pool(columns),
        _weights=columns.get("teacher_weights"),
    )


def split_columns(columns: dict[str, Column], split: str) -> Split:
    """Return a split's columns, selected by name."""
    own = {name.removeprefix(f"{split}_"): column for name, column in columns.items() if name.startswith(f"{split}_")}
    return Split(labels=own.pop("labels").load(), **own)


def _pool(columns: dict[str, Column]) -> Pool | None:
    names = [f"random_{column}" for column in ("features", "logits", "checksums")]
    return Pool(*(columns[name] for name in names)) if names[0] in columns else None


def _buffer(array: NDArray[Any]) -> memoryview:
    """Return an array's memory, to read into."""
    return memoryview(array.view(np.uint8).reshape(-1).data) if array.size else memoryview(b"")
