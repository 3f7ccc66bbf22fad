"""Writes a feature cache so that a kill at any moment loses no complete block.

h5py makes the skeleton of `NAME.h5.part` and closes it. Rows are then written by `os.pwrite` at their offsets, each
block followed by its checksum. A later writer reads the checksums and resumes. Finally come the manifest, the id, an
fsync and the rename, so the final name never refers to an unfinished file.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from tspipe.cache.inspect import Structure, checksum_names, identify, inspect
from tspipe.cache.layout import FORMAT, SPLITS, VERSION, Dimensions
from tspipe.cache.manifest import Manifest, as_plan, decode_manifest, differing_fields, encode_manifest
from tspipe.cache.read import Column, Split, split_columns
from tspipe.errors import CacheBusy, CacheError, CacheMismatch
from tspipe.utils.files import lock, sync_folder, write_at, writing


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
    ):
        self.path, self.plan, self.dimensions, self.rank = path, plan, dimensions, rank
        self.part = path.with_name(path.name + (f".part-{rank}" if rank else ".part"))
        self._classes, self._weights = classes, weights
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._stack, writing(self.part, CacheError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.rank:
                self._stack.enter_context(lock(self.path, CacheBusy))
            if self.rank or not self.part.exists():
                self._create()
            structure = inspect(self.part, finished=False)
            self._check_plan(structure)
            self._file = os.open(self.part, os.O_RDWR | os.O_CLOEXEC)
            self._stack.callback(os.close, self._file)
            self._offsets = {name: region.offset for name, region in structure.regions.items()}
            self._columns = {name: Column(self.part, region) for name, region in structure.regions.items()}
            if not self.rank:  # on every start, in case of a kill between the skeleton and this point
                names = [name.encode() for name in self._classes]
                self._write("classes", 0, np.array(names, f"S{self.dimensions.class_bytes}").tobytes())
                if self._weights:
                    self._write("teacher_weights", 0, self._weights)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def missing(self, split: str) -> list[int]:
        """Return the blocks to compute: those without a checksum or, after a crash of the machine, with a wrong one."""
        stored = self._columns[f"{split}_checksums"].load()
        return [
            block
            for block in range(self.dimensions.blocks(split))
            if not stored[block].any()
            or stored[block].tobytes() != block_checksums(self._columns, self.dimensions, split, block)
        ]

    def written(self, split: str) -> NDArray[np.int64]:
        """Return the images of a split (or the `random` pool) whose block has a checksum, (n,) int64."""
        stored = self._columns[f"{split}_checksums"].load().any(axis=(1, 2))
        return np.flatnonzero(np.repeat(stored, self.dimensions.block_rows)[: self.dimensions.images(split)])

    def split(self, split: str) -> Split:
        """Return a split of the part file; rows not yet written are zero."""
        return split_columns(self._columns, split)

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
                self._write(f"{split}_{column}", rows.start * dataset.row_bytes, raw)
            self._write(f"{split}_checksums", block * len(checksums), checksums)

    def sync(self) -> None:
        """Flush everything written to the disk."""
        with writing(self.part, CacheError):
            os.fsync(self._file)

    def finish(self) -> str:
        """Complete the manifest, write the id, and rename the file; return the id (64 hex digits).

        Raises CacheError if a block is missing.
        """
        if left := sum(len(self.missing(split)) for split in self.dimensions.sections):
            raise CacheError(f"{self.part} lacks {left} blocks. Run the same command again.")
        classes = self._columns["classes"].load().tobytes()
        manifest = {
            **self.plan,
            "dataset": {**self.plan["dataset"], "fingerprint": fingerprint(classes, self._columns)},
            "teacher": {
                **self.plan["teacher"],
                "correct": {s: correct(self._columns, self.dimensions, s) for s in SPLITS},
            },
        }
        encoded = encode_manifest(manifest)
        identity = identify(encoded, [self._columns[n].load().tobytes() for n in checksum_names(self._columns)])
        with writing(self.part, CacheError):
            self._write("manifest", 0, encoded)
            os.fsync(self._file)
            self._write("id", 0, identity)
            os.fsync(self._file)
            self.part.replace(self.path)
            sync_folder(self.path.parent)
        return identity.decode("ascii")

    def _create(self) -> None:
        """Make the part file's skeleton under another name, so that a part file is always complete."""
        plan = encode_manifest(self.plan)
        decode_manifest(plan, finished=False)  # readers refuse a plan that breaks the schema
        skeleton = self.part.with_name(self.part.name + ".skeleton")
        # h5py crashes if a write fails, so the space is reserved before h5py writes.
        size = sum(np.dtype(d).itemsize * int(np.prod(s)) for d, s in self.dimensions.datasets().values())
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(skeleton.unlink, missing_ok=True)
            _reserve(skeleton, size + 2**20, sparse=self.rank > 0)
            write_skeleton(skeleton, self.dimensions)
            _reserve(skeleton, skeleton.stat().st_size, sparse=self.rank > 0)
            with h5py.File(skeleton, "r", locking=False) as hdf5:
                offset = hdf5["manifest"].id.get_offset()
            with skeleton.open("r+b") as file:
                os.pwrite(file.fileno(), plan, offset)
                os.fsync(file.fileno())
            skeleton.replace(self.part)

    def _check_plan(self, structure: Structure) -> None:
        # After a kill at the very end, the manifest is complete and the id is missing.
        differences = list(differing(as_plan(structure.manifest), self.plan))
        if structure.dimensions != self.dimensions and not differences:
            differences = ["it has other columns, or lengths of class names, keys or weights"]
        if differences:
            raise CacheMismatch(
                f"{self.part} was begun with another plan: {'; '.join(differences[:3])}. "
                "Use the same settings to resume it, or delete it to start again."
            )

    def _write(self, name: str, start: int, data: bytes) -> None:
        write_at(self._file, data, self._offsets[name] + start)


