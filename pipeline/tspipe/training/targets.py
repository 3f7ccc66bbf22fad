"""The cached targets that students learn from."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tspipe.cache import Cache, Column
from tspipe.errors import RecipeError
from tspipe.losses import Target
from tspipe.recipes.schema import Recipe
from tspipe.utils.device import batches_to_device, to_device
from tspipe.utils.rng import stream

# Batches announced to the system before they are read: 47,000 cold rows of 4 KiB a second, and 22,000 with 4.
READ_AHEAD = 32
SLOW_ROW = 3e-5  # seconds a row: a read from memory takes 1 to 4 µs, one from a disk 80 µs and more
GATHER_BYTES = 2**20  # gathered at once: small batches one by one would spend half their time in Python
_VARIANCE_ROWS = 10_000  # cached rows that mse_weight=auto looks at


class TargetLoader:
    """The cached targets of a split, held on the device if they fit, else read row by row.

    Args:
        columns: features (N, d) and logits (N, c); with V views per image, N·V rows.
        labels: the label of each row, int64.
        needs: the columns that the losses use; the other one is yielded with no columns.
        memory: bytes that may be held.
        device: where batches are used.
    """

    def __init__(
        self, columns: dict[str, Column], labels: Tensor, needs: frozenset[str], memory: int, device: torch.device
    ):
        self.needs, self.device, self._labels = needs, device, labels.to(device)
        used = {name: column for name, column in columns.items() if name in needs}
        stored_bytes = sum(column.nbytes for column in used.values())
        float32_bytes = sum(4 * math.prod(column.shape) for column in used.values())
        # float32 where there is room, so that a batch takes one copy; else as stored.
        dtype = torch.float32 if float32_bytes <= memory else None
        fits = stored_bytes <= memory
        self._held = {name: _load(column, dtype).to(device) for name, column in used.items()} if fits else {}
        self._read = {} if fits else used
        self._row_bytes = 8 + sum(4 * math.prod(column.shape[1:]) for column in used.values())
        self._empty = torch.empty(0, 0, device=device)

    def batches(self, order: Sequence[Tensor]) -> Iterator[Target]:
        """Yield the targets for each batch of row indices (n,) int64.

        Several small batches are gathered together, and are then views of one tensor. Rows that are not held are read;
        where reading is slow, the system is told some batches ahead.
        """
        largest = max(map(len, order), default=0) or 1  # one of several processes may have no rows of a batch
        per_group = max(1, GATHER_BYTES // (largest * self._row_bytes))
        groups = [order[i : i + per_group] for i in range(0, len(order), per_group)]
        rows = [torch.cat(list(group)) if len(group) > 1 else group[0] for group in groups]
        read = self._read_groups(rows, -(-READ_AHEAD // per_group)) if self._read else itertools.repeat({})
        for group, device_rows, columns in zip(groups, batches_to_device(rows, self.device), read, strict=False):
            yield from self._gather([len(batch) for batch in group], device_rows, columns)

    def _gather(self, sizes: list[int], rows: Tensor, read: dict[str, Tensor]) -> Iterator[Target]:
        columns = read | {name: held.index_select(0, rows) for name, held in self._held.items()}
        labels = self._labels.index_select(0, rows)
        target = self.select(labels, **{name: column.float() for name, column in columns.items()})
        return map(Target, *(part.split(sizes) for part in target)) if len(sizes) > 1 else iter([target])

    def _read_groups(self, groups: Sequence[Tensor], ahead: int) -> Iterator[dict[str, Tensor]]:
        """Yield each group's rows that are not held; after a slow read, announce `ahead` groups in advance."""
        announced, slow = 0, False
        for i, rows in enumerate(groups):
            if slow:
                for later in groups[max(announced, i) : i + ahead + 1]:
                    for column in self._read.values():
                        column.advise(later.numpy())
                announced = i + ahead + 1
            start = time.perf_counter()
            columns = {name: torch.from_numpy(column.take(rows.numpy())) for name, column in self._read.items()}
            slow = slow or time.perf_counter() - start > SLOW_ROW * len(rows)
            yield {name: to_device(column, self.device) for name, column in columns.items()}

    def select(self, labels: Tensor, features: Tensor | None = None, logits: Tensor | None = None) -> Target:
        """Return a target with only what the losses need; the rest has no columns."""
        if len(self._empty) != len(labels):
            self._empty = torch.empty(len(labels), 0, device=self.device)
        return Target(
            features if features is not None and "features" in self.needs else self._empty,
            logits if logits is not None and "logits" in self.needs else self._empty,
            labels,
        )


def _load(column: Column, dtype: torch.dtype | None) -> Tensor:
    """Return a column as this type, or as stored; no second copy of it is made."""
    out = torch.from_numpy(np.empty(column.shape, column.dtype if dtype is None else np.float32))
    for first, rows in column.pieces():
        out[first : first + len(rows)] = torch.from_numpy(rows)
    return out


def resolve_mse_weight(recipe: Recipe, cache: Cache) -> Recipe:
    """Return the recipe with a number in place of `mse_weight=auto`: 1 / the variance of a cached feature.

    The variance is over at most 10,000 training rows, averaged over features. With it, predicting the mean feature has
    a loss of 1, whatever the scale of the teacher's features.
    """
    if recipe.mse_weight != "auto":
        return recipe
    rows = np.sort(stream(0, "variance of features").permutation(len(cache.train.features))[:_VARIANCE_ROWS])
    variance = float(cache.train.features.take(rows).astype(np.float64).var(axis=0).mean())
    if not variance > 0:
        raise RecipeError(
            f"All cached features of {cache.path.name} are equal, so mse_weight=auto has no variance to divide by. "
            "Give a number: --set mse_weight=1"
        )
    return recipe.model_copy(update={"mse_weight": 1 / variance})


def row_labels(cache: Cache, labels: Literal["dataset", "teacher"] = "dataset") -> Tensor:
    """Return the label of each row of the training targets, (N·V,) int64: the dataset's or the teacher's."""
    if labels == "teacher":
        return teacher_labels(cache.train.logits)
    return torch.from_numpy(cache.train.labels).repeat_interleave(cache.dimensions.views_of("train"))


def teacher_labels(logits: Column) -> Tensor:
    """Return the teacher's label for each row of logits (n, c), (n,) int64."""
    return torch.from_numpy(np.concatenate([rows.argmax(1) for _, rows in logits.pieces()]))
