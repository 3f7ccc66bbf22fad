"""Restores the original bytes of a damaged cache, and writes no others."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tspipe.cache.inspect import inspect
from tspipe.cache.read import Column, assemble
from tspipe.cache.verify import Damage
from tspipe.cache.write import fingerprint
from tspipe.errors import CacheBusy, CacheError
from tspipe.utils.files import lock, write_at, writing


class Repair:
    """Writes verified bytes into a finished file; a context manager that holds the file's lock.

    Every method first compares the bytes with a checksum, the manifest or the id, and returns whether they match; bytes
    that do not match are not written. So after a kill a file is never more damaged than before.
    """

    def __init__(self, path: Path):
        self.path = path
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack, writing(self.path, CacheError):
            self._stack.enter_context(lock(self.path, CacheBusy))
            structure = inspect(self.path, identified=False)
            self.cache, self._sizes = assemble(self.path, structure, watched=False), structure.dimensions
            self._columns = {name: Column(self.path, region) for name, region in structure.regions.items()}
            self._file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            self._stack.callback(os.close, self._file)
            self._stack.callback(os.fsync, self._file)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def known(self, damage: Damage) -> None:
        """Restore checksums or the id, whose bytes follow from the other rows."""
        assert damage.data is not None
        self._write(damage.dataset, damage.rows.start, damage.data)

    def classes(self, names: Sequence[str]) -> bool:
        """Restore the class names; return whether they match the fingerprint."""
        column = self._columns["classes"]
        data = np.array([name.encode() for name in names], column.dtype)
        described: str = self.cache.manifest["dataset"]["fingerprint"]
        fits = data.shape == column.shape and fingerprint(data.tobytes(), self._columns) == described
        if fits:
            self._write("classes", 0, data.tobytes())
        return fits

    def weights(self, data: bytes) -> bool:
        """Restore the teacher's weights; return whether they match the manifest's SHA-256."""
        expected: str = self.cache.manifest["teacher"]["weights_sha256"]
        fits = len(data) == self._columns["teacher_weights"].nbytes and hashlib.sha256(data).hexdigest() == expected
        if fits:
            self._write("teacher_weights", 0, data)
        return fits

    def block(self, split: str, block: int, columns: Mapping[str, NDArray[Any]]) -> list[str]:
        """Restore these columns of a block; return those that do not match their checksums."""
        images, wrong = self._sizes.block(split, block), []
        stored = self._columns[f"{split}_checksums"][block]
        for i, name in enumerate(self._sizes.columns(split)):
            if name not in columns:
                continue
            data = np.ascontiguousarray(columns[name], self._columns[f"{split}_{name}"].dtype).tobytes()
            if hashlib.sha256(data).digest() == stored[i].tobytes():
                self._write(f"{split}_{name}", self._sizes.column_rows(split, name, images).start, data)
            else:
                wrong.append(name)
        return wrong

    def _write(self, name: str, row: int, data: bytes) -> None:
        column = self._columns[name]
        write_at(self._file, data, column.offset + row * column.row_bytes)
