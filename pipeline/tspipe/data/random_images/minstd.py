"""The linear congruential generator that the paper names beside the Mersenne Twister, here MINSTD.

MINSTD (Park and Miller, Communications of the ACM 31, 1988): x ← 16807 · x mod 2^31 − 1. All its seeds start on one
cycle of 2^31 − 2 numbers, which a few thousand batches exhaust.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tspipe.utils.rng import stream

_A, _M = 16807, 2**31 - 1


def numbers(seed: int, purpose: str, skipped: int, count: int) -> NDArray[np.float32]:
    """Return numbers (count,) float32 in [0, 1) of the stream of a (seed, purpose), after the first `skipped` ones.

    Each is the top 24 of MINSTD's 31 bits, divided by 2^24.
    """
    words = minstd(minstd_start(seed, purpose), skipped, count)
    return (words >> np.uint64(7)).astype(np.float32) / np.float32(2**24)


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


def period_warning(generator: str, images: int, subject: str, shape: tuple[int, int, int]) -> str | None:
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