def write_skeleton(path: Path, dimensions: Dimensions) -> None:
    """Create a version-1 file with every dataset allocated and empty."""
    # Datasets begin on page boundaries. No times are recorded, so the bytes are reproducible.
    with h5py.File(
        path, "w", locking=False, alignment_threshold=4096, alignment_interval=4096, meta_block_size=131072
    ) as file:
        file.attrs.create("format", np.bytes_(FORMAT))
        file.attrs.create("version", np.int64(VERSION), dtype="<i8")
        for name, (dtype, shape) in dimensions.datasets().items():
            plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plan.set_layout(h5py.h5d.CONTIGUOUS)
            plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            plan.set_obj_track_times(False)
            h5py.h5d.create(
                file.id, name.encode("ascii"), h5py.h5t.py_create(dtype), h5py.h5s.create_simple(shape), plan
            )


def block_checksums(columns: Mapping[str, Column], dimensions: Dimensions, split: str, block: int) -> bytes:
    """Return the SHA-256 of each column of a block, as stored, in the order of `dimensions.columns`."""
    images = dimensions.block(split, block)
    names = dimensions.columns(split)
    parts = (columns[f"{split}_{name}"][dimensions.column_rows(split, name, images)] for name in names)
    return b"".join(hashlib.sha256(part).digest() for part in parts)


def fingerprint(classes: bytes, columns: Mapping[str, Column]) -> str:
    """Return a dataset's identity: hex SHA-256 over classes, then labels ‖ keys ‖ digests of train, then of test."""
    digest = hashlib.sha256(classes)
    for split in SPLITS:
        for column in ("labels", "keys", "digests"):
            digest.update(columns[f"{split}_{column}"].load().tobytes())
    return digest.hexdigest()


def correct(columns: Mapping[str, Column], dimensions: Dimensions, split: str) -> int:
    """Return the teacher's number of correct predictions on a split, on the first, plain view of each image."""
    logits = columns[f"{split}_logits"].load()[:: dimensions.views_of(split)]
    return int((logits.argmax(axis=1) == columns[f"{split}_labels"].load()).sum())


def differing(stored: Any, given: Any) -> Iterator[str]:
    """Yield the fields in which two manifests differ, as phrases."""
    for where, one, two in differing_fields(stored, given):
        yield f"{where} is {_stated(one)} there and {_stated(two)} here"


def _stated(value: Any) -> str:
    """Return a field's value as text; a section as its fields."""
    return ", ".join(f"{key} {v}" for key, v in value.items()) if isinstance(value, dict) else repr(value)


def _reserve(path: Path, size: int, *, sparse: bool) -> None:
    """Allocate a file's bytes on the disk now, so that a full disk is detected before the teacher runs.

    A sparse file only gets its size and space for HDF5's own data; a full disk is detected when rows are written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if sparse:
            os.ftruncate(descriptor, size)
            size = min(size, 2**20)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:  # macOS: rewrite existing bytes, and zeros beyond
            for start in range(0, size, 2**24):
                length = min(2**24, size - start)
                os.pwrite(descriptor, os.pread(descriptor, length, start).ljust(length, b"\0"), start)
    finally:
        os.close(descriptor)
