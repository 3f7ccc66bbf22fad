"""Putting back the bytes a damaged cache was written with, and no others."""

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
    """Writes into a finished file what is proven to be its own; a context manager that holds the file's lock.

    Every method compares what it is given with a checksum, the manifest or the id first, and says whether it fits;
    what does not fit is not written. So a kill leaves a file that is less damaged or as damaged as before.
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
        """Checksums and the id, which the other rows tell."""
        assert damage.data is not None
        self._write(damage.dataset, damage.rows.start, damage.data)

    def classes(self, names: Sequence[str]) -> bool:
        """The class names; checked against the fingerprint, which covers them."""
        column = self._columns["classes"]
        data = np.array([name.encode() for name in names], column.dtype)
        described: str = self.cache.manifest["dataset"]["fingerprint"]
        fits = data.shape == column.shape and fingerprint(data.tobytes(), self._columns) == described
        if fits:
            self._write("classes", 0, data.tobytes())
        return fits

    def weights(self, data: bytes) -> bool:
        """The teacher's weights; checked against the manifest's SHA-256."""
        there: str = self.cache.manifest["teacher"]["weights_sha256"]
        fits = len(data) == self._columns["teacher_weights"].nbytes and hashlib.sha256(data).hexdigest() == there
        if fits:
            self._write("teacher_weights", 0, data)
        return fits

    def block(self, split: str, block: int, columns: Mapping[str, NDArray[Any]]) -> list[str]:
        """These columns of a block; gives those that are not what was written."""
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
