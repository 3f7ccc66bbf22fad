"""Compares a cache with local data: rows in another order, split or version would give students wrong targets."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from tspipe.cache.layout import digest
from tspipe.cache.read import Cache, Split, read_keys
from tspipe.errors import CacheMismatch
from tspipe.utils.threads import available_cores

_TASK = 16  # images per thread and task: scheduling single ones costs more than decoding a small JPEG
SAMPLE = 256  # images whose pixels are compared by default; None compares all
_REMEDY = "Give the data that the cache was made from (--data), or make the cache again (tspipe cache --force)."
Advance = Callable[[int], object]
Difference = tuple[int, str] | None  # the index of an image, and what differs


class LocalSplit(Protocol):
    """A local dataset's split; `tspipe.data.datasets.Images` is one."""

    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def read(self) -> Callable[[int], NDArray[np.uint8]]: ...


class LocalDataset(Protocol):
    """The splits of a local dataset: `train`, `test` and, if it has images without labels, `unlabelled`."""

    @property
    def splits(self) -> Sequence[str]: ...
    def split(self, name: str, /) -> LocalSplit: ...


def match_dataset(
    name: str,
    cache: Cache,
    local: LocalDataset,
    *,
    sample: int | None = SAMPLE,
    advance: Advance = lambda count: None,
) -> None:
    """Compare a cache's classes, and each split that the local dataset has, with the dataset; see `match_split`.

    Raises CacheMismatch naming the first class or image that differs.
    """
    match_classes(name, cache.classes, local.split("train").classes)
    for split in local.splits:
        match_split(name, split, cache.split(split), local.split(split), sample=sample, advance=advance)


def shared_images(one: Split, other: Split) -> NDArray[np.bool_]:
    """Return whether each image of a split (n,) is in the other, too, by the digests of its pixels."""
    ours, theirs = (split.digests.load().copy().view("<u8").ravel() for split in (one, other))
    return np.isin(ours, theirs)


def match_classes(name: str, stored: Sequence[str], local: Sequence[str]) -> None:
    """Compare class names. Raises CacheMismatch naming the first that differs."""
    if len(stored) != len(local):
        raise CacheMismatch(f"{name} has {len(stored)} classes, the dataset {len(local)}. {_REMEDY}")
    for i, (cached, actual) in enumerate(zip(stored, local, strict=True)):
        if normalize("NFC", cached) != normalize("NFC", actual):
            raise CacheMismatch(f"{name}: class {i} is {cached!r} in the cache, {actual!r} in the dataset. {_REMEDY}")


def match_split(
    name: str,
    split: str,
    stored: Split,
    local: LocalSplit,
    *,
    rows: NDArray[np.int64] | None = None,
    sample: int | None = SAMPLE,
    advance: Advance = lambda count: None,
) -> None:
    """Compare a split's keys and labels, and the pixels of a random sample, with the local dataset.

    Args:
        name: the cache's name in error messages.
        rows: the rows to compare, of an unfinished file; None compares all rows and their number.
        sample: how many images to compare by digest; None for all.
        advance: called with the number of images compared since the last call.

    Raises CacheMismatch naming the first image that differs: its key, its index, and both values.
    """
    keys = read_keys(stored)
    compared = np.arange(max(len(keys), len(local.keys)) if rows is None else len(keys)) if rows is None else rows
    sampled = compared
    if sample is not None and sample < len(compared):
        sampled = np.sort(np.random.default_rng().choice(compared, sample, replace=False))
    difference = (
        _differing_key(keys, local.keys, compared)
        or _differing_label(keys, stored.labels, local.labels, compared)
        or _differing_pixels(keys, stored, local, sampled, advance)
    )
    if difference is not None:
        i, text = difference
        counts = f" ({len(keys):,} images cached, {len(local.keys):,} in the dataset)"
        counts = counts if len(keys) != len(local.keys) else ""
        raise CacheMismatch(f"{name} is not of these data{counts}: at {split} index {i}, {text}. {_REMEDY}")


def _differing_key(stored: Sequence[str], local: Sequence[str], rows: NDArray[np.int64]) -> Difference:
    both = min(len(stored), len(local))
    for i in rows.tolist():
        if i >= both or stored[i] != local[i]:
            cached, actual = (repr(keys[i]) if i < len(keys) else "nothing" for keys in (stored, local))
            return i, f"the cache has {cached}, the dataset {actual}"
    return None


def _differing_label(
    keys: Sequence[str], stored: NDArray[np.int64], local: NDArray[np.int64], rows: NDArray[np.int64]
) -> Difference:
    for i in rows[stored[rows] != local[rows]].tolist():
        return i, f"{keys[i]!r} has label {stored[i]} in the cache and {local[i]} in the dataset"
    return None


def _differing_pixels(
    keys: Sequence[str], stored: Split, local: LocalSplit, rows: NDArray[np.int64], advance: Advance
) -> Difference:
    def digests_of(images: list[int]) -> list[bytes]:
        return [digest(local.read(i)) for i in images]

    with ThreadPoolExecutor(available_cores()) as pool:  # Pillow releases the GIL while it decodes
        for start in range(0, len(rows), SAMPLE):
            batch = rows[start : start + SAMPLE]
            tasks = [batch[i : i + _TASK].tolist() for i in range(0, len(batch), _TASK)]
            digests = itertools.chain.from_iterable(pool.map(digests_of, tasks))
            for i, expected, actual in zip(batch.tolist(), stored.digests.take(batch), digests, strict=True):
                if actual != expected.tobytes():
                    both = f"digest {expected.tobytes().hex()} in the cache, {actual.hex()} in the dataset"
                    return i, f"the pixels of {keys[i]!r} differ: {both}"
            advance(len(batch))
    return None
