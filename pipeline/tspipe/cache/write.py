"""Writing a feature cache so that a kill at any moment loses no block that was written.

h5py makes the skeleton of `NAME.h5.part` and closes it; rows then go in by `os.pwrite` at the offsets noted, and
after each block its checksum. A writer that comes later reads the checksums and goes on. At the end come the
manifest, the id, an fsync and the rename: the final name never shows an unfinished file.
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
from tspipe.cache.layout import (
    FORMAT,
    SPLITS,
    VERSION,
    Dimensions,
    Manifest,
    as_plan,
    decode_manifest,
    differing_fields,
    encode_manifest,
)
from tspipe.cache.read import Column, Split, split_columns
from tspipe.errors import CacheBusy, CacheError, CacheMismatch
from tspipe.utils.files import lock, sync_folder, write_at, writing


class CacheWriter:
    """Writes one cache, or goes on with one that was begun; a context manager.

        with CacheWriter(path, plan, dimensions, classes, weights) as writer:
            for split in dimensions.sections:
                for block in writer.missing(split):
                    writer.write_block(split, block, {"features": …, "logits": …, …})
            writer.finish()

    `plan` is the manifest with null for `dataset.fingerprint` and `teacher.correct`, which `finish` fills in.
    Raises CacheBusy when another process writes the same name, CacheMismatch when a part file was begun with
    another plan, CacheError when the disk does not take it; the part file stays usable in every case.

    Of several processes, that of `rank` 0 writes the cache. The others each write some blocks into a sparse part file
    of their own, always begun anew, which `absorb` (in join.py) takes in.
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
            if not self.rank:  # again on every start, and so also after a kill between the skeleton and here
                names = [name.encode() for name in self._classes]
                self._write("classes", 0, np.array(names, f"S{self.dimensions.class_bytes}").tobytes())
                if self._weights:
                    self._write("teacher_weights", 0, self._weights)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def missing(self, split: str) -> list[int]:
        """The blocks still to be computed: without a checksum, or, after a crash of the machine, with a wrong one."""
        stored = self._columns[f"{split}_checksums"].load()
        return [
            block
            for block in range(self.dimensions.blocks(split))
            if not stored[block].any()
            or stored[block].tobytes() != block_checksums(self._columns, self.dimensions, split, block)
        ]

    def written(self, split: str) -> NDArray[np.int64]:
        """The images of a split (or the `random` pool) whose block has a checksum, (n,) int64."""
        stored = self._columns[f"{split}_checksums"].load().any(axis=(1, 2))
        return np.flatnonzero(np.repeat(stored, self.dimensions.block_rows)[: self.dimensions.images(split)])

    def split(self, split: str) -> Split:
        """What the part file holds of a split; rows not yet written are zero."""
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
        """Have all that was written on the disk."""
        with writing(self.part, CacheError):
            os.fsync(self._file)

    def finish(self) -> str:
        """Complete the manifest, write the id, and give the file its name; returns the id (64 hex digits).

        Raises CacheError when a block is still missing.
        """
        if left := sum(len(self.missing(split)) for split in self.dimensions.sections):
            raise CacheError(f"{self.part} still lacks {left} blocks. Run the same command again.")
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
        """Make the part file's skeleton under a third name, so that a part file is always whole."""
        plan = encode_manifest(self.plan)
        decode_manifest(plan, finished=False)  # no reader would take a plan that breaks the schema
        skeleton = self.part.with_name(self.part.name + ".skeleton")
        # h5py crashes when a write fails, so the disk shows that it has the room before h5py writes at all.
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
        # A writer that was killed at the very end has the manifest complete and the id not yet written.
        differences = list(differing(as_plan(structure.manifest), self.plan))
        if structure.dimensions != self.dimensions and not differences:
            differences = ["whether it has images, or the lengths of class names, keys or weights"]
        if differences:
            raise CacheMismatch(
                f"{self.part} was begun with another plan: {'; '.join(differences[:3])}. "
                f"Give the same settings to go on with it, or delete it to begin again."
            )

    def _write(self, name: str, start: int, data: bytes) -> None:
        write_at(self._file, data, self._offsets[name] + start)


def write_skeleton(path: Path, dimensions: Dimensions) -> None:
    """Create a version-1 file with every dataset in place and nothing in them."""
    # Pixels and rows begin on page boundaries. The same call gives the same bytes: no times are recorded.
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
    """SHA-256 of each column of a block as it lies in the file, in the order of `dimensions.columns`."""
    images = dimensions.block(split, block)
    names = dimensions.columns(split)
    parts = (columns[f"{split}_{name}"][dimensions.column_rows(split, name, images)] for name in names)
    return b"".join(hashlib.sha256(part).digest() for part in parts)


def fingerprint(classes: bytes, columns: Mapping[str, Column]) -> str:
    """A dataset's identity: SHA-256, as hex, over classes, then labels ‖ keys ‖ digests of train, then of test."""
    digest = hashlib.sha256(classes)
    for split in SPLITS:
        for column in ("labels", "keys", "digests"):
            digest.update(columns[f"{split}_{column}"].load().tobytes())
    return digest.hexdigest()


def correct(columns: Mapping[str, Column], dimensions: Dimensions, split: str) -> int:
    """How many of a split's images the teacher classifies rightly (of each image's first view, the plain one)."""
    logits = columns[f"{split}_logits"].load()[:: dimensions.views_of(split)]
    return int((logits.argmax(axis=1) == columns[f"{split}_labels"].load()).sum())


def differing(there: Any, here: Any) -> Iterator[str]:
    """The fields in which two manifests differ, each as a sentence's part."""
    for where, one, two in differing_fields(there, here):
        yield f"{where} is {_stated(one)} there and {_stated(two)} here"


def _stated(value: Any) -> str:
    """A field as a sentence's part; a whole section (one may be null) as its fields."""
    return ", ".join(f"{key} {v}" for key, v in value.items()) if isinstance(value, dict) else repr(value)


def _reserve(path: Path, size: int, *, sparse: bool) -> None:
    """Allocate a file's bytes on the disk now, so that a full disk is met before the teacher has run.

    A sparse file gets its size, and room for what HDF5 writes: a full disk is met where rows are written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if sparse:
            os.ftruncate(descriptor, size)
            size = min(size, 2**20)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:  # macOS: write what is there again, and zeros beyond
            for start in range(0, size, 2**24):
                length = min(2**24, size - start)
                os.pwrite(descriptor, os.pread(descriptor, length, start).ljust(length, b"\0"), start)
    finally:
        os.close(descriptor)
