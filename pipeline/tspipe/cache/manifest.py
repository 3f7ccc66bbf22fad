"""The manifest of a feature cache: canonical JSON that says how the cache was made, and the checks of its fields."""

import json
import math
import re
from collections.abc import Collection, Iterator
from typing import Any

from tspipe.cache.layout import FROM_PHOTOS, MANIFEST_BYTES, SPLITS, UNLABELLED
from tspipe.errors import CacheError, NotACache

Manifest = dict[str, Any]

_LARGEST = 2**48  # far above any real count; products of two counts are checked against the file size
_LARGEST_SIDE = 4096  # pixels
_LARGEST_OPTION = 65536
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}(?<!\.py)"  # neither a path nor a Python file
_HUB = r"hub:[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}@[0-9a-f]{40}:[A-Za-z0-9_]{1,100}"
_POOL_OPTIONS = {"flip", "kind", "rounds", "shift"}  # fields of a pool that not every pool has
_SHA256 = r"[0-9a-f]{64}"


def as_plan(manifest: Manifest) -> Manifest:
    """Return the manifest of the unfinished file: the fields that only a finished file knows are null."""
    return {
        **manifest,
        "dataset": {**manifest["dataset"], "fingerprint": None},
        "teacher": {**manifest["teacher"], "correct": None},
    }


