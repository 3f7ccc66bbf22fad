"""The paper's random images: noise that only the teacher can label (arXiv 2005.00393, section 3).

Pixels are U[0, 1), independent per pixel and channel, drawn fresh for every batch in pixel space, and then
normalised as real images are. The teacher's argmax is their label, its features their regression target.
"""

import torch
from torch import Tensor

from tspipe.randomness import stream


def uniform(seed: int, epoch: int, batch: int, count: int, shape: tuple[int, int, int]) -> Tensor:
    """`count` random images of `shape` (C, H, W) for one batch: (count, C, H, W) float32 in [0, 1), on the CPU.

    Each pixel is the top 24 bits of one Mersenne Twister word, divided by 2^24.
    """
    return torch.from_numpy(stream(seed, "random images", epoch, batch).random((count, *shape), dtype="float32"))
