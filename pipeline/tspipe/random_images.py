"""The paper's random images: noise that only the teacher can label (arXiv 2005.00393, section 3).

Pixels are U[0, 1), independent per pixel and channel, in pixel space, and then normalised as real images are. The
teacher's argmax is their label, its features their regression target. They are drawn fresh for every batch, or once:
stage one labels a pool of them, of which the cache keeps the targets and the seed that draws the same pixels again.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tspipe.cache import Manifest
from tspipe.errors import CacheMismatch
from tspipe.randomness import stream

_GENERATOR = "mt19937"
_SEED = 0  # of a pool: a cache is made once


def uniform(seed: int, epoch: int, batch: int, count: int, shape: tuple[int, int, int]) -> Tensor:
    """`count` random images of `shape` (C, H, W) for one batch: (count, C, H, W) float32 in [0, 1), on the CPU.

    Each pixel is the top 24 bits of one Mersenne Twister word, divided by 2^24.
    """
    return torch.from_numpy(stream(seed, "random images", epoch, batch).random((count, *shape), dtype="float32"))


def described(rows: int) -> Manifest:
    """What a cache's manifest says of a pool of so many random images, if stage one makes it now."""
    return {"generator": _GENERATOR, "rows": rows, "seed": _SEED}


class PoolImages:
    """The random images of a pool, drawn again from its seed; cache/README.md says which words make which pixel.

    Each block of `block_rows` images has a generator of its own, which draws them one after the other. It is kept where
    it is, so that consecutive batches draw nothing twice and no more than themselves is held. Not for two threads at
    once.

    Args:
        seed: of the pool.
        rows: P, how many images it has.
        block_rows: images of a block; the last may have fewer.
        shape: (C, H, W) of an image.
    """

    def __init__(self, seed: int, rows: int, block_rows: int, shape: tuple[int, int, int]):
        self.seed, self.rows, self.block_rows, self.shape = seed, rows, block_rows, shape
        self._block = -1
        self._drawn = 0  # images of the block that its generator has drawn

    @classmethod
    def of(cls, manifest: Manifest) -> "PoolImages":
        """The pool that a manifest describes, of images of its teacher's input shape, which the caller has checked.

        Raises CacheMismatch when it was drawn by another generator.
        """
        random, shape = manifest["random"], manifest["teacher"]["options"]["input_shape"]
        if random["generator"] != _GENERATOR:
            raise CacheMismatch(
                f"The cache's random pool was drawn by {random['generator']!r}, and this tspipe knows {_GENERATOR!r} "
                "only. Take a newer tspipe, or have the teacher label random images live: --set random_source=live"
            )
        return cls(random["seed"], random["rows"], manifest["block_rows"], tuple(shape))

    def take(self, start: int, count: int) -> NDArray[np.float32]:
        """Images `start` to `start + count − 1`, modulo P: (count, C, H, W) float32 in [0, 1), before normalisation."""
        images, done = np.empty((count, *self.shape), np.float32), 0
        while done < count:
            row = (start + done) % self.rows
            block, first = divmod(row, self.block_rows)
            part = images[done : done + min(self.block_rows - first, self.rows - row)]
            self._go_to(block, first)
            self._generator.random(out=part, dtype=np.float32)
            self._drawn += len(part)
            done += len(part)
        return images

    def _go_to(self, block: int, first: int) -> None:
        """Have the generator draw image `first` of a block next."""
        if block != self._block or first < self._drawn:
            self._block, self._drawn = block, 0
            self._generator = stream(self.seed, "random pool", 0, block)
        if skipped := first - self._drawn:  # a pixel is one word
            self._generator.bit_generator.random_raw(skipped * math.prod(self.shape), output=False)
            self._drawn = first
