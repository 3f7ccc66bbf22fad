"""What differs between two caches."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tspipe.cache.layout import SPLITS, differing_fields
from tspipe.cache.read import Cache, Column, Pool

_ROWS = 4096  # compared at once


@dataclass
class SplitDiff:
    """How a split of two caches differs; images are matched by key.

    Attributes:
        common: how many keys both have.
        only: keys that only the first, and only the second has.
        edited: keys whose image is another (digest).
        relabelled: keys whose label is another, by class name.
        moved: how many common keys have another place among the common ones.
        features, logits: the largest difference over images that both have unchanged; None where widths differ.
        argmax: how many of these the two teachers call differently.
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
    """How two caches differ: fields of what they say of themselves, `(name, first, second)`, and their rows.

    Of the `random` pool rows are compared where both draw the same images.
    """

    fields: list[tuple[str, Any, Any]]
    splits: dict[str, SplitDiff]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.fields and all(split.same for split in self.splits.values())


def compare(first: Cache, second: Cache) -> Diff:
    """Compare two caches: what their manifests say, their classes, and their rows by key."""
    one, two = (
        {
            **cache.manifest,
            "classes": cache.classes,
            "id": cache.id,
            "images in the file": cache.has_images,
            "teacher in the file": cache.has_teacher,
        }
        for cache in (first, second)
    )
    splits = {split: _compare_split(first, second, split) for split in SPLITS}
    if first.random and second.random and _draws(first) == _draws(second):
        splits["random"] = _compare_pools(first.random, second.random)
    return Diff(list(differing_fields(one, two)), splits)


def _draws(cache: Cache) -> tuple[Any, ...]:
    """What the pixels of a cache's random pool follow from."""
    manifest = cache.manifest
    return manifest["random"], manifest["block_rows"], manifest["teacher"]["options"].get("input_shape")


def _compare_pools(first: Pool, second: Pool) -> SplitDiff:
    rows, found = np.arange(len(first)), SplitDiff(common=len(first))
    found.features, _ = _apart(first.features, second.features, rows, rows)
    found.logits, found.argmax = _apart(first.logits, second.logits, rows, rows)
    return found


def _compare_split(first: Cache, second: Cache, name: str) -> SplitDiff:
    splits = first.split(name), second.split(name)
    keys = [[key.decode("utf-8", "replace") for key in split.keys.load().tolist()] for split in splits]
    places = [{key: row for row, key in enumerate(some)} for some in keys]
    common = [key for key in keys[0] if key in places[1]]
    rows = [np.array([where[key] for key in common], np.int64) for where in places]
    digests = [split.digests.take(mine) for split, mine in zip(splits, rows, strict=True)]
    labels = [
        np.array(cache.classes)[split.labels[mine]]
        for cache, split, mine in zip((first, second), splits, rows, strict=True)
    ]
    same = (digests[0] == digests[1]).all(axis=1)
    found = SplitDiff(
        common=len(common),
        only=([key for key in keys[0] if key not in places[1]], [key for key in keys[1] if key not in places[0]]),
        edited=[common[i] for i in np.flatnonzero(~same)],
        relabelled=[common[i] for i in np.flatnonzero(labels[0] != labels[1])],
        moved=int((np.argsort(rows[1]) != np.arange(len(common))).sum()),
    )
    # Of an image's views the first; row i·V + v is its view v.
    at = [mine[same] * cache.dimensions.views_of(name) for cache, mine in zip((first, second), rows, strict=True)]
    found.features, _ = _apart(splits[0].features, splits[1].features, *at)
    found.logits, found.argmax = _apart(splits[0].logits, splits[1].logits, *at)
    return found


def _apart(one: Column, two: Column, *rows: NDArray[np.int64]) -> tuple[float | None, int]:
    """The largest difference between rows of two columns, and how many have their largest value elsewhere."""
    if one.row_shape != two.row_shape:
        return None, 0
    largest, elsewhere = 0.0, 0
    for start in range(0, len(rows[0]), _ROWS):
        there, here = (
            column.take(mine[start : start + _ROWS]).astype(np.float64)
            for column, mine in zip((one, two), rows, strict=True)
        )
        apart = np.where(there == here, 0, np.abs(there - here))  # the same infinity twice is no difference
        largest = max(largest, float(np.nan_to_num(apart, nan=np.inf).max()))
        elsewhere += int((there.argmax(1) != here.argmax(1)).sum())
    return largest, elsewhere
