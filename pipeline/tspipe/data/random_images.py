"""The paper's random images: noise that only the teacher can label (arXiv 2005.00393, section 3).

Pixels are U[0, 1), independent per pixel and channel, in pixel space, and then normalised as real images are. The
teacher's argmax is their label, its features their regression target. They are drawn anew for every batch, or once:
stage one labels a pool of them, and the cache stores the targets and the seed that draws the same pixels again.

Of the two generators that the paper names, the Mersenne Twister is the default. The other, a linear congruential
generator, is MINSTD (Park and Miller, Communications of the ACM 31, 1988): x ← 16807 · x mod 2^31 − 1. All its seeds
start on one cycle of 2^31 − 2 numbers, which a few thousand batches exhaust.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tspipe.errors import CacheMismatch
from tspipe.utils.rng import stream

if TYPE_CHECKING:
    from tspipe.cache import Manifest

Generator = Literal["mt19937", "minstd"]
_SEED = 0  # of a pool: a cache is made once
_A, _M = 16807, 2**31 - 1  # MINSTD's


def uniform(seed: int, epoch: int, batch: int, count: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Draw `count` random images of `shape` (C, H, W) for one batch: (count, C, H, W) float32 in [0, 1).

    Each pixel is the top 24 bits of one Mersenne Twister word, divided by 2^24.
    """
    return stream(seed, "random images", epoch, batch).random((count, *shape), dtype=np.float32)


def congruential(seed: int, batch: int, count: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Draw images as `uniform` does, with MINSTD: one stream per seed, whose batches are counted over all epochs."""
    size = count * math.prod(shape)
    words = minstd(minstd_start(seed, "random images"), batch * size, size)
    return _pixels(words).reshape(count, *shape)


def minstd(start: int, skipped: int, count: int) -> NDArray[np.uint64]:
    """Return MINSTD's numbers (count,) in 1 … 2^31 − 2 that follow the first `skipped` ones from `start`."""
    first = np.uint64(start * pow(_A, skipped, _M) % _M)
    return first * _powers(count) % np.uint64(_M)  # below 2^62


def minstd_start(seed: int, purpose: str) -> int:
    """Return the number on MINSTD's cycle at which the stream of a (seed, purpose) begins."""
    return 1 + int(stream(seed, purpose).bit_generator.random_raw()) % (_M - 1)


@lru_cache(maxsize=2)
def _powers(count: int) -> NDArray[np.uint64]:
    """Return 16807^i mod 2^31 − 1 for i from 0 to count − 1."""
    powers = np.ones(1, np.uint64)
    while len(powers) < count:
        powers = np.concatenate([powers, powers * np.uint64(pow(_A, len(powers), _M)) % np.uint64(_M)])
    return powers[:count]


def _pixels(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Return the top 24 of MINSTD's 31 bits as a number in [0, 1)."""
    return (words >> np.uint64(7)).astype(np.float32) / np.float32(2**24)


def period_warning(generator: Generator, images: int, subject: str, shape: tuple[int, int, int]) -> str | None:
    """Return a sentence on the generator's period and whether `images` exceed it; None for the Mersenne Twister.

    Args:
        subject: what draws the images, as the subject of a sentence.
        shape: (C, H, W) of an image.
    """
    if generator != "minstd":
        return None
    limit = (_M - 1) // math.prod(shape)
    comparison = "more than that: then the same numbers come again" if images > limit else "no more than that"
    sides = "×".join(map(str, shape))
    return f"The period of minstd is spent after {limit:,} images of {sides}. {subject} draws {images:,}, {comparison}."


def manifest_section(rows: int, generator: Generator = "mt19937") -> Manifest:
    """Return the section `random` of the manifest of a cache with a pool of `rows` random images."""
    return {"generator": generator, "rows": rows, "seed": _SEED}


class PoolImages:
    """The random images of a pool, drawn again from its seed; cache/README.md defines the words of each pixel.

    Each block of `block_rows` images has a Mersenne Twister, which draws them in order. Its state is kept, so that
    consecutive batches draw no number twice and only one batch is in memory. MINSTD has one stream for all blocks.
    Not thread-safe.

    Args:
        seed: the pool's seed.
        rows: P, the number of images.
        block_rows: images per block; the last may have fewer.
        shape: (C, H, W) of an image.
    """

    def __init__(
        self,
        seed: int,
        rows: int,
        block_rows: int,
        shape: tuple[int, int, int],
        generator: Generator = "mt19937",
    ):
        self.seed, self.rows, self.block_rows, self.shape = seed, rows, block_rows, shape
        self._minstd = minstd_start(seed, "random pool") if generator == "minstd" else None
        self._block = -1
        self._drawn = 0  # images of the block that its generator has drawn

    @classmethod
    def of(cls, manifest: Manifest) -> PoolImages:
        """Return the pool that a manifest describes; the caller has checked its teacher's input shape.

        Raises CacheMismatch when it was drawn by another generator.
        """
        random, shape = manifest["random"], manifest["teacher"]["options"]["input_shape"]
        if random["generator"] not in (known := get_args(Generator)):
            raise CacheMismatch(
                f"The cache's random pool was drawn by {random['generator']!r}, and this tspipe knows "
                f"{' and '.join(known)} only. Take a newer tspipe, or have the teacher label random images live: "
                "--set random_source=live"
            )
        return cls(random["seed"], random["rows"], manifest["block_rows"], tuple(shape), random["generator"])

    def take(self, start: int, count: int) -> NDArray[np.float32]:
        """Return images `start` to `start + count − 1`, modulo P: (count, C, H, W) float32 in [0, 1)."""
        images, done = np.empty((count, *self.shape), np.float32), 0
        while done < count:
            row = (start + done) % self.rows
            block, first = divmod(row, self.block_rows)
            part = images[done : done + min(self.block_rows - first, self.rows - row)]
            if self._minstd is None:
                self._seek(block, first)
                self._generator.random(out=part, dtype=np.float32)
                self._drawn += len(part)
            else:
                size = math.prod(self.shape)
                part[:] = _pixels(minstd(self._minstd, row * size, part.size)).reshape(part.shape)
            done += len(part)
        return images

    def _seek(self, block: int, first: int) -> None:
        """Advance the generator to image `first` of a block."""
        if block != self._block or first < self._drawn:
            self._block, self._drawn = block, 0
            self._generator = stream(self.seed, "random pool", 0, block)
        if skipped := first - self._drawn:  # a pixel is one word
            self._generator.bit_generator.random_raw(skipped * math.prod(self.shape), output=False)
            self._drawn = first
