"""Random images without the teacher: a cache's pool, whose pixels are drawn again beside the targets that it stores."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tspipe.cache import Cache, Column
from tspipe.data.preprocess import Preprocess
from tspipe.data.random_images import PoolImages
from tspipe.errors import CacheMismatch
from tspipe.models.output import Output
from tspipe.models.teacher import check_input_shape
from tspipe.utils.device import sent
from tspipe.utils.rng import stream
from tspipe.utils.threads import ahead

_LIVE = "have the teacher label random images live: --set random_source=live"


class RandomPool:
    """The random pool of a cache, in batches. Not for two threads at once.

    Args:
        preprocess: how images are normalised.
        count: r, the random images of a batch.
        shape: (C, H, W) of the images the students get.
        device: where batches are wanted.
        part: what this process takes of a batch, where several split it.

    Raises CacheMismatch when the cache has no pool, a smaller one than a batch, one of an unknown generator, or one of
    images of another shape.
    """

    def __init__(
        self,
        cache: Cache,
        preprocess: Preprocess,
        count: int,
        shape: tuple[int, int, int],
        device: torch.device,
        part: Callable[[Tensor], Tensor] = lambda rows: rows,
    ):
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
        check_input_shape(cache, shape)
        self.rows, self.count, self.device, self._part = rows, count, device, part
        self._stored, self._images, self._preprocess = cache.random, PoolImages.of(cache.manifest), preprocess

    def batches(self, seed: int, steps: Sequence[int]) -> Iterator[tuple[Tensor, Output]]:
        """For each of a run's batches normalised images (r, C, H, W), and the teacher's features and logits.

        They are on the device, and drawn a batch ahead in a thread. Steps are counted from 0 over a seed's epochs.
        """
        for drawn, said in ahead(partial(self.batch, seed), steps):
            images, features, logits = (sent(self._part(rows), self.device) for rows in (drawn, *said))
            yield self._preprocess.normalise(images), Output(features, logits)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Output]:
        """One batch before normalisation, on the CPU: images (r, C, H, W) float32 in [0, 1), and what was said of them.

        Its rows follow those of the step before, around the end of the pool, from where the seed begins.
        """
        # The word itself, not `integers`, whose way from words to integers another numpy may change.
        offset = int(stream(seed, "random pool offset").bit_generator.random_raw())
        start = (offset + step * self.count) % self.rows
        images = torch.from_numpy(self._images.take(start, self.count))
        columns = self._stored.features, self._stored.logits
        said = Output(*(torch.from_numpy(_around(column, start, self.count)).float() for column in columns))
        return images.contiguous(memory_format=torch.channels_last), said  # as the pixels come

    def labels(self, most: int) -> Tensor:
        """The labels (n,) int64 of the pool's first images, `most` of them where it has so many."""
        return torch.from_numpy(self._stored.logits[:most]).argmax(1)


def _around(column: Column, start: int, count: int) -> NDArray[Any]:
    """Rows `start` to `start + count − 1`, modulo their number, each in one read or two."""
    beyond = max(0, start + count - len(column))
    rows: NDArray[Any] = column[start : start + count]
    return np.concatenate([rows, column[:beyond]]) if beyond else rows
