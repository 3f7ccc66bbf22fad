"""Random images without the teacher: the cache stores its outputs, and the pixels are drawn again."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tspipe.cache import Cache, Column
from tspipe.data.random_images import Photos
from tspipe.data.random_images.pool import PoolImages, kind_of
from tspipe.errors import CacheMismatch
from tspipe.models.output import Output
from tspipe.models.teacher import check_input_shape
from tspipe.training.random_source import RandomBatch, RandomLabels, RandomSource, RandomSpec, draw
from tspipe.utils.device import to_device
from tspipe.utils.rng import stream
from tspipe.utils.threads import prefetch_map

_USE_LIVE = "have the teacher label random images live: --set random_source=live"


class RandomPool(RandomSource):
    """The random pool of a cache, in batches. Not thread-safe.

    Args:
        photos: the training images, for kinds that are made from them.

    Raises CacheMismatch when the cache has no pool, a pool smaller than a batch, one of an unknown generator or kind,
    or one of images of another shape.
    """

    def __init__(self, cache: Cache, spec: RandomSpec, photos: Photos):
        if cache.random is None:
            raise CacheMismatch(
                f"{cache.path.name} has no random pool. Make the cache again with one (tspipe cache --force "
                f"--random-pool 10000), or {_USE_LIVE}"
            )
        if (rows := len(cache.random)) < spec.count:
            raise CacheMismatch(
                f"{cache.path.name} has a random pool of {rows:,} images, fewer than the {spec.count:,} of a batch. "
                f"Use fewer (--random-images {rows}), make the cache again with more (tspipe cache --force "
                f"--random-pool {spec.count}), or {_USE_LIVE}"
            )
        check_input_shape(cache, spec.shape)
        super().__init__(spec)
        self._stored, kind = cache.random, kind_of(cache.manifest, photos)
        candidates = None if cache.random.candidates is None else cache.random.candidates.load()
        self._images = PoolImages(kind, cache.manifest["random"], cache.dimensions.block_rows, candidates)

    def batches(self, seed: int, epoch: int, numbers: Sequence[int]) -> Iterator[RandomBatch]:
        """Yield the batches; a thread draws each while the previous one is used."""
        steps = [epoch * self.spec.batches_per_epoch + number for number in numbers]
        for images, output, labels in prefetch_map(partial(self.batch, seed), steps):
            local = [to_device(self.spec.local_rows(t), self.spec.device) for t in (images, *output, labels)]
            yield RandomBatch(self.spec.preprocess.normalise(local[0]), Output(*local[1:3]), local[3])

    def batch(self, seed: int, step: int) -> RandomBatch:
        """Return one batch on the CPU, before normalisation.

        Rows follow those of the previous step, wrapping around the end of the pool, from an offset that depends on the
        seed. Steps are counted from 0 over all epochs of a seed.
        """
        # The raw word, not `integers`, whose mapping from words to integers may change between NumPy versions.
        offset = int(stream(seed, "random pool offset").bit_generator.random_raw())
        start = (offset + step * self.spec.count) % len(self._stored)
        images, labels = draw(self._images.kind, self._images.numbers(start, self.spec.count))
        columns = self._stored.features, self._stored.logits
        output = Output(*(torch.from_numpy(_wrapped_rows(c, start, self.spec.count)).float() for c in columns))
        return RandomBatch(images, output, labels)

    def first_labels(self, count: int) -> RandomLabels:
        return RandomLabels(torch.from_numpy(self._stored.logits[:count]).argmax(1))


def _wrapped_rows(column: Column, start: int, count: int) -> NDArray[Any]:
    """Return rows `start` to `start + count − 1`, modulo the number of rows, in one read or two."""
    overflow = max(0, start + count - len(column))
    rows: NDArray[Any] = column[start : start + count]
    return np.concatenate([rows, column[:overflow]]) if overflow else rows
