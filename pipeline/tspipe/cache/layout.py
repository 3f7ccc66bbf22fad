"""What is where in a feature cache, format version 1.

A cache is one ordinary HDF5 file. Every dataset is a hard link at the root, contiguous, unfiltered,
of fixed shape and little-endian, so that a row is found by arithmetic and read without HDF5.
`cache/README.md` in the repository is the specification; this file is its code. Nothing here needs torch.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tspipe.errors import CacheError, NotACache

FORMAT = b"tspipe-cache"
VERSION = 1
MANIFEST_BYTES = 65536
ID_BYTES = 64
SPLITS = ("train", "test")
CHECKSUM_BYTES = 32
DIGEST_BYTES = 8
COLUMNS = ("features", "logits", "labels", "keys", "digests", "views", "images")  # in this order in the file

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Dimensions:
    """Every number from which the shapes of all datasets follow."""

    rows: Mapping[str, int]  # images per split
    width: int  # d, of the penultimate features
    classes: int  # c
    feature_dtype: str  # "<f2" or "<f4"
    block_rows: int  # images of a block, each of whose columns has a checksum
    class_bytes: int  # the longest class name, in bytes
    key_bytes: Mapping[str, int]  # the longest key of each split, in bytes
    weights_bytes: int = 0  # 0: the teacher's weights are not in the file
    views: int | None = None  # V, replayable views per training image
    image_shape: tuple[int, int, int] | None = None  # (H, W, C) of stored pixels
    random_rows: int | None = None  # P, the random pool

    @property
    def sections(self) -> tuple[str, ...]:
        """What there are rows of, in file order: the splits and, where there is one, the `random` pool."""
        return SPLITS if self.random_rows is None else (*SPLITS, "random")

    def images(self, split: str) -> int:
        """How many images a split (or the `random` pool) has."""
        return (self.random_rows or 0) if split == "random" else self.rows[split]

    def blocks(self, split: str) -> int:
        """How many blocks a split (or the `random` pool) has."""
        return math.ceil(self.images(split) / self.block_rows)

    def block(self, split: str, index: int) -> range:
        """The images that block `index` of a split covers."""
        start = index * self.block_rows
        return range(start, min(start + self.block_rows, self.images(split)))

    def views_of(self, split: str) -> int:
        """V, how many rows of features and logits an image has: 1 without views, and outside of `train`."""
        return (self.views or 1) if split == "train" else 1

    def columns(self, split: str) -> list[str]:
        """The columns of a split that checksums cover, in the order of the checksums."""
        if split == "random":
            return ["features", "logits"]
        absent = {"views": self.views is None or split != "train", "images": self.image_shape is None}
        return [column for column in COLUMNS if not absent.get(column)]

    def column_rows(self, split: str, column: str, images: range) -> slice:
        """The rows of a split's column that belong to these images: those with a row per view have V each."""
        times = self.views_of(split) if column in ("features", "logits", "views") else 1
        return slice(images.start * times, images.stop * times)

    def datasets(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Name -> (dtype, shape) of every dataset, in the order in which the file holds them."""
        return {name: (np.dtype(dtype), shape) for name, dtype, shape in self._datasets()}

    def _datasets(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        yield "manifest", "u1", (MANIFEST_BYTES,)
        yield "id", "u1", (ID_BYTES,)
        yield "classes", f"S{self.class_bytes}", (self.classes,)
        for split in SPLITS:
            n = self.rows[split]
            seen = n * self.views_of(split)
            yield f"{split}_features", self.feature_dtype, (seen, self.width)
            yield f"{split}_logits", "<f4", (seen, self.classes)
            yield f"{split}_labels", "<i8", (n,)
            yield f"{split}_keys", f"S{self.key_bytes[split]}", (n,)
            yield f"{split}_digests", "u1", (n, DIGEST_BYTES)
            if "views" in self.columns(split):
                yield f"{split}_views", "<i2", (seen, 3)
            if self.image_shape is not None:
                yield f"{split}_images", "u1", (n, *self.image_shape)
            yield f"{split}_checksums", "u1", (self.blocks(split), len(self.columns(split)), CHECKSUM_BYTES)
        if self.random_rows is not None:
            yield "random_features", self.feature_dtype, (self.random_rows, self.width)
            yield "random_logits", "<f4", (self.random_rows, self.classes)
            yield "random_checksums", "u1", (self.blocks("random"), 2, CHECKSUM_BYTES)
        if self.weights_bytes:
            yield "teacher_weights", "u1", (self.weights_bytes,)


def as_plan(manifest: Manifest) -> Manifest:
    """A manifest as it was before its file was finished: without what is known only at the end."""
    return {
        **manifest,
        "dataset": {**manifest["dataset"], "fingerprint": None},
        "teacher": {**manifest["teacher"], "correct": None},
    }


def differing_fields(one: Any, two: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two manifests differ: (dotted name, its value in the one, in the other)."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted(one.keys() | two.keys()):
            yield from differing_fields(one.get(key), two.get(key), f"{where}.{key}".lstrip("."))
    elif one != two:
        yield where, one, two


def digest(image: NDArray[np.uint8]) -> bytes:
    """What identifies an image (H, W, C): the first 8 bytes of SHA-256 over its shape (three `<i8`) and its pixels."""
    return hashlib.sha256(struct.pack("<3q", *image.shape) + image.tobytes()).digest()[:DIGEST_BYTES]


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's 65,536 bytes: canonical JSON (sorted keys, no spaces, ASCII), padded with NUL."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(text) > MANIFEST_BYTES:
        raise CacheError(f"The manifest takes {len(text):,} bytes; the format has room for {MANIFEST_BYTES:,}.")
    return text.ljust(MANIFEST_BYTES, b"\0")


def decode_manifest(data: bytes, *, finished: bool = True) -> Manifest:
    """Parse and check a manifest; the plan of an unfinished file may leave out what is known only at its end.

    Raises NotACache when the text is not canonical JSON or does not follow the schema.
    """
    text = data.rstrip(b"\0")
    try:
        manifest = json.loads(text)
        _check(manifest, _SCHEMA, "manifest", finished)
    except (ValueError, RecursionError) as problem:
        raise NotACache("its manifest is not JSON.") from problem
    _agree(manifest)
    # One text per manifest: duplicate keys, other spellings of a number and trailing bytes end here.
    if encode_manifest(manifest) != data:
        raise NotACache("its manifest is not canonical JSON.")
    return dict(manifest)


# ── The manifest's schema ────────────────────────────────────────────────────────────────────────────────────────
# A schema is a dict (exactly these fields) or a function that says whether a value is allowed.

Check = Callable[[Any], bool]
_LARGEST_SIDE = 4096  # pixels
_LARGEST_OPTION = 65536
_LARGEST = 2**48  # no count in a real file comes near; products of two such counts are checked against the file's size


@dataclass(frozen=True)
class _Optional:
    """A field that may be null; with `only_unfinished`, just until the file is finished."""

    schema: Any
    only_unfinished: bool = False


def _integer(low: int, high: int = _LARGEST) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _text(pattern: str) -> Check:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= 16
        and all(type(v) in (int, float) and math.isfinite(v) and abs(v) < 1e6 for v in value)
    )


def _scalar(value: Any) -> bool:
    if isinstance(value, int | float):
        return abs(value) <= _LARGEST_OPTION  # neither NaN nor infinite
    return value is None or (isinstance(value, str) and len(value) <= 200)


def _options(value: Any) -> bool:
    """A network's options: scalars and short lists of them, small enough that no network built from them is huge."""
    if not isinstance(value, dict) or len(value) > 64:
        return False
    return all(all(map(_scalar, v)) and len(v) <= 16 if isinstance(v, list) else _scalar(v) for v in value.values())


def _size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_integer(1, _LARGEST_SIDE)(v) for v in value)


