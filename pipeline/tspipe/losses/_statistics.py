"""What a cache says of its teacher: what a loss's constructor may ask for by the names of its parameters."""

import copy
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

_MEMORY_ROWS = 2**16


class Memory(NamedTuple):
    """Cached rows to compare images with: the teacher's features (k, d), as stored, and labels (k,) int64."""

    features: Tensor
    labels: Tensor


class _Sums(NamedTuple):
    """Over all rows, float64: sums of each class's features (c, d) and of squares (d,), and rows of each class (c,)."""

    features: Tensor
    squares: Tensor
    rows: Tensor


class TeacherStatistics:
    """Statistics of a cache's training rows, each computed when it is first used; all are on the CPU, float32.

    Args:
        blocks: yields the rows in blocks, as features (n, d) of any floating-point type and labels (n,) int64.
        load_classifier: loads the teacher's last layer, nn.Linear(d, c).
        shape: (c, d).
    """

    def __init__(
        self,
        blocks: Callable[[], Iterable[tuple[Tensor, Tensor]]],
        load_classifier: Callable[[], nn.Linear],
        shape: tuple[int, int],
    ):
        self.blocks, self._load_classifier, self._shape = blocks, load_classifier, shape

    @classmethod
    def placeholder(cls, feature_dim: int, num_classes: int) -> "TeacherStatistics":
        """Return placeholders: the statistics of two random rows of each class, and a random classifier."""
        generator = torch.Generator().manual_seed(0)
        features = torch.rand(2 * num_classes, feature_dim, generator=generator)
        labels = torch.arange(2 * num_classes) % num_classes
        return cls(
            lambda: [(features, labels)], lambda: nn.Linear(feature_dim, num_classes), (num_classes, feature_dim)
        )

    @property
    def classifier(self) -> nn.Linear:
        """A copy of the teacher's last layer, which maps features (n, d) to logits (n, c); it is not trained."""
        return copy.deepcopy(self._classifier)

    @cached_property
    def _classifier(self) -> nn.Linear:
        return self._load_classifier().requires_grad_(False)

    @property
    def class_means(self) -> Tensor:
        """The mean features of each class, (c, d); the mean of all rows for a class without images."""
        sums = self._sums
        means = sums.features / sums.rows.clamp(min=1)[:, None]
        return torch.where(sums.rows[:, None] > 0, means, self._mean).float()

    @property
    def feature_mean(self) -> Tensor:
        """The mean of each feature, (d,)."""
        return self._mean.float()

    @property
    def feature_std(self) -> Tensor:
        """The standard deviation of each feature, (d,); 1 for a feature that does not vary."""
        sums = self._sums
        variance = (sums.squares / sums.rows.sum() - self._mean**2).clamp(min=0)
        std = variance.sqrt()
        return std.where(std > 1e-6 * std.max(), 1).float()

    @cached_property
    def is_nonnegative(self) -> bool:
        """Whether no feature is below 0, as after a ReLU."""
        return all(bool(features.min() >= 0) for features, _ in self.blocks())

    @cached_property
    def memory(self) -> Memory:
        """All rows or, of more than 65,536, as many at equal distances."""
        step = -(-int(self._sums.rows.sum()) // _MEMORY_ROWS)
        first, parts = 0, list[Memory]()
        for features, labels in self.blocks():
            chosen = slice(-first % step, None, step)
            parts.append(Memory(features[chosen], labels[chosen]))
            first += len(labels)
        return Memory(*map(torch.cat, zip(*parts, strict=True)))

    @property
    def _mean(self) -> Tensor:
        return self._sums.features.sum(0) / self._sums.rows.sum()

    @cached_property
    def _sums(self) -> _Sums:
        sums = _Sums(
            *(torch.zeros(shape, dtype=torch.float64) for shape in (self._shape, self._shape[1], self._shape[0]))
        )
        for features, labels in self.blocks():
            values = features.double()
            sums.features.index_add_(0, labels, values)
            sums.squares.add_((values**2).sum(0))
            sums.rows.add_(labels.bincount(minlength=len(sums.rows)))
        return sums


# A loss's constructor asks for statistics by these names.
NAMES = frozenset({"class_means", "classifier", "feature_mean", "feature_std", "is_nonnegative", "memory"})
