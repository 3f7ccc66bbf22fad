"""The datasets of a feature cache, format version 1: names, dtypes, shapes and blocks.

A cache is one ordinary HDF5 file. Every dataset is a hard link at the root, contiguous, unfiltered, of fixed shape
and little-endian, so that the offset of a row is computed and the row is read without HDF5.
`cache/README.md` in the repository specifies the format.
"""

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = b"tspipe-cache"
VERSION = 1
MANIFEST_BYTES = 65536
ID_BYTES = 64
SPLITS = ("train", "test")
NO_LABEL = -100  # the label of an image without one; PyTorch's cross-entropy ignores it
FROM_PHOTOS = ("mixed", "cutmix")  # kinds of random images that are made from training images
UNLABELLED = "unlabelled"  # a split without labels, which not every file has
CHECKSUM_BYTES = 32
DIGEST_BYTES = 8
COLUMNS = ("features", "logits", "labels", "keys", "digests", "views", "images")  # in this order in the file

FEATURE_DTYPES = {"float16": "<f2", "float32": "<f4"}  # by their names in recipes
DTYPE_NAMES = {code: name for name, code in FEATURE_DTYPES.items()}


@dataclass(frozen=True)
class Dimensions:
    """The sizes that determine the shapes of all datasets."""

    rows: Mapping[str, int]  # images per split, including `unlabelled`
    width: int  # d, of the penultimate features
    classes: int  # c
    feature_dtype: str  # "<f2" or "<f4"
    block_rows: int  # images per block; each column of a block has a checksum
    class_bytes: int  # the longest class name, in bytes
    key_bytes: Mapping[str, int]  # the longest key of each split, in bytes
    weights_bytes: int = 0  # 0: the teacher's weights are not in the file
    views: int | None = None  # V, replayable views per training image
    image_shape: tuple[int, int, int] | None = None  # (H, W, C) of stored pixels
    random_rows: int | None = None  # P, the random pool
    program_bytes: int = 0  # 0: the teacher's program is not in the file
    balanced: bool = False  # the pool has the numbers of its images among the candidates

    @property
    def sections(self) -> tuple[str, ...]:
        """Return the sections in file order: the splits and the `random` pool, if any."""
        return self.splits if self.random_rows is None else (*self.splits, "random")

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the splits in file order: `train`, `test` and, if the file has one, `unlabelled`."""
        return tuple(split for split in (*SPLITS, UNLABELLED) if split in self.rows)

    def images(self, split: str) -> int:
        """Return the number of images in a split or in the `random` pool."""
        return (self.random_rows or 0) if split == "random" else self.rows[split]

    def blocks(self, split: str) -> int:
        """Return the number of blocks in a split or in the `random` pool."""
        return math.ceil(self.images(split) / self.block_rows)

    def block(self, split: str, index: int) -> range:
        """Return the range of images in block `index` of a split."""
        start = index * self.block_rows
        return range(start, min(start + self.block_rows, self.images(split)))

    def views_of(self, split: str) -> int:
        """Return V, the number of feature and logit rows per image: 1 without views and outside `train`."""
        return (self.views or 1) if split == "train" else 1

    def columns(self, split: str) -> list[str]:
        """Return the columns of a split that have checksums, in checksum order."""
        if split == "random":
            return ["features", "logits", *(["candidates"] if self.balanced else [])]
        absent = {
            "labels": split == UNLABELLED,
            "views": self.views is None or split != "train",
            "images": self.image_shape is None,
        }
        return [column for column in COLUMNS if not absent.get(column)]

    def column_rows(self, split: str, column: str, images: range) -> slice:
        """Return the rows of a column that belong to these images: V per image for columns with one row per view."""
        times = self.views_of(split) if column in ("features", "logits", "views") else 1
        return slice(images.start * times, images.stop * times)

    def datasets(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Return {name: (dtype, shape)} of every dataset, in file order."""
        return {name: (np.dtype(dtype), shape) for name, dtype, shape in self._datasets()}

    def _datasets(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        yield "manifest", "u1", (MANIFEST_BYTES,)
        yield "id", "u1", (ID_BYTES,)
        yield "classes", f"S{self.class_bytes}", (self.classes,)
        for split in self.splits:
            n = self.rows[split]
            view_rows = n * self.views_of(split)
            yield f"{split}_features", self.feature_dtype, (view_rows, self.width)
            yield f"{split}_logits", "<f4", (view_rows, self.classes)
            if "labels" in self.columns(split):
                yield f"{split}_labels", "<i8", (n,)
            yield f"{split}_keys", f"S{self.key_bytes[split]}", (n,)
            yield f"{split}_digests", "u1", (n, DIGEST_BYTES)
            if "views" in self.columns(split):
                yield f"{split}_views", "<i2", (view_rows, 3)
            if self.image_shape is not None:
                yield f"{split}_images", "u1", (n, *self.image_shape)
            yield f"{split}_checksums", "u1", (self.blocks(split), len(self.columns(split)), CHECKSUM_BYTES)
        if self.random_rows is not None:
            yield "random_features", self.feature_dtype, (self.random_rows, self.width)
            yield "random_logits", "<f4", (self.random_rows, self.classes)
            if self.balanced:
                yield "random_candidates", "<i8", (self.random_rows,)
            yield "random_checksums", "u1", (self.blocks("random"), len(self.columns("random")), CHECKSUM_BYTES)
        if self.weights_bytes:
            yield "teacher_weights", "u1", (self.weights_bytes,)
        if self.program_bytes:
            yield "teacher_program", "u1", (self.program_bytes,)


def digest(image: NDArray[np.uint8]) -> bytes:
    """Return the digest of an image (H, W, C): the first 8 bytes of SHA-256 over its shape (three `<i8`) and pixels."""
    return hashlib.sha256(struct.pack("<3q", *image.shape) + image.tobytes()).digest()[:DIGEST_BYTES]
