"""The paper's random images: noise that only the teacher can label (arXiv 2005.00393, section 3).

Pixels are U[0, 1), independent per pixel and channel, in pixel space, and then normalised as real images are. The
teacher's argmax is their label, its features their regression target. They are drawn fresh for every batch, or once:
stage one labels a pool of them, of which the cache keeps the targets and the seed that draws the same pixels again.

Of the two generators that the paper names, the Mersenne Twister is the default. The other, linear congruential, is here
MINSTD (Park and Miller, Communications of the ACM 31, 1988): x ← 16807 · x mod 2^31 − 1. All its seeds are places on
one cycle of 2^31 − 2 numbers, which some thousand batches have used up.
"""

import math
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tspipe.cache import Manifest
from tspipe.errors import CacheMismatch
from tspipe.utils.rng import stream

Generator = Literal["mt19937", "minstd"]
_SEED = 0  # of a pool: a cache is made once
_A, _M = 16807, 2**31 - 1  # MINSTD's


def uniform(seed: int, epoch: int, batch: int, count: int, shape: tuple[int, int, int]) -> Tensor:
    """`count` random images of `shape` (C, H, W) for one batch: (count, C, H, W) float32 in [0, 1), on the CPU.

    Each pixel is the top 24 bits of one Mersenne Twister word, divided by 2^24.
    """
    return torch.from_numpy(stream(seed, "random images", epoch, batch).random((count, *shape), dtype="float32"))


def congruential(seed: int, batch: int, count: int, shape: tuple[int, int, int]) -> Tensor:
    """As `uniform`, by MINSTD: batch after batch, counted from 0 over all epochs, of one stream for each seed."""
    size = count * math.prod(shape)
    words = minstd(minstd_start(seed, "random images"), batch * size, size)
    return torch.from_numpy(_pixels(words).reshape(count, *shape))


def minstd(start: int, skipped: int, count: int) -> NDArray[np.uint64]:
    """MINSTD's numbers (count,) in 1 … 2^31 − 2 from `start` on, the first `skipped` of them left out."""
    first = np.uint64(start * pow(_A, skipped, _M) % _M)
    return first * _powers(count) % np.uint64(_M)  # below 2^62


def minstd_start(seed: int, purpose: str) -> int:
    """Where on MINSTD's cycle the stream of a (seed, purpose) begins."""
    return 1 + int(stream(seed, purpose).bit_generator.random_raw()) % (_M - 1)


@lru_cache(maxsize=2)
def _powers(count: int) -> NDArray[np.uint64]:
    """16807^i mod 2^31 − 1 for i from 0 to count − 1."""
    found = np.ones(1, np.uint64)
    while len(found) < count:
        found = np.concatenate([found, found * np.uint64(pow(_A, len(found), _M)) % np.uint64(_M)])
    return found[:count]


def _pixels(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """The top 24 of MINSTD's 31 bits, as [0, 1)."""
    return (words >> np.uint64(7)).astype(np.float32) / np.float32(2**24)


def spent(generator: Generator, images: int, of: str, shape: tuple[int, int, int]) -> str | None:
    """What to say of so many random images, where the generator repeats itself: how soon, and whether they do.

    Args:
        of: what draws them, at the beginning of a sentence.
        shape: (C, H, W) of an image.
    """
    if generator != "minstd":
        return None
    most = (_M - 1) // math.prod(shape)
    than = "more than that: then the same numbers come again" if images > most else "no more than that"
    sides = "×".join(map(str, shape))
    return f"The period of minstd is spent after {most:,} images of {sides}. {of} draws {images:,}, {than}."


def described(rows: int, generator: Generator = "mt19937") -> Manifest:
    """What a cache's manifest says of a pool of so many random images, if stage one makes it now."""
    return {"generator": generator, "rows": rows, "seed": _SEED}


class PoolImages:
    """The random images of a pool, drawn again from its seed; cache/README.md says which words make which pixel.

    Of the Mersenne Twister, each block of `block_rows` images has one of its own, which draws them one after the other.
    It is kept where it is, so that consecutive batches draw nothing twice and no more than themselves is held. MINSTD
    has one stream for all. Not for two threads at once.

    Args:
        seed: of the pool.
        rows: P, how many images it has.
        block_rows: images of a block; the last may have fewer.
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
    def of(cls, manifest: Manifest) -> "PoolImages":
        """The pool that a manifest describes, of images of its teacher's input shape, which the caller has checked.

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
        """Images `start` to `start + count − 1`, modulo P: (count, C, H, W) float32 in [0, 1), before normalisation."""
        images, done = np.empty((count, *self.shape), np.float32), 0
        while done < count:
            row = (start + done) % self.rows
            block, first = divmod(row, self.block_rows)
            part = images[done : done + min(self.block_rows - first, self.rows - row)]
            if self._minstd is None:
                self._go_to(block, first)
                self._generator.random(out=part, dtype=np.float32)
                self._drawn += len(part)
            else:
                size = math.prod(self.shape)
                part[:] = _pixels(minstd(self._minstd, row * size, part.size)).reshape(part.shape)
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
