"""torchvision's networks for images of other sizes and other numbers of channels."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

from tspipe.errors import NetworkError
from tspipe.models.networks._cifar_resnet import rename_keys

Stem = Literal["auto", "cifar", "imagenet"]
_LARGEST_SMALL = 64  # pixels a side; beyond, a cifar stem costs much time and memory


def is_cifar(stem: Stem, input_shape: tuple[int, int, int]) -> bool:
    """Whether to keep the resolution of the first layers: asked for, or `auto` and H, W of 64 or less."""
    if stem not in get_args(Stem):
        raise NetworkError(f"stem cannot be {stem!r}. There are: {', '.join(get_args(Stem))}.")
    return stem == "cifar" or (stem == "auto" and max(input_shape[1:]) <= _LARGEST_SMALL)


def first_conv(channels: int, width: int, kernel: int, stride: int) -> nn.Conv2d:
    """A first convolution without bias and with torchvision's initial weights."""
    conv = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def fit_resnet(network: nn.Module, input_shape: tuple[int, int, int], stem: Stem) -> nn.Module:
    """Give torchvision's ResNet the first convolution its images need; keys stay torchvision's.

    The cifar stem is a 3×3 convolution with stride 1 and no max-pool, so a 32×32 image reaches layer1 at 32×32
    instead of 8×8.
    """
    if is_cifar(stem, input_shape):
        network.conv1 = first_conv(input_shape[0], 64, kernel=3, stride=1)
        network.maxpool = nn.Identity()
    elif input_shape[0] != 3:
        network.conv1 = first_conv(input_shape[0], 64, kernel=7, stride=2)
    return network


def adapt_resnet(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our keys, and the stem its first kernel shows: weights keep the stem they were trained with."""
    state = rename_keys(state)
    conv1 = state.get("conv1.weight")
    if conv1 is None or conv1.ndim != 4 or conv1.shape[-1] not in (3, 7):
        return state, {}
    return state, {"stem": "cifar" if conv1.shape[-1] == 3 else "imagenet"}
