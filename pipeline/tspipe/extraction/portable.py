"""The teacher's program in the cache, checked against the teacher before any row is computed."""

import copy

import numpy as np
import torch
from torch import nn

from tspipe.data.datasets import Images
from tspipe.data.image_loader import read
from tspipe.data.preprocess import Preprocess
from tspipe.errors import NetworkError
from tspipe.models import program, weights
from tspipe.models.feature_net import FeatureNet
from tspipe.models.inference import freeze
from tspipe.models.teacher import run_teacher

_COMPARED = 8  # images
_TOLERANCE = 1e-3  # of the largest feature: folded and separate batch norms round differently


def export_program(module: nn.Module, name: str, shape: tuple[int, int, int]) -> bytes:
    """Return the program of a network for images of `shape` (C, H, W); the network is not modified."""
    return program.export(copy.deepcopy(module).eval().requires_grad_(False), name, shape)


def check_program(stored: bytes, tensors: bytes, teacher: FeatureNet, images: Images, preprocess: Preprocess) -> None:
    """Run a program as a receiver does, on the first images, alone and together.

    Args:
        stored: what `export_program` returned.
        tensors: the teacher's weights as safetensors.

    Raises NetworkError if its features are not the teacher's.
    """
    pixels = np.stack([read(images, preprocess, i)[1] for i in range(min(_COMPARED, len(images)))])
    device = teacher.head.weight.device
    batch = preprocess.normalise(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2))
    shape = batch.shape[1], batch.shape[2], batch.shape[3]
    loaded = program.load(stored, weights.parse(tensors, "the teacher's weights"), shape, "The teacher's program")
    network = freeze(loaded, "the teacher's program", shape, device)
    expected = run_teacher(teacher, batch).features
    for part in (batch, batch[:1]):
        difference = (run_teacher(network, part).features - expected[: len(part)]).abs().max() / expected.abs().max()
        if not difference <= _TOLERANCE:
            raise NetworkError(
                f"The teacher's program computes other features than the teacher, by up to {float(difference):.1%} of "
                "the largest. A network that draws random numbers, or depends on the number of images, has no program. "
                "Leave out --portable-teacher."
            )
