"""Measures the random images' share of a student's gradient.

    python benchmarks/gradients.py CACHE DATA RECIPE STUDENT [WEIGHTS]

Over 12 batches of the recipe's real and random images (from the cache's pool), prints for each of the two: the loss;
the mean norm of its part of the batch's gradient; and its share of the mean square, which Adam divides by. WEIGHTS is
a student of a run folder; without it, the student is untrained.
"""

import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tspipe.cache import open_cache
from tspipe.losses import Target
from tspipe.recipes.load import recipe_for_cache
from tspipe.training.arms import RANDOM
from tspipe.training.config import LocalInputs, StudentConfig
from tspipe.training.run_folder import RunFolder
from tspipe.training.trainer import open_trainer


def gradient(network: torch.nn.Module, loss: torch.nn.Module, images: Tensor, target: Target) -> tuple[float, Tensor]:
    """Return the loss of these images, and its gradient as one vector."""
    value = torch.stack(list(loss(network(images), target).values())).sum()
    parts = torch.autograd.grad(value, list(network.parameters()))
    return value.item(), torch.cat([part.flatten() for part in parts])


def main(file: str, data: str, recipe: str, student: str, *weights: str) -> None:
    """Print a line for the real images and one for the random ones."""
    cache = open_cache(Path(file))
    chosen, _ = recipe_for_cache(file, cache.manifest, recipe, ["random_source=pool"], {"student": [student]})
    with tempfile.TemporaryDirectory() as folder:
        trainer = open_trainer(
            StudentConfig(chosen, cache, (RANDOM,), LocalInputs(Path(data))),
            RunFolder(Path(folder), {}, {}),
            torch.device("cpu"),
        )
    (learner,) = trainer.learners(0)
    for path in weights:
        learner.network.load_state_dict(safetensors.torch.load_file(path))
    result: dict[str, list[tuple[float, Tensor]]] = {"real": [], "random": []}
    for _, batch in trainer.batches.epoch(0, 0, slice(12)):
        assert batch.random is not None
        parts = {"real": (batch.images, batch.target), "random": batch.random[:2]}
        complete = sum(len(images) for images, _ in parts.values())
        for name, (images, target) in parts.items():
            loss, vector = gradient(learner.network, learner.model.loss, images, target)
            result[name].append((loss, vector * len(images) / complete))
    squares = {name: sum(float(vector.square().sum()) for _, vector in pairs) for name, pairs in result.items()}
    for name, pairs in result.items():
        loss = sum(loss for loss, _ in pairs) / len(pairs)
        norm = sum(float(vector.norm()) for _, vector in pairs) / len(pairs)
        share = squares[name] / sum(squares.values())
        print(f"{name:8} loss {loss:.3f}  norm {norm:.3f}  share of squares {share:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
