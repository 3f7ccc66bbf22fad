"""Every random number of a run, from its seed.

One function makes every generator: batch order, initial weights, dropout, random images, views. No state carries over
from batch to batch, so a run that is resumed draws the same numbers as one that was not interrupted.
"""

import itertools
import zlib
from collections.abc import Iterator

import numpy as np

_SEEDS = 64


def stream(seed: int, purpose: str, epoch: int = 0, batch: int = 0) -> np.random.Generator:
    """Return a separate Mersenne Twister (MT19937, period 2^19937 − 1) for each (seed, purpose, epoch, batch).

    Seeded through `numpy.random.SeedSequence`, whose output numpy keeps the same across versions.
    """
    return np.random.Generator(np.random.MT19937(_entropy(seed, purpose, epoch, batch)))


def seed_torch(seed: int, purpose: str, epoch: int = 0, batch: int = 0) -> None:
    """Seed torch's generators (initial weights, dropout) for a (seed, purpose, epoch, batch)."""
    seed_torch_with(_number(seed, purpose, epoch, batch))


def torch_seeds(seed: int, purpose: str, epoch: int, batch: int) -> Iterator[int]:
    """Yield the numbers to seed torch with for a batch of an epoch and each later one.

    They are computed in groups, since one alone between two training steps takes ten times as long.
    """
    for first in itertools.count(batch, _SEEDS):
        yield from [_number(seed, purpose, epoch, batch) for batch in range(first, first + _SEEDS)]


def seed_torch_with(number: int) -> None:
    """Seed torch's generators with a number.

    `torch.manual_seed` is avoided: without a GPU it keeps the stack of each call until one is initialised.
    """
    import torch

    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def _number(seed: int, purpose: str, epoch: int, batch: int) -> int:
    return int(_entropy(seed, purpose, epoch, batch).generate_state(1, np.uint64)[0])


def _entropy(seed: int, purpose: str, epoch: int, batch: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), epoch, batch])
