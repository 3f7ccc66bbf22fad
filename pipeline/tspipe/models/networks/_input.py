"""Images of other sizes and other numbers of channels: the smallest, and first layers for them."""

from typing import Literal, get_args

from torch import nn

from tspipe.errors import NetworkError

Stem = Literal["auto", "cifar", "imagenet"]
_MAX_CIFAR_SIDE = 64  # pixels; for larger images a cifar stem costs much time and memory


def uses_cifar_stem(stem: Stem, input_shape: tuple[int, int, int]) -> bool:
    """Return whether the first layers keep the resolution: `cifar`, or `auto` with H and W of 64 or less."""
    if stem not in get_args(Stem):
        raise NetworkError(f"stem cannot be {stem!r}. There are: {', '.join(get_args(Stem))}.")
    return stem == "cifar" or (stem == "auto" and max(input_shape[1:]) <= _MAX_CIFAR_SIDE)


def first_conv(channels: int, width: int, kernel: int, stride: int) -> nn.Conv2d:
    """Return a first convolution without bias, initialised as in torchvision."""
    conv = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def check_size(name: str, input_shape: tuple[int, int, int], smallest: int) -> None:
    """Raise NetworkError for images (C, H, W) of fewer than `smallest` pixels a side."""
    _, height, width = input_shape
    if min(height, width) < smallest:
        raise NetworkError(
            f"{name} takes images of {smallest}×{smallest} pixels or more, these have {height}×{width}. Enlarge them: "
            "--set preprocess.resize=[32,32]"
        )
