"""Batches: their order in an epoch, and what a cohort's learners share of each."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tspipe.losses import Target
from tspipe.utils.rng import stream


def order(seed: int, epoch: int, rows: int, batch_size: int) -> list[Tensor]:
    """An epoch's batches: every row once, shuffled, as indices (n,) int64; the last batch may be smaller.

    Where that would be one row alone, it is left out: batch norm cannot train on a single image.
    """
    batches = list(torch.from_numpy(stream(seed, "order", epoch).permutation(rows)).split(batch_size))
    return batches[:-1] if len(batches[-1]) == 1 else batches


def in_turn(rows: int, batch_size: int) -> list[Tensor]:
    """All rows in their own order, as batches of indices (n,) int64."""
    return list(torch.arange(rows).split(batch_size))


@dataclass(frozen=True)
class Batch:
    """What a cohort's learners share: normalised images (m, C, H, W), their targets, and random ones with theirs.

    Of a batch that several processes share it is this one's part; `whole` then says how many images it has, and how
    many random ones.
    """

    images: Tensor
    target: Target
    random: tuple[Tensor, Target] | None
    whole: tuple[int, int] | None = None
