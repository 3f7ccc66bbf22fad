"""Random images with the teacher's output for them; the sources are the live teacher and the random pool."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tspipe.cache import Cache
from tspipe.data.preprocess import Preprocess
from tspipe.data.random_images import Generator, Kind, pool
from tspipe.models.output import Output
from tspipe.models.teacher import lacks_teacher
from tspipe.recipes.schema import Recipe
from tspipe.utils.timing import Stopwatch


@dataclass(frozen=True)
class RandomSpec:
    """The random images that a run adds to its batches.

    Attributes:
        count: random images per batch, over all processes.
        shape: (C, H, W) of an image.
        batches_per_epoch: batches per epoch, so that one sequence of images can run through all epochs.
        preprocess: how images are normalised.
        device: where batches are used.
        local_rows: selects this process's rows of a batch.
    """

    count: int
    shape: tuple[int, int, int]
    batches_per_epoch: int
    preprocess: Preprocess
    device: torch.device
    local_rows: Callable[[Tensor], Tensor] = lambda rows: rows


@dataclass(frozen=True)
class LiveSpec:
    """How the images of a live source are drawn.

    Attributes:
        kind: returns the kind of a seed's images; kinds that are made from photos use those that the seed trains on.
        classes: the number of classes.
        rounds: with balanced labels, the most candidates for each image; None for images that are not balanced.
    """

    kind: Callable[[int], Kind]
    classes: int
    generator: Generator = "mt19937"
    rounds: int | None = None


class RandomLabels(NamedTuple):
    """The teacher's labels (n,) int64 for random images, and for all candidates among which they were chosen."""

    labels: Tensor
    candidates: Tensor | None = None


def without_live_teacher(recipe: Recipe, cache: Cache) -> tuple[Recipe, str]:
    """Return a recipe that needs no live teacher if the cache's cannot be built, and a sentence that says what changed.

    Random images then come from the cache's random pool or, if it has none, are left out.
    """
    if not recipe.random_images or recipe.random_source == "pool" or not lacks_teacher(cache, recipe):
        return recipe, ""
    network = cache.manifest["teacher"]["network"]
    changes: dict[str, object] = {"random_images": 0}
    consequence = "students train without random images"
    if cache.random is not None and len(cache.random) >= recipe.random_images:
        changes = {"random_source": "pool", **pool.facts(cache.manifest)}
        consequence = "random images come from the pool in the file"
    remedy = f"needs the file of its network (--teacher ./{network}.py)" if cache.has_teacher else "is not in the file"
    return recipe.model_copy(update=changes), f"The teacher of {cache.name} {remedy}, so {consequence}."


class RandomSource(ABC):
    """A source of random images.

    Attributes:
        stopwatch: how long the teacher has worked; this time overlaps with the students'. A pool leaves it at zero.
    """

    def __init__(self, spec: RandomSpec):
        self.spec, self.stopwatch = spec, Stopwatch(spec.device)

    @abstractmethod
    def batches(self, seed: int, epoch: int, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Output]]:
        """Yield normalised images (r, C, H, W) and the teacher's output for each of these batches of an epoch."""

    @abstractmethod
    def first_labels(self, count: int) -> RandomLabels:
        """Return the teacher's labels for the first `count` random images, or as many as there are."""
