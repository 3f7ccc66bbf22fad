"""The teacher's pass over blocks of images."""

import numpy as np
import torch
from numpy.typing import NDArray

from tspipe.data.preprocess import Preprocess
from tspipe.errors import OutOfMemory, is_out_of_memory
from tspipe.extraction.blocks import SEED, Replayed, TeacherInput
from tspipe.models.feature_net import FeatureNet
from tspipe.utils.rng import seed_torch

Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]


def run_teacher_on_blocks(
    teacher: FeatureNet, preprocess: Preprocess, batch_size: int, pixels: TeacherInput, split: str, block: int
) -> Outputs:
    """Return the features (n, d) and logits (n, c) of a block's n images or views; no batch crosses a block.

    A teacher that draws random numbers even in eval mode draws the same ones for the same block. Raises OutOfMemory
    with a batch size that does run on this block. That size is not used here, since the last digits depend on it.
    """

    def try_batches_of(size: int) -> Outputs | None:
        try:
            return _run_batches(teacher, preprocess, size, pixels, split, block)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    if (outputs := try_batches_of(batch_size)) is not None:
        return outputs
    size = min(batch_size, len(pixels))
    fits = size // 2
    while fits and try_batches_of(fits) is None:
        fits //= 2
    raise OutOfMemory(size, fits)


@torch.inference_mode()
def _run_batches(
    teacher: FeatureNet, preprocess: Preprocess, batch_size: int, pixels: TeacherInput, split: str, block: int
) -> Outputs:
    device, outputs = teacher.head.weight.device, []
    for number, start in enumerate(range(0, len(pixels), batch_size)):
        part = slice(start, start + batch_size)
        if isinstance(pixels, Replayed):
            batch = pixels.batch(preprocess, part, device)
        else:
            batch = torch.from_numpy(pixels[part]).to(device).permute(0, 3, 1, 2)
        seed_torch(SEED, f"teacher, {split}", block, number)
        outputs.append(teacher(preprocess.normalise(batch)))
    features, logits = (torch.cat(parts).float().cpu().numpy() for parts in zip(*outputs, strict=True))
    return features, logits