def differing_fields(first: Any, second: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the fields in which two manifests differ: (dotted name, first value, second value)."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted(first.keys() | second.keys()):
            name = f".{key}" if key.isidentifier() else f"[{key}]"
            yield from differing_fields(first.get(key), second.get(key), f"{path}{name}".removeprefix("."))
    elif first != second:
        yield path, first, second


def without_rows(plan: Manifest) -> Manifest:
    """Return a plan without the numbers of images."""
    return {**plan, "dataset": {**plan["dataset"], "rows": None}}


def describe_differences(actual: Any, expected: Any) -> str:
    """Return the first three fields in which two manifests or configs differ, as text; empty if they are equal."""
    fields = {name: (one, two) for name, one, two in differing_fields(actual, expected)}
    if "teacher.weights_sha256" in fields:
        fields.pop("teacher.file_sha256", None)  # of the same weights
    first = list(fields.items())[:3]
    return "; ".join(f"{name} is {_format(one)}, not {_format(two)}" for name, (one, two) in first)


def _format(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(_SHA256, value):
        return value[:12]
    if isinstance(value, dict):
        return f"({', '.join(f'{k} {v}' for k, v in value.items())})"
    return "absent" if value is None else repr(value)


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode a manifest as 65,536 bytes: canonical JSON (sorted keys, no spaces, ASCII), padded with NUL."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(text) > MANIFEST_BYTES:
        raise CacheError(f"The manifest takes {len(text):,} bytes; the format has room for {MANIFEST_BYTES:,}.")
    return text.ljust(MANIFEST_BYTES, b"\0")


def decode_manifest(data: bytes, *, finished: bool = True) -> Manifest:
    """Parse and check a manifest; that of an unfinished file may have null in the fields set at the end.

    Raises NotACache if the text is not canonical JSON or a field is missing, unknown or out of range.
    """
    try:
        manifest = json.loads(data.rstrip(b"\0"))
        _check(manifest, finished)
    except (ValueError, RecursionError) as problem:
        raise NotACache("its manifest is not JSON.") from problem
    # Each manifest has exactly one encoding: duplicate keys, other number formats and trailing bytes are refused.
    if encode_manifest(manifest) != data:
        raise NotACache("its manifest is not canonical JSON.")
    return dict(manifest)


class _Section:
    """An object in the manifest with exactly these fields; every check raises NotACache naming the field."""

    def __init__(self, value: Any, where: str, *fields: str, optional: Collection[str] = ()):
        self.value, self.where = value, where
        if not isinstance(value, dict):
            raise NotACache(f"{where} is not an object.")
        if missing := sorted(set(fields) - value.keys()):
            raise NotACache(f"{where} lacks the field {missing[0]!r}.")
        if unknown := sorted(value.keys() - {*fields, *optional}):
            raise NotACache(f"{where} has an unknown field {unknown[0][:60]!r}.")

    def section(self, field: str, *fields: str, optional: Collection[str] = ()) -> "_Section":
        return _Section(self.value[field], f"{self.where}.{field}", *fields, optional=optional)

    def require(self, field: str, valid: bool) -> None:
        if not valid:
            raise NotACache(f"{self.where}.{field} cannot be {json.dumps(self.value[field])[:60]}.")

    def integers(self, low: int, high: int, *fields: str) -> None:
        for field in fields:
            self.require(field, _is_integer(self.value[field], low, high))

    def text(self, field: str, pattern: str) -> None:
        self.require(field, isinstance(self.value[field], str) and bool(re.fullmatch(pattern, self.value[field])))

    def numbers(self, field: str, above: float) -> None:
        values = self.value[field]
        self.require(
            field,
            isinstance(values, list)
            and 1 <= len(values) <= 16
            and all(type(v) in (int, float) and math.isfinite(v) and above < v < 1e6 for v in values),
        )


def _check(manifest: Any, finished: bool) -> None:
    sections = ("compute", "dataset", "features", "preprocess", "random", "teacher", "views")
    top = _Section(manifest, "manifest", "block_rows", *sections)
    top.integers(1, 2**24, "block_rows")

    compute = top.section("compute", "batch_size", "device", "precision")
    compute.integers(1, 2**24, "batch_size")
    compute.text("device", "cpu|cuda|mps|xpu")
    compute.text("precision", "float32|bfloat16")

    dataset = top.section("dataset", "classes", "fingerprint", "license", "name", "rows", optional=("split",))
    dataset.integers(1, 2**20, "classes")
    if finished or dataset.value["fingerprint"] is not None:
        dataset.text("fingerprint", _SHA256)
    dataset.text("license", "(?s).{0,1000}")
    dataset.text("name", f"(folder:)?{_NAME}")
    rows = dataset.section("rows", *SPLITS, optional=(UNLABELLED,))
    rows.integers(1, _LARGEST, *rows.value)
    if "split" in dataset.value:
        held = dataset.section("split", "fraction", "seed")
        held.require("fraction", isinstance(held.value["fraction"], float) and 0 < held.value["fraction"] < 1)
        held.integers(0, 2**63 - 1, "seed")

    features = top.section("features", "dtype", "width")
    features.text("dtype", "<f2|<f4")
    features.integers(1, 2**18, "width")
    _check_preprocess(top.section("preprocess", "crop", "interpolation", "mean", "resize", "std"))

    if manifest["random"] is not None:
        _check_pool(top.section("random", "generator", "rows", "seed", optional=_POOL_OPTIONS))

    fields = "correct", "file_sha256", "network", "options", "weights_sha256"
    teacher = top.section("teacher", *fields, optional=("library", "program_sha256"))
    if "library" in teacher.value:
        teacher.text("library", r"timm [0-9][A-Za-z0-9.+-]{0,40}")
    if "program_sha256" in teacher.value:
        teacher.text("program_sha256", _SHA256)
    if finished or teacher.value["correct"] is not None:
        correct = teacher.section("correct", *SPLITS)
        for split in ("test", "train"):
            correct.integers(0, _LARGEST, split)
            if correct.value[split] > rows.value[split]:
                raise NotACache(f"{correct.where}.{split} is {correct.value[split]} of {rows.value[split]} images.")
    teacher.text("file_sha256", _SHA256)
    teacher.text("network", f"((torchvision|timm):)?{_NAME}|{_HUB}")
    teacher.require("options", _are_options(teacher.value["options"]))
    teacher.text("weights_sha256", _SHA256)

    if manifest["views"] is not None:
        views = top.section("views", "count", "flip", "seed", "shift")
        views.integers(2, 2**16, "count")
        views.require("flip", isinstance(views.value["flip"], bool))
        views.integers(0, 2**63 - 1, "seed")
        views.integers(0, 2**14, "shift")
        if not (views.value["shift"] or views.value["flip"]):
            raise NotACache("manifest.views has neither a shift nor a flip.")


def _check_pool(pool: _Section) -> None:
    pool.text("generator", _NAME)
    pool.integers(1, _LARGEST, "rows")
    pool.integers(0, 2**63 - 1, "seed")
    if "kind" in pool.value:
        pool.text("kind", _NAME)
        pool.require("kind", pool.value["kind"] != "uniform")  # which is stated by leaving it out
    if pool.value.get("kind") in FROM_PHOTOS or not {"flip", "shift"}.isdisjoint(pool.value):
        pool = _Section(pool.value, pool.where, *{*pool.value, "kind", "flip", "shift"})
        pool.integers(0, 2**14, "shift")
        pool.require("flip", isinstance(pool.value["flip"], bool))
    if "rounds" in pool.value:
        pool.integers(2, 256, "rounds")
    pool.require("generator", pool.value["generator"] != "minstd" or not _POOL_OPTIONS.intersection(pool.value))


def _check_preprocess(preprocess: _Section) -> None:
    crop, resize = preprocess.value["crop"], preprocess.value["resize"]
    preprocess.require("crop", crop is None or _is_integer(crop, 1, _LARGEST_SIDE))
    preprocess.text("interpolation", "nearest|bilinear|bicubic")
    preprocess.numbers("mean", above=-1e6)
    is_size = isinstance(resize, list) and len(resize) == 2 and all(_is_integer(v, 1, _LARGEST_SIDE) for v in resize)
    preprocess.require("resize", resize is None or is_size)
    preprocess.numbers("std", above=0)
    if len(preprocess.value["mean"]) != len(preprocess.value["std"]):
        raise NotACache("manifest.preprocess has a mean and a std of different lengths.")


def _is_integer(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _are_options(value: Any) -> bool:
    """Return whether all are scalars or short lists of scalars, bounded so that no network built from them is huge."""
    if not isinstance(value, dict) or len(value) > 64:
        return False
    return all(
        all(map(_is_scalar, v)) and len(v) <= 16 if isinstance(v, list) else _is_scalar(v) for v in value.values()
    )


def _is_scalar(value: Any) -> bool:
    if isinstance(value, int | float):
        return abs(value) <= _LARGEST_OPTION  # neither NaN nor infinite
    return value is None or (isinstance(value, str) and len(value) <= 200)
