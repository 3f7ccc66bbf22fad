"""Restores the original bytes of a damaged cache, and writes no others."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tspipe.cache.checksums import fingerprint
from tspipe.cache.inspect import inspect
from tspipe.cache.read import assemble
from tspipe.cache.verify import Damage
from tspipe.errors import CacheBusy, CacheError
from tspipe.utils.files import lock, writing


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
            structure = inspect(self.path, identified=False, writable=True)
            self.cache, self._columns = assemble(structure), structure.columns
            self._stack.callback(self._columns["id"].file.sync)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def known(self, damage: Damage) -> None:
        """Restore checksums or the id, whose bytes follow from the other rows."""
        assert damage.data is not None
        self._columns[damage.dataset].write(damage.rows.start, damage.data)

    def classes(self, names: Sequence[str]) -> bool:
        """Restore the class names; return whether they match the fingerprint."""
        column = self._columns["classes"]
        data = np.array([name.encode() for name in names], column.dtype)
        described: str = self.cache.manifest["dataset"]["fingerprint"]
        fits = data.shape == column.shape and fingerprint(data.tobytes(), self._columns) == described
        if fits:
            column.write(0, data.tobytes())
        return fits

    def weights(self, data: bytes) -> bool:
        """Restore the teacher's weights; return whether they match the manifest's SHA-256."""
        column, expected = self._columns["teacher_weights"], self.cache.manifest["teacher"]["weights_sha256"]
        fits: bool = len(data) == column.nbytes and hashlib.sha256(data).hexdigest() == expected
        if fits:
            column.write(0, data)
        return fits

    def block(self, split: str, block: int, columns: Mapping[str, NDArray[Any]]) -> list[str]:
        """Restore these columns of a block; return those that do not match their checksums."""
        sizes, wrong = self.cache.dimensions, []
        stored = self._columns[f"{split}_checksums"][block]
        for i, name in enumerate(sizes.columns(split)):
            if name not in columns:
                continue
            column = self._columns[f"{split}_{name}"]
            data = np.ascontiguousarray(columns[name], column.dtype).tobytes()
            if hashlib.sha256(data).digest() == stored[i].tobytes():
                column.write(sizes.column_rows(split, name, sizes.block(split, block)).start, data)
            else:
                wrong.append(name)
        return wrong
