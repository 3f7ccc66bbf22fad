"""Compares a cache with local data: rows in another order, split or version would give students wrong targets."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tspipe.cache.layout import digest
from tspipe.errors import CacheMismatch
from tspipe.utils.threads import available_cores

_TASK = 16  # images per thread and task: scheduling single ones costs more than decoding a small JPEG
SAMPLE = 256  # images whose pixels are compared by default; None compares all
_REMEDY = "Give the data that the cache was made from (--data), or make the cache again (tspipe cache --force)."


class Stored(Protocol):
    """The columns of a split that identify the images of its rows."""

    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def keys(self) -> "Rows": ...
    @property
    def digests(self) -> "Rows": ...


class Rows(Protocol):
    """Rows in a file."""

    def load(self) -> NDArray[np.generic]: ...
    def take(self, rows: NDArray[np.int64]) -> NDArray[np.generic]: ...


class Local(Protocol):
    """A local dataset's split; `tspipe.data.datasets.Images` is one."""

    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def read(self) -> Callable[[int], NDArray[np.uint8]]: ...


def match_classes(name: str, stored: Sequence[str], local: Sequence[str]) -> None:
    """Compare class names. Raises CacheMismatch naming the first that differs."""
    if len(stored) != len(local):
        raise CacheMismatch(f"{name} has {len(stored)} classes, the dataset {len(local)}. {_REMEDY}")
    for i, (cached, actual) in enumerate(zip(stored, local, strict=True)):
        if cached != actual:
            raise CacheMismatch(f"{name}: class {i} is {cached!r} in the cache, {actual!r} in the dataset. {_REMEDY}")


def match_split(
    name: str,
    split: str,
    stored: Stored,
    local: Local,
    *,
    rows: NDArray[np.int64] | None = None,
    sample: int | None = SAMPLE,
    advance: Callable[[int], object] = lambda images: None,
) -> None:
    """Compare a split's keys and labels, and the pixels of a random sample, with the local dataset.

    Args:
        name: the cache's name in error messages.
        rows: the rows to compare, of an unfinished file; None compares all rows and their number.
        sample: how many images to compare by digest; None for all.
        advance: called with the number of images compared since the last call.

    Raises CacheMismatch naming the first image that differs: its key, its index, and both values.
    """
    keys = [key.decode("utf-8", "replace") for key in stored.keys.load().tolist()]
    local_keys = local.keys
    for i in range(len(keys)) if rows is None else rows.tolist():
        if i >= len(local_keys) or keys[i] != local_keys[i]:
            local_key = repr(local_keys[i]) if i < len(local_keys) else "nothing"
            _differs(name, split, i, f"the cache has {keys[i]!r}, the dataset {local_key}", keys, local_keys)
    if rows is None and len(local_keys) > len(keys):
        i = len(keys)
        _differs(name, split, i, f"the cache has nothing, the dataset {local_keys[i]!r}", keys, local_keys)
    rows = np.arange(len(keys)) if rows is None else rows
    wrong = rows[stored.labels[rows] != local.labels[rows]]
    if len(wrong):
        i = int(wrong[0])
        what = f"{keys[i]!r} has label {stored.labels[i]} in the cache and {local.labels[i]} in the dataset"
        _differs(name, split, i, what, keys, local_keys)
    if sample is not None and sample < len(rows):
        rows = np.sort(np.random.default_rng().choice(rows, sample, replace=False))

    def digests_of(images: list[int]) -> list[bytes]:
        return [digest(local.read(i)) for i in images]

    with ThreadPoolExecutor(available_cores()) as pool:  # Pillow releases the GIL while it decodes
        for start in range(0, len(rows), SAMPLE):
            some = rows[start : start + SAMPLE]
            tasks = [some[i : i + _TASK].tolist() for i in range(0, len(some), _TASK)]
            digests = itertools.chain.from_iterable(pool.map(digests_of, tasks))
            for i, expected, actual in zip(some.tolist(), stored.digests.take(some), digests, strict=True):
                if actual != expected.tobytes():
                    both = f"digest {expected.tobytes().hex()} in the cache, {actual.hex()} in the dataset"
                    what = f"the pixels of {keys[i]!r} differ: {both}"
                    _differs(name, split, i, what, keys, local_keys)
            advance(len(some))


def _differs(name: str, split: str, i: int, what: str, stored: Sequence[str], local: Sequence[str]) -> None:
    counts = "" if len(stored) == len(local) else f" ({len(stored):,} images cached, {len(local):,} in the dataset)"
    raise CacheMismatch(f"{name} is not of these data{counts}: at {split} index {i}, {what}. {_REMEDY}")
