"""Compares two caches."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tspipe.cache.column import Column
from tspipe.cache.layout import NO_LABEL
from tspipe.cache.manifest import differing_fields
from tspipe.cache.read import Cache, Pool, read_keys

_ROWS = 256  # compared at once


@dataclass
class SplitDiff:
    """How a split of two caches differs; images are matched by key.

    Attributes:
        common: number of keys in both.
        only: keys that only the first and only the second cache has.
        edited: keys with different images (by digest).
        relabelled: keys with different labels (by class name).
        moved: number of common keys at another position among the common ones.
        features, logits: largest difference over unchanged images; None if widths differ.
        argmax: number of unchanged images that the teachers classify differently.
    """

    common: int = 0
    only: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    edited: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)
    moved: int = 0
    features: float | None = 0.0
    logits: float | None = 0.0
    argmax: int = 0

    @property
    def same(self) -> bool:
        """Whether no row differs."""
        return self == SplitDiff(self.common)


@dataclass(frozen=True)
class Diff:
    """How two caches differ: in fields, as `(name, first, second)`, and in rows.

    Rows of the random pool are compared if both pools draw the same images.
    """

    fields: list[tuple[str, Any, Any]]
    splits: dict[str, SplitDiff]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.fields and all(split.same for split in self.splits.values())


def compare(first: Cache, second: Cache) -> Diff:
    """Compare two caches: what their manifests say, their classes, and their rows by key."""
    descriptions = [
        {
            **cache.manifest,
            "classes": cache.classes,
            "id": cache.id,
            "images in the file": cache.has_images,
            "teacher in the file": cache.has_teacher,
        }
        for cache in (first, second)
    ]
    common = [split for split in first.dimensions.splits if split in second.dimensions.splits]
    splits = {split: _compare_split(first, second, split) for split in common}
    if first.random and second.random and _pool_definition(first) == _pool_definition(second):
        splits["random"] = _compare_pools(first.random, second.random)
    return Diff(list(differing_fields(descriptions[0], descriptions[1])), splits)


def _pool_definition(cache: Cache) -> tuple[Any, ...]:
    """Return everything that determines the pixels of a cache's random pool."""
    manifest = cache.manifest
    candidates = cache.random.candidates if cache.random else None
    return (
        manifest["random"],
        manifest["block_rows"],
        manifest["teacher"]["options"].get("input_shape"),
        manifest["dataset"]["fingerprint"] if "kind" in manifest["random"] else None,  # some are made from its images
        None if candidates is None else candidates.load().tobytes(),
    )


def _compare_pools(first: Pool, second: Pool) -> SplitDiff:
    rows, difference = np.arange(len(first)), SplitDiff(common=len(first))
    difference.features, _ = _compare_columns(first.features, second.features, rows, rows)
    difference.logits, difference.argmax = _compare_columns(first.logits, second.logits, rows, rows)
    return difference


def _compare_split(first: Cache, second: Cache, name: str) -> SplitDiff:
    caches = first, second
    splits = [cache.split(name) for cache in caches]
    row_of = [{key: row for row, key in enumerate(read_keys(split))} for split in splits]
    common = [key for key in row_of[0] if key in row_of[1]]
    rows = [np.array([index[key] for key in common], np.int64) for index in row_of]
    digests = [split.digests.take(indices) for split, indices in zip(splits, rows, strict=True)]
    labels = [_class_names(caches[i], splits[i].labels[rows[i]]) for i in range(2)]
    unchanged = (digests[0] == digests[1]).all(axis=1)
    difference = SplitDiff(
        common=len(common),
        only=([key for key in row_of[0] if key not in row_of[1]], [key for key in row_of[1] if key not in row_of[0]]),
        edited=[common[i] for i in np.flatnonzero(~unchanged)],
        relabelled=[common[i] for i in np.flatnonzero(labels[0] != labels[1])],
        moved=int((np.argsort(rows[1]) != np.arange(len(common))).sum()),
    )
    # The first view of each image; row i·V + v is view v of image i.
    plain = [rows[i][unchanged] * caches[i].dimensions.views_of(name) for i in range(2)]
    difference.features, _ = _compare_columns(splits[0].features, splits[1].features, *plain)
    difference.logits, difference.argmax = _compare_columns(splits[0].logits, splits[1].logits, *plain)
    return difference


def _class_names(cache: Cache, labels: NDArray[np.int64]) -> NDArray[np.str_]:
    names = np.array([*cache.classes, ""])
    return names[np.where(labels == NO_LABEL, len(cache.classes), labels)]


def _compare_columns(
    first: Column, second: Column, first_rows: NDArray[np.int64], second_rows: NDArray[np.int64]
) -> tuple[float | None, int]:
    """Return the largest difference between rows of two columns, and how many rows differ in their argmax."""
    if first.row_shape != second.row_shape:
        return None, 0
    largest, changed = 0.0, 0
    for start in range(0, len(first_rows), _ROWS):
        part = slice(start, start + _ROWS)
        left, right = first.take(first_rows[part]).astype(np.float64), second.take(second_rows[part]).astype(np.float64)
        differences = np.where(left == right, 0, np.abs(left - right))  # equal infinities do not differ
        largest = max(largest, float(np.nan_to_num(differences, nan=np.inf).max()))
        changed += int((left.argmax(1) != right.argmax(1)).sum())
    return largest, changed
