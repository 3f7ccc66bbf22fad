"""Every random number of a run, from its seed.

One function gives every generator: batch order, initial weights, dropout, random images, views. Nothing carries
over from batch to batch, so a run that goes on after a kill draws what it would have drawn.
"""

import itertools
import zlib
from collections.abc import Iterator

import numpy as np
import torch

_SEEDS = 64


def stream(seed: int, purpose: str, epoch: int = 0, batch: int = 0) -> np.random.Generator:
    """A Mersenne Twister (MT19937, period 2^19937 − 1) of its own for each (seed, purpose, epoch, batch).

    Seeded through `numpy.random.SeedSequence`, whose output numpy keeps the same across versions.
    """
    return np.random.Generator(np.random.MT19937(_entropy(seed, purpose, epoch, batch)))


def seed_torch(seed: int, purpose: str, epoch: int = 0, batch: int = 0) -> None:
    """Seed torch's own generators (initial weights, dropout) for a (seed, purpose, epoch, batch)."""
    seed_torch_with(_number(seed, purpose, epoch, batch))


def torch_seeds(seed: int, purpose: str, epoch: int, batch: int) -> Iterator[int]:
    """What to seed torch with for a batch of an epoch and each that comes after it.

    They are made some at a time: one alone, between two training steps, takes ten times as long.
    """
    for first in itertools.count(batch, _SEEDS):
        yield from [_number(seed, purpose, epoch, batch) for batch in range(first, first + _SEEDS)]


def seed_torch_with(number: int) -> None:
    """Seed torch's own generators with a number.

    Not by `torch.manual_seed`: where there is no GPU, it notes each call with its stack for the time when one is found.
    """
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def _number(seed: int, purpose: str, epoch: int, batch: int) -> int:
    return int(_entropy(seed, purpose, epoch, batch).generate_state(1, np.uint64)[0])


def _entropy(seed: int, purpose: str, epoch: int, batch: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), epoch, batch])
