"""Random images without the teacher: a cache's pool, whose pixels are drawn again beside the targets that it stores."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tspipe.cache import Cache, Column
from tspipe.errors import CacheMismatch
from tspipe.random_images import PoolImages
from tspipe.randomness import stream
from tspipe.teaching import check_input_shape

_LIVE = "have the teacher label random images live: --set random_source=live"


class Labelled(NamedTuple):
    """Random images and what the teacher said of them, on the CPU."""

    images: Tensor  # (r, C, H, W) float32 in [0, 1), before normalisation
    features: Tensor  # (r, d) float32
    logits: Tensor  # (r, c) float32
    labels: Tensor  # (r,) int64: the largest logit


class RandomPool:
    """The random pool of a cache, in batches. Not for two threads at once.

    Args:
        input_shape: (C, H, W) of the images the students get.
        count: r, the random images of a batch.

    Raises CacheMismatch when the cache has no pool, a smaller one than a batch, one of an unknown generator, or one of
    images of another shape.
    """

    def __init__(self, cache: Cache, input_shape: tuple[int, int, int], count: int):
        if cache.random is None:
            raise CacheMismatch(
                f"{cache.path.name} has no random pool. Make the cache again with one (tspipe cache --force "
                f"--random-pool 10000), or {_LIVE}"
            )
        rows = len(cache.random)
        if rows < count:
            raise CacheMismatch(
                f"{cache.path.name} has a random pool of {rows:,} images, fewer than the {count:,} of a batch. Take "
                f"fewer (--random-images {rows}), make the cache again with more (tspipe cache --force "
                f"--random-pool {count}), or {_LIVE}"
            )
        check_input_shape(cache, input_shape)
        self.rows, self.count = rows, count
        self._stored, self._images = cache.random, PoolImages.of(cache.manifest)

    def batch(self, seed: int, step: int) -> Labelled:
        """The images of a run's batch, its batches counted from 0 over all epochs of a seed.

        The rows follow one another from where the seed begins, around the end of the pool.
        """
        # The word itself, not `integers`, whose way from words to integers another numpy may change.
        offset = int(stream(seed, "random pool offset").bit_generator.random_raw())
        start = (offset + step * self.count) % self.rows
        images = torch.from_numpy(self._images.take(start, self.count))
        features, logits = (
            torch.from_numpy(_around(column, start, self.count)).float()
            for column in (self._stored.features, self._stored.logits)
        )
        return Labelled(images, features, logits, logits.argmax(1))

    def labels(self, most: int) -> Tensor:
        """The labels (n,) int64 of the pool's first images, `most` of them where it has so many."""
        return torch.from_numpy(self._stored.logits[:most]).argmax(1)


def _around(column: Column, start: int, count: int) -> NDArray[Any]:
    """Rows `start` to `start + count − 1`, modulo their number, each in one read or two."""
    beyond = max(0, start + count - len(column))
    rows: NDArray[Any] = column[start : start + count]
    return np.concatenate([rows, column[:beyond]]) if beyond else rows