def _positive(value: Any) -> bool:
    return _numbers(value) and all(v > 0 for v in value)


_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}(?<!\.py)"  # never a path, never a file of code
_sha256 = _text(r"[0-9a-f]{64}")
_any_text = _text(r"(?s).{0,1000}")

_SCHEMA: dict[str, Any] = {
    "block_rows": _integer(1, 2**24),
    "compute": {
        "batch_size": _integer(1, 2**24),
        "device": _text(r"cpu|cuda|mps|xpu"),
        "precision": _text(r"float32|bfloat16"),
    },
    "dataset": {
        "classes": _integer(1, 2**20),
        "fingerprint": _Optional(_sha256, only_unfinished=True),
        "license": _any_text,
        "name": _text(f"(folder:)?{_NAME}"),
        "rows": {"test": _integer(1), "train": _integer(1)},
    },
    "features": {"dtype": _text(r"<f2|<f4"), "width": _integer(1, 2**18)},
    "preprocess": {
        "crop": _Optional(_integer(1, _LARGEST_SIDE)),
        "interpolation": _text(r"nearest|bilinear|bicubic"),
        "mean": _numbers,
        "resize": _Optional(_size),
        "std": _positive,
    },
    "random": _Optional({"generator": _text(_NAME), "rows": _integer(1), "seed": _integer(0, 2**63 - 1)}),
    "teacher": {
        "correct": _Optional({"test": _integer(0), "train": _integer(0)}, only_unfinished=True),
        "file_sha256": _sha256,
        "network": _text(f"(torchvision:)?{_NAME}"),
        "options": _options,
        "weights_sha256": _sha256,
    },
    "views": _Optional(
        {
            "count": _integer(2, 2**16),
            "flip": lambda value: isinstance(value, bool),
            "seed": _integer(0, 2**63 - 1),
            "shift": _integer(0, 2**14),
        }
    ),
}


def _check(value: Any, schema: Any, where: str, finished: bool) -> None:
    if isinstance(schema, _Optional):
        if value is None and not (finished and schema.only_unfinished):
            return
        schema = schema.schema
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise NotACache(f"{where} is not an object.")
        if missing := sorted(schema.keys() - value.keys()):
            raise NotACache(f"{where} lacks the field {missing[0]!r}.")
        if extra := sorted(value.keys() - schema.keys()):
            raise NotACache(f"{where} has an unknown field {extra[0][:60]!r}.")
        for key, inner in schema.items():
            _check(value[key], inner, f"{where}.{key}", finished)
    elif not schema(value):
        raise NotACache(f"{where} cannot be {json.dumps(value)[:60]}.")


def _agree(manifest: Manifest) -> None:
    """Check what no field shows alone."""
    correct, rows, preprocess = manifest["teacher"]["correct"], manifest["dataset"]["rows"], manifest["preprocess"]
    for split in SPLITS if correct else ():
        if correct[split] > rows[split]:
            raise NotACache(f"manifest.teacher.correct.{split} is {correct[split]} of {rows[split]} images.")
    if len(preprocess["mean"]) != len(preprocess["std"]):
        raise NotACache("manifest.preprocess has a mean and a std of different lengths.")
    if (views := manifest["views"]) and not (views["shift"] or views["flip"]):
        raise NotACache("manifest.views has neither a shift nor a flip.")
