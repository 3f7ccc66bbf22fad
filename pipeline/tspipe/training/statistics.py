"""The statistics of a cache that losses ask for: of its training rows, and of its teacher's classifier."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tspipe.cache import Cache
from tspipe.errors import CacheMismatch
from tspipe.losses._statistics import TeacherStatistics
from tspipe.models.teacher import ROUNDING, load_teacher
from tspipe.recipes.schema import Recipe

_CHECKED_ROWS = 256


def cache_statistics(
    cache: Cache, labels: Tensor, recipe: Recipe, input_shape: tuple[int, int, int]
) -> TeacherStatistics:
    """Return the statistics of a cache's training rows; with views, of all views.

    Args:
        labels: (N·V,) int64, the label of each row.
        input_shape: (C, H, W) of an image.
    """

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for first, rows in cache.train.features.pieces():
            yield torch.from_numpy(rows), labels[first : first + len(rows)]

    shape = len(cache.classes), cache.dimensions.width
    return TeacherStatistics(blocks, lambda: _load_classifier(cache, recipe, input_shape), shape)


def _load_classifier(cache: Cache, recipe: Recipe, input_shape: tuple[int, int, int]) -> nn.Linear:
    """Return the teacher's last layer; the rest of the teacher is released.

    Raises CacheMismatch if it does not map the cached features to the cached logits.
    """
    with torch.random.fork_rng(devices=[]):  # a network draws its initial weights
        head = load_teacher(cache, recipe, input_shape, torch.device("cpu")).head
    features, logits = (
        torch.from_numpy(column[:_CHECKED_ROWS]).float() for column in (cache.train.features, cache.train.logits)
    )
    difference = (head(features) - logits).abs().amax(1) / logits.abs().max().clamp(min=1e-12)
    if not difference.median() <= ROUNDING:
        raise CacheMismatch(
            f"{cache.path.name}: the last layer of its teacher does not map the cached features to the cached logits, "
            "so no loss can use it. Choose another loss than simkd and srrl."
        )
    return head
