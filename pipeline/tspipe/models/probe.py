"""Probes: running a network on a small batch without leaving a trace in it or in torch's generators."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tspipe.errors import NetworkError


def probe_images(input_shape: tuple[int, int, int]) -> Tensor:
    """Return two fixed random images (2, C, H, W) float32 in [0, 1).

    Two functions that agree on zeros usually differ on these.
    """
    return torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Run the body in eval mode without gradients, then restore the mode and the state of torch's CPU generator.

    The generator is seeded inside, so a module that samples at random in eval mode samples the same on every probe.
    """
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs, too
            yield
    finally:
        module.train(training)


def run_probe(module: nn.Module, name: str, images: Tensor, *, training: bool = False) -> Any:
    """Return the output of a network for images (n, C, H, W), in eval or training mode.

    Raises NetworkError, with the network's `name`, where it does not take such images.
    """
    statistics = [buffer.clone() for buffer in module.buffers()] if training else []
    try:
        with eval_mode(module):
            output = module.train(training)(images)
            for buffer, before in zip(module.buffers(), statistics, strict=False):
                buffer.copy_(before)
            return output
    except Exception as error:  # the type for images that do not fit differs from network to network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NetworkError(f"{name} does not take images of {tuple(images.shape[1:])}: {reason}") from error


def check_trainable(module: nn.Module, name: str, images: Tensor) -> None:
    """Raise NetworkError unless the network returns one tensor for images (n, C, H, W) in training mode, too."""
    batch = images if len(images) > 1 else images.repeat(2, 1, 1, 1)  # batch norm needs two values per channel
    output = run_probe(module, name, batch, training=True)
    if not isinstance(output, Tensor):
        raise NetworkError(
            f"{name} returns a {type(output).__name__} in training mode, not one tensor of logits. Leave out its "
            "auxiliary heads, as torchvision's option aux_logits=false does."
        )
