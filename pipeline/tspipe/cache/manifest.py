"""The manifest of a feature cache: canonical JSON that says how the cache was made, and the checks of its fields."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tspipe.cache.layout import MANIFEST_BYTES, SPLITS
from tspipe.errors import CacheError, NotACache

Manifest = dict[str, Any]


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
            yield from differing_fields(first.get(key), second.get(key), f"{path}.{key}".lstrip("."))
    elif first != second:
        yield path, first, second


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode a manifest as 65,536 bytes: canonical JSON (sorted keys, no spaces, ASCII), padded with NUL."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(text) > MANIFEST_BYTES:
        raise CacheError(f"The manifest takes {len(text):,} bytes; the format has room for {MANIFEST_BYTES:,}.")
    return text.ljust(MANIFEST_BYTES, b"\0")


def decode_manifest(data: bytes, *, finished: bool = True) -> Manifest:
    """Parse and check a manifest; that of an unfinished file may have null in the fields set at the end.

    Raises NotACache if the text is not canonical JSON or breaks the schema.
    """
    text = data.rstrip(b"\0")
    try:
        manifest = json.loads(text)
        _check(manifest, _SCHEMA, "manifest", finished)
    except (ValueError, RecursionError) as problem:
        raise NotACache("its manifest is not JSON.") from problem
    _check_consistency(manifest)
    # Each manifest has exactly one encoding: duplicate keys, other number formats and trailing bytes are refused.
    if encode_manifest(manifest) != data:
        raise NotACache("its manifest is not canonical JSON.")
    return dict(manifest)


# ── The manifest's schema ────────────────────────────────────────────────────────────────────────────────────────
# A schema is a dict (exactly these fields) or a predicate that accepts or rejects a value.

Check = Callable[[Any], bool]
_LARGEST_SIDE = 4096  # pixels
_LARGEST_OPTION = 65536
_LARGEST = 2**48  # far above any real count; products of two counts are checked against the file size


@dataclass(frozen=True)
class _Optional:
    """A field that may be null; with `only_unfinished`, only in an unfinished file."""

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
    """Accept scalars and short lists of scalars, bounded so that no network built from them is huge."""
    if not isinstance(value, dict) or len(value) > 64:
        return False
    return all(all(map(_scalar, v)) and len(v) <= 16 if isinstance(v, list) else _scalar(v) for v in value.values())


def _size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_integer(1, _LARGEST_SIDE)(v) for v in value)


def _positive(value: Any) -> bool:
    return _numbers(value) and all(v > 0 for v in value)


_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}(?<!\.py)"  # neither a path nor a Python file
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


def _check_consistency(manifest: Manifest) -> None:
    """Check the rules that involve more than one field."""
    correct, rows, preprocess = manifest["teacher"]["correct"], manifest["dataset"]["rows"], manifest["preprocess"]
    for split in SPLITS if correct else ():
        if correct[split] > rows[split]:
            raise NotACache(f"manifest.teacher.correct.{split} is {correct[split]} of {rows[split]} images.")
    if len(preprocess["mean"]) != len(preprocess["std"]):
        raise NotACache("manifest.preprocess has a mean and a std of different lengths.")
    if (views := manifest["views"]) and not (views["shift"] or views["flip"]):
        raise NotACache("manifest.views has neither a shift nor a flip.")
