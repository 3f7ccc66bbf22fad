"""What students learn from: the cached targets, and the live teacher."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tspipe.cache import Cache, Column
from tspipe.errors import RecipeError
from tspipe.losses import Target
from tspipe.recipes.schema import Recipe
from tspipe.utils.device import moved, sent
from tspipe.utils.rng import stream

# Batches that the system is asked to read before they are wanted: 47,000 cold rows of 4 KiB a second; 22,000 with 4.
AHEAD = 32
AT_ONCE = 3e-5  # seconds for a row that need not be asked for: 1 to 4 µs from memory, 80 and more from a disk
TAKEN = 2**20  # bytes of targets taken together: small batches one by one would be half Python
_VARIANCE_OF = 10_000  # the most cached rows that mse_weight=auto looks at


class Targets:
    """The cached targets of a split: held where batches are wanted if they fit, else read row by row.

    Args:
        columns: features (N, d) and logits (N, c); with V views of an image N·V rows.
        labels: of each row, int64.
        needs: which of them the losses want; the others come with no columns.
        memory: bytes that may be held.
    """

    def __init__(
        self, columns: dict[str, Column], labels: Tensor, needs: frozenset[str], memory: int, device: torch.device
    ):
        self.needs, self.device, self._labels = needs, device, labels.to(device)
        wanted = {name: column for name, column in columns.items() if name in needs}
        stored = sum(column.nbytes for column in wanted.values())
        single = sum(4 * math.prod(column.shape) for column in wanted.values())
        # As float32 where there is room, so that taking a batch is one copy; else as they are stored.
        dtype = torch.float32 if single <= memory else None
        fits = stored <= memory
        self._held = {name: torch.from_numpy(c.load()).to(device, dtype) for name, c in wanted.items()} if fits else {}
        self._read = {} if fits else wanted
        self._row_bytes = 8 + sum(4 * math.prod(column.shape[1:]) for column in wanted.values())
        self._nothing = torch.empty(0, 0, device=device)

    def batches(self, order: Sequence[Tensor]) -> Iterator[Target]:
        """The targets of each batch of indices (n,) int64, views of what was taken for several small ones together.

        What is not held is read; where that takes time, the system is asked for it some batches ahead.
        """
        most = max(map(len, order), default=0) or 1  # of several processes, one may have no images of a batch
        several = max(1, TAKEN // (most * self._row_bytes))
        groups = [order[i : i + several] for i in range(0, len(order), several)]
        rows = [torch.cat(list(group)) if len(group) > 1 else group[0] for group in groups]
        read = self._read_in_order(rows, -(-AHEAD // several)) if self._read else itertools.repeat({})
        for group, there, found in zip(groups, moved(rows, self.device), read, strict=False):
            yield from self._taken([len(batch) for batch in group], there, found)

    def _taken(self, sizes: list[int], rows: Tensor, read: dict[str, Tensor]) -> Iterator[Target]:
        found = read | {name: held.index_select(0, rows) for name, held in self._held.items()}
        whole = self.only(self._labels.index_select(0, rows), **{name: part.float() for name, part in found.items()})
        return map(Target, *(part.split(sizes) for part in whole)) if len(sizes) > 1 else iter([whole])

    def _read_in_order(self, groups: Sequence[Tensor], ahead: int) -> Iterator[dict[str, Tensor]]:
        """Each group's rows of what is not held. Once some came slowly, so many groups are asked for ahead."""
        asked, slow = 0, False
        for i, rows in enumerate(groups):
            if slow:
                for later in groups[max(asked, i) : i + ahead + 1]:
                    for column in self._read.values():
                        column.advise(later.numpy())
                asked = i + ahead + 1
            start = time.perf_counter()
            found = {name: torch.from_numpy(column.take(rows.numpy())) for name, column in self._read.items()}
            slow = slow or time.perf_counter() - start > AT_ONCE * len(rows)
            yield {name: sent(part, self.device) for name, part in found.items()}

    def only(self, labels: Tensor, features: Tensor | None = None, logits: Tensor | None = None) -> Target:
        """A target without what no loss needs."""
        if len(self._nothing) != len(labels):
            self._nothing = torch.empty(len(labels), 0, device=self.device)
        return Target(
            features if features is not None and "features" in self.needs else self._nothing,
            logits if logits is not None and "logits" in self.needs else self._nothing,
            labels,
        )


def weighted(recipe: Recipe, cache: Cache) -> Recipe:
    """The recipe with a number for `mse_weight=auto`: 1 / variance, with which the mean feature has a loss of 1.

    The variance is that of a feature over training images, 10,000 of them, and its mean over features. Whatever the
    teacher's features are multiplied by, the loss of a student multiplied alike stays what it is.
    """
    if recipe.mse_weight != "auto":
        return recipe
    rows = np.sort(stream(0, "variance of features").permutation(len(cache.train.features))[:_VARIANCE_OF])
    variance = float(cache.train.features.take(rows).astype(np.float64).var(axis=0).mean())
    if not variance > 0:
        raise RecipeError(
            f"All cached features of {cache.path.name} are the same, so mse_weight=auto has nothing to go by. "
            "Give a number: --set mse_weight=1"
        )
    return recipe.model_copy(update={"mse_weight": 1 / variance})


def row_labels(cache: Cache) -> Tensor:
    """The label of each row of the training targets, (N·V,) int64."""
    return torch.from_numpy(cache.train.labels).repeat_interleave(cache.dimensions.views_of("train"))
