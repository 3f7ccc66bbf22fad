"""Opens a feature cache for reading; rows are read by offset, without HDF5 and without torch."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from tspipe.cache.column import Column
from tspipe.cache.inspect import Structure, inspect
from tspipe.cache.layout import NO_LABEL, SPLITS, UNLABELLED, Dimensions
from tspipe.cache.manifest import Manifest
from tspipe.errors import CacheDamaged, CacheError


@dataclass(frozen=True, eq=False)
class Split:
    """The columns of a split: n images, V views of each (1 except in `train`), and features and logits of each view."""

    features: Column  # (n·V, d) float16 or float32
    logits: Column  # (n·V, c) float32
    labels: NDArray[np.int64]  # (n,), checked to be valid classes; -100 in a split without labels
    keys: Column  # (n,) bytes
    digests: Column  # (n, 8) uint8
    checksums: Column  # (blocks, columns, 32) uint8
    views: Column | None = None  # (n·V, 3) int16: dy, dx, flip
    images: Column | None = None  # (n, H, W, C) uint8

    @classmethod
    def of(cls, columns: Mapping[str, Column], split: str) -> "Split":
        """Return the split made of the columns `<split>_…`."""
        parts = {name.removeprefix(f"{split}_"): part for name, part in columns.items() if name.startswith(f"{split}_")}
        labels = parts.pop("labels").load() if "labels" in parts else np.full(len(parts["keys"]), NO_LABEL)
        return cls(labels=labels, **parts)

    def __len__(self) -> int:
        return len(self.labels)


def read_keys(split: Split) -> list[str]:
    """Return the keys of a split's images, in Unicode NFC."""
    return [normalize("NFC", key.decode("utf-8", "replace")) for key in split.keys.load().tolist()]


@dataclass(frozen=True, eq=False)
class Pool:
    """The columns of the random pool: P random images, whose pixels are drawn again from the manifest."""

    features: Column  # (P, d) float16 or float32
    logits: Column  # (P, c) float32
    checksums: Column  # (blocks, columns, 32) uint8
    candidates: Column | None = None  # (P,) int64: the number of each image in the stream of its block

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, eq=False, repr=False)
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
    unlabelled: Split | None = None
    _weights: Column | None = None
    _program: Column | None = None
    identified: bool = True  # opening checks the id

    def __repr__(self) -> str:
        return f"<Cache {self.name} {self.id[:12]}>"

    def __str__(self) -> str:
        dataset, teacher, width = self.manifest["dataset"], self.manifest["teacher"], self.dimensions.width
        return (
            f"{self.name} ({self.id[:12]}): {len(self.train):,} training and {len(self.test):,} test images of "
            f"{dataset['name']} in {len(self.classes):,} classes, {'with' if self.has_images else 'without'} their "
            f"pixels. The teacher {teacher['network']} ({'' if self.has_teacher else 'not '}in the file) classifies "
            f"{teacher['correct']['test'] / len(self.test):.2%} of the test images correctly. "
            f"Each image has {width:,} features and {len(self.classes):,} logits."
        )

    @property
    def name(self) -> str:
        """The file name."""
        return self.path.name

    @property
    def size(self) -> int:
        """The file size in bytes."""
        return self.path.stat().st_size

    def split(self, name: str) -> Split:
        """Return the split `train`, `test` or, of a file that has one, `unlabelled`."""
        splits = {"train": self.train, "test": self.test, UNLABELLED: self.unlabelled}
        split = splits[name]
        assert split is not None
        return split

    @property
    def has_images(self) -> bool:
        """Whether the file contains the images' pixels, so that training needs no dataset."""
        return self.train.images is not None and self.test.images is not None

    @property
    def has_teacher(self) -> bool:
        """Whether the file contains the teacher's weights."""
        return self._weights is not None

    def teacher_program(self) -> bytes | None:
        """Return the teacher's program (see `tspipe.models.program`), or None if the file has none.

        Raises CacheDamaged if its SHA-256 is not the manifest's.
        """
        if self._program is None:
            return None
        data = self._program.load().tobytes()
        if hashlib.sha256(data).hexdigest() != self.manifest["teacher"]["program_sha256"]:
            raise CacheDamaged(f"{self.path}: the teacher's program is not that of the manifest. Get the file again.")
        return data

    def teacher_weights(self) -> bytes:
        """Return the teacher's weights as safetensors bytes, checked against the manifest's SHA-256."""
        if self._weights is None:
            raise CacheError(
                f"{self.path.name} does not carry its teacher, so nothing can label random images or live "
                "views. Train without them: --random-images 0 --set view_source=stored"
            )
        data = self._weights.load().tobytes()
        if hashlib.sha256(data).hexdigest() != self.manifest["teacher"]["weights_sha256"]:
            raise CacheDamaged(f"{self.path}: the teacher's weights are not those of the manifest. Get the file again.")
        return data


def open_cache(path: str | os.PathLike[str]) -> Cache:
    """Open and check a finished cache. Reads the manifest, the checksums, the classes and the labels, no other rows.

    The file is opened once: if another one takes its name, this one stays in use. Raises NotACache, CacheIncomplete or
    CacheDamaged; later reads raise CacheError if the file itself is written to.
    """
    cache = assemble(inspect(Path(path)))
    for split in SPLITS:
        labels = cache.split(split).labels
        if not (labels.min() >= 0 and labels.max() < len(cache.classes)):
            raise CacheDamaged(f"{path}: {split}_labels has labels outside its {len(cache.classes)} classes.")
    return cache


def assemble(structure: Structure) -> Cache:
    """Return a Cache of this structure, without checking labels."""
    columns = structure.columns
    pool = {name.removeprefix("random_"): part for name, part in columns.items() if name.startswith("random_")}
    return Cache(
        path=columns["id"].file.path,
        id=columns["id"].load().tobytes().decode("ascii"),
        manifest=structure.manifest,
        dimensions=structure.dimensions,
        classes=[name.decode("utf-8", "replace") for name in columns["classes"].load().tolist()],
        train=Split.of(columns, "train"),
        test=Split.of(columns, "test"),
        random=Pool(**pool) if pool else None,
        unlabelled=Split.of(columns, UNLABELLED) if UNLABELLED in structure.dimensions.rows else None,
        _weights=columns.get("teacher_weights"),
        _program=columns.get("teacher_program"),
    )
