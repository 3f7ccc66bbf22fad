"""The teacher's pass over blocks of images."""

import numpy as np
import torch
from numpy.typing import NDArray

from tspipe.data.preprocess import Preprocess
from tspipe.errors import OutOfMemory
from tspipe.extraction.blocks import _SEED, Given, Replayed
from tspipe.models.feature_net import FeatureNet
from tspipe.utils.rng import seed_torch


def run_teacher_on_blocks(
    teacher: FeatureNet,
    preprocess: Preprocess,
    batch_size: int,
    pixels: Given,
    split: str,
    block: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features (n, d) and logits (n, c) of a block's n images or views, batch by batch; none crosses a block.

    A teacher that draws random numbers in eval mode, too, draws the same for the same block. Raises OutOfMemory with
    a batch size that does run on this block; it is not taken, since the last digits depend on it.
    """

    def given(size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        try:
            return _run_batches(teacher, preprocess, size, pixels, split, block)
        except (MemoryError, RuntimeError) as problem:  # what a GPU raises is a RuntimeError, too
            if not _out_of_memory(problem):
                raise
            return None

    if (found := given(batch_size)) is not None:
        return found
    size = min(batch_size, len(pixels))
    fits = size // 2
    while fits and given(fits) is None:
        fits //= 2
    raise OutOfMemory(size, fits)


@torch.inference_mode()
def _run_batches(
    teacher: FeatureNet,
    preprocess: Preprocess,
    batch_size: int,
    pixels: Given,
    split: str,
    block: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    device, outputs = teacher.head.weight.device, []
    for number, start in enumerate(range(0, len(pixels), batch_size)):
        part = slice(start, start + batch_size)
        if isinstance(pixels, Replayed):
            batch = pixels.batch(preprocess, part, device)
        else:
            batch = torch.from_numpy(pixels[part]).to(device).permute(0, 3, 1, 2)
        seed_torch(_SEED, f"teacher, {split}", block, number)
        outputs.append(teacher(preprocess.normalise(batch)))
    features, logits = (torch.cat(parts).float().cpu().numpy() for parts in zip(*outputs, strict=True))
    return features, logits


def _out_of_memory(problem: Exception) -> bool:
    # PyTorch's is of a class of its own on a GPU, and any RuntimeError on the CPU.
    text = str(problem)
    return (
        isinstance(problem, MemoryError | torch.OutOfMemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
    )
