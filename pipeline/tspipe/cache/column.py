"""The datasets of a cache as array-likes, read by offset through one descriptor, without HDF5 and without torch."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import ArrayLike, NDArray

from tspipe.errors import CacheDamaged, CacheError
from tspipe.utils.files import open_without_links, write_at

_AHEAD = getattr(os, "posix_fadvise", None)  # absent on macOS, where the system decides about reading ahead
_PAGE, _SPAN = 4096, 2**26  # bytes; the largest range read at once to select rows from
_PIECE = 2**20  # bytes that a loop over a column holds


class OpenFile:
    """A file that is opened once, so that what was checked is what is read, even if another file takes its name.

    Pickling drops the descriptor: another process opens the path again, and raises CacheError if the file is another.
    """

    def __init__(self, path: Path, *, writable: bool = False, allow_links: bool = True):
        self.path = path.absolute()  # it may be opened later from another working directory
        self.writable, self.allow_links = writable, allow_links
        self._descriptor: int | None = self._open()
        self._stamp = self._read_stamp()

    @property
    def descriptor(self) -> int:
        """The descriptor of this process; a fork inherits it, since reads by offset share no position."""
        if self._descriptor is None:
            try:
                self._descriptor = self._open()
            except OSError as problem:
                raise self.unreadable(problem) from problem
            self.check_unchanged()
        return self._descriptor

    def unreadable(self, problem: OSError) -> CacheError:
        """Return the error of a failed read."""
        return CacheError(f"{self.path} can no longer be read ({problem.strerror}). Check the disk, then run it again.")

    def check_unchanged(self) -> None:
        """Raise CacheError if the file was written to, or is another one, since it was opened first."""
        if not self.writable and self._read_stamp() != self._stamp:
            raise CacheError(f"{self.path} was replaced while it was in use. Run the command again.")

    def sync(self) -> None:
        """Flush everything written to the disk."""
        os.fsync(self.descriptor)

    def _open(self) -> int:
        access = os.O_RDWR if self.writable else os.O_RDONLY
        if self.allow_links:
            return os.open(self.path, access | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe does not wait
        return open_without_links(self.path, access)

    def _read_stamp(self) -> tuple[int, int, int]:
        """Return what changes when a file is replaced or written to: inode, size, modification time (ns)."""
        status = os.fstat(self.descriptor)
        return status.st_ino, status.st_size, status.st_mtime_ns

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self.descriptor)


class Column(NDArrayOperatorsMixin, Sequence[Any]):
    """One dataset of the file as an array-like: `column[i]`, `column[3:7]`, `column[[5, 2]]`, `numpy.asarray(column)`.

    NumPy's functions and arithmetic load it: `np.mean(column, axis=0)`, `column - column.load().max()`. It is cheap to
    pickle and works in data-loader workers, however they are started. Rows are copies.
    """

    __hash__ = object.__hash__  # `==` compares element by element, as an array's does

    def __init__(self, file: OpenFile, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]):
        self.file, self.offset, self.shape, self.dtype = file, offset, shape, dtype
        self.row_shape = shape[1:]
        self.row_bytes = dtype.itemsize * math.prod(self.row_shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """The size of the column in bytes; Python integers do not overflow, whatever the shape."""
        return self.shape[0] * self.row_bytes

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
        if copy is False:
            raise ValueError("A column is read from a file, which always makes a copy.")
        return np.asarray(self.load(), dtype=dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = [value.load() if isinstance(value, Column) else value for value in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    def __repr__(self) -> str:
        return f"<Column {self.shape} {self.dtype} of {self.file.path.name}>"

    def load(self) -> NDArray[Any]:
        """Read all rows at once."""
        return self._contiguous(0, len(self))

    def pieces(self, start: int = 0, stop: int | None = None, step: int = 1) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield every `step`-th row in pieces of about 1 MiB, each with the index of its first row."""
        stop, stride = len(self) if stop is None else stop, step * max(1, _PIECE // max(1, self.row_bytes))
        for first in range(start, stop, stride):
            yield first, self[first : min(first + stride, stop) : step]

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
        descriptor, size = self.file.descriptor, self.row_bytes
        offsets = (rows.astype(np.int64, copy=False) * size + self.offset).tolist()
        try:  # pread is twice as fast as preadv, including the copy
            joined = bytearray().join([os.pread(descriptor, size, offset) for offset in offsets])
        except OSError as problem:
            raise self.file.unreadable(problem) from problem
        if len(joined) != len(rows) * size:  # some reads were short
            return np.concatenate([self._contiguous(row, row + 1) for row in rows.tolist()])
        self.file.check_unchanged()
        return np.frombuffer(joined, self.dtype).reshape(len(rows), *self.row_shape)

    def advise(self, rows: NDArray[np.integer[Any]]) -> None:
        """Announce to the system that these rows are needed soon, so that it reads them in the background."""
        if _AHEAD is None:
            return
        descriptor, span = self.file.descriptor, _ends(rows)
        for first, stop in [span] if self._dense(*span, len(rows)) else [(row, row + 1) for row in rows.tolist()]:
            offset, count = self.offset + first * self.row_bytes, (stop - first) * self.row_bytes
            _AHEAD(descriptor, offset, count, os.POSIX_FADV_WILLNEED)

    def write(self, row: int, data: bytes) -> None:
        """Write bytes from the start of a row on; the file must have been opened as writable."""
        write_at(self.file.descriptor, data, self.offset + row * self.row_bytes)

    def _dense(self, first: int, stop: int, count: int) -> bool:
        """Return whether rows are on average less than a page apart, so that every page is read anyway."""
        return (stop - first) * self.row_bytes <= min(_PAGE * count, _SPAN)

    def _contiguous(self, start: int, stop: int) -> NDArray[Any]:
        out = np.empty((stop - start, *self.row_shape), self.dtype)
        buffer = memoryview(out.view(np.uint8).reshape(-1).data) if out.size else memoryview(b"")
        offset = self.offset + start * self.row_bytes
        while buffer:
            try:
                done = os.preadv(self.file.descriptor, [buffer], offset)
            except OSError as problem:
                raise self.file.unreadable(problem) from problem
            if done == 0:
                raise CacheDamaged(f"{self.file.path} was truncated while it was read. Get the file again.")
            buffer, offset = buffer[done:], offset + done
        self.file.check_unchanged()
        return out


def _ends(rows: NDArray[np.integer[Any]]) -> tuple[int, int]:
    """Return the first of these rows and the one after the last."""
    return (int(rows.min()), int(rows.max()) + 1) if rows.size else (0, 0)
