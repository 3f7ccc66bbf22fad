"""Writes a feature cache so that a kill at any moment loses no complete block.

h5py makes the skeleton of `NAME.h5.part` and closes it. Rows are then written by `os.pwrite` at their offsets, each
block followed by its checksum. A later writer reads the checksums and resumes. Finally come the manifest, the id, an
fsync and the rename, so the final name never refers to an unfinished file.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tspipe.cache.checksums import block_checksums, checksum_names, count_correct, fingerprint, identify
from tspipe.cache.inspect import MAX_NAME_BYTES, Structure, inspect
from tspipe.cache.layout import SPLITS, Dimensions
from tspipe.cache.manifest import (
    Manifest,
    as_plan,
    decode_manifest,
    describe_differences,
    encode_manifest,
    without_rows,
)
from tspipe.cache.read import Split
from tspipe.cache.skeleton import write_skeleton
from tspipe.errors import CacheBusy, CacheError, CacheMismatch
from tspipe.utils.files import check_lock, lock, new_file, sync_folder, writing


class CacheWriter:
    """Writes one cache, or resumes one; a context manager.

        with CacheWriter(path, plan, dimensions, classes, weights) as writer:
            for split in dimensions.sections:
                for block in writer.missing(split):
                    writer.write_block(split, block, {"features": …, "logits": …, …})
            writer.finish()

    `plan` is the manifest with null for `dataset.fingerprint` and `teacher.correct`, which `finish` fills in.
    Raises CacheBusy if another process writes the same cache, CacheMismatch if a part file has another plan, CacheError
    if the disk refuses a write; the part file stays usable in every case.

    Of several processes, that of `rank` 0 writes the cache. The others each write some blocks into a sparse part file
    of their own, always begun anew, which `absorb` (in merge.py) takes in.
    """

    def __init__(
        self,
        path: Path,
        plan: Manifest,
        dimensions: Dimensions,
        classes: Sequence[str],
        weights: bytes = b"",
        rank: int = 0,
        program: bytes = b"",
    ):
        self.path, self.plan, self.dimensions, self._rank = path, plan, dimensions, rank
        self.part = path.with_name(path.name + (f".part-{rank}" if rank else ".part"))
        names = np.array([name.encode() for name in classes], f"S{dimensions.class_bytes}")
        self._constants = {"classes": names.tobytes(), "teacher_weights": weights, "teacher_program": program}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._stack, writing(self.part, CacheError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._rank:
                self._stack.enter_context(lock(self.path, CacheBusy))
            if not self._rank and self.part.exists() and self._has_other_rows(inspect(self.part, finished=False)):
                self.part.replace(self.part.with_name(f"{self.part.name}-0"))  # its unchanged blocks are absorbed
            if self._rank or not self.part.exists():
                plan = encode_manifest(self.plan)
                decode_manifest(plan, finished=False)  # readers refuse a plan that is not valid
                self._check_names()
                with new_file(self.part) as file:
                    write_skeleton(file.fileno(), self.dimensions, plan, sparse=self._rank > 0)
            structure = inspect(self.part, finished=False, writable=True)
            self._check_plan(structure)
            self._columns = structure.columns
            if not self._rank:  # on every start, in case of a kill between the skeleton and this point
                for name, data in self._constants.items():
                    if data:
                        self._columns[name].write(0, data)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def missing(self, split: str) -> list[int]:
        """Return the blocks to compute: those without a checksum or, after a crash of the machine, with a wrong one."""
        stored = self._columns[f"{split}_checksums"].load()
        return [
            block
            for block, sums in enumerate(stored)
            if not sums.any() or sums.tobytes() != block_checksums(self._columns, self.dimensions, split, block)
        ]

    def written(self, split: str) -> NDArray[np.int64]:
        """Return the images of a split (or the `random` pool) whose block has a checksum, (n,) int64."""
        stored = self._columns[f"{split}_checksums"].load().any(axis=(1, 2))
        return np.flatnonzero(np.repeat(stored, self.dimensions.block_rows)[: self.dimensions.images(split)])

    def split(self, split: str) -> Split:
        """Return a split of the part file; rows not yet written are zero."""
        return Split.of(self._columns, split)

    def write_block(self, split: str, block: int, columns: Mapping[str, NDArray[Any]]) -> None:
        """Write one block's rows, column by column, then their checksums.

        Arrays hold the rows of `dimensions.block(split, block)` in the column's shape; they are cast to its dtype.
        """
        images = self.dimensions.block(split, block)
        checksums = b""
        with writing(self.part, CacheError):
            for column in self.dimensions.columns(split):
                data, rows = columns[column], self.dimensions.column_rows(split, column, images)
                dataset = self._columns[f"{split}_{column}"]
                if data.shape != (rows.stop - rows.start, *dataset.row_shape):
                    raise ValueError(f"{split}_{column}: {data.shape} for {rows} of {dataset.shape}")
                raw = np.ascontiguousarray(data, dataset.dtype).tobytes()
                checksums += hashlib.sha256(raw).digest()
                dataset.write(rows.start, raw)
            self._columns[f"{split}_checksums"].write(block, checksums)

    def sync(self) -> None:
        """Flush everything written to the disk."""
        with writing(self.part, CacheError):
            self._columns["id"].file.sync()

    def finish(self) -> str:
        """Complete the manifest, write the id, and rename the file; return the id (64 hex digits).

        Raises CacheError if a block is missing.
        """
        if left := sum(len(self.missing(split)) for split in self.dimensions.sections):
            raise CacheError(f"{self.part} lacks {left} blocks. Run the same command again.")
        classes = self._columns["classes"].load().tobytes()
        correct = {split: count_correct(self._columns, self.dimensions, split) for split in SPLITS}
        manifest = {
            **self.plan,
            "dataset": self.plan["dataset"] | {"fingerprint": fingerprint(classes, self._columns)},
            "teacher": self.plan["teacher"] | {"correct": correct},
        }
        encoded = encode_manifest(manifest)
        identity = identify(encoded, [self._columns[n].load().tobytes() for n in checksum_names(self._columns)])
        with writing(self.part, CacheError):
            for column, data in ((self._columns["manifest"], encoded), (self._columns["id"], identity)):
                column.write(0, data)
                column.file.sync()  # each is on the disk before the next step
            check_lock(self.path, CacheError, self.part)  # else the part file may be another process's
            self.part.replace(self.path)
            sync_folder(self.path.parent)
        return identity.decode("ascii")

    def _check_names(self) -> None:
        lengths = {**self.dimensions.key_bytes, "classes": self.dimensions.class_bytes}
        for what, length in lengths.items():
            if length > MAX_NAME_BYTES:
                names = "the names of classes" if what == "classes" else f"the keys of {what} images"
                raise CacheError(
                    f"{self.path}: {names} have up to {length:,} bytes; "
                    f"the format allows {MAX_NAME_BYTES:,}. Shorten them."
                )

    def _has_other_rows(self, structure: Structure) -> bool:
        """Return whether a part file has another number of images, and otherwise the same plan."""
        plan = as_plan(structure.manifest)
        return plan != self.plan and without_rows(plan) == without_rows(self.plan)

    def _check_plan(self, structure: Structure) -> None:
        # After a kill at the very end, the manifest is complete and the id is missing.
        differences = describe_differences(as_plan(structure.manifest), self.plan)
        if structure.dimensions != self.dimensions and not differences:
            differences = "it has other columns, or lengths of class names, keys or weights"
        if differences:
            raise CacheMismatch(
                f"{self.part} was begun with another plan: {differences}. "
                "Use the same settings to resume it, or delete it to start again."
            )
