"""Every random number of a run, from its seed.

One function gives every generator: batch order, initial weights, dropout, random images, views. Nothing carries
over from batch to batch, so a run that goes on after a kill draws what it would have drawn.
"""

import zlib

import numpy as np
import torch


def stream(seed: int, purpose: str, epoch: int = 0, batch: int = 0) -> np.random.Generator:
    """A Mersenne Twister (MT19937, period 2^19937 − 1) of its own for each (seed, purpose, epoch, batch).

    Seeded through `numpy.random.SeedSequence`, whose output numpy keeps the same across versions.
    """
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), epoch, batch])
    return np.random.Generator(np.random.MT19937(entropy))


def seed_torch(seed: int, purpose: str, epoch: int = 0, batch: int = 0) -> None:
    """Seed torch's own generators (initial weights, dropout) from `stream`."""
    torch.manual_seed(int(stream(seed, purpose, epoch, batch).integers(2**63)))
