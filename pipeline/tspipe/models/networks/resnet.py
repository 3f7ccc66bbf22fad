"""torchvision's ResNets (He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, arXiv 1512.03385,
Table 1), with a stem for small images."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.models import get_model

from tspipe.models.networks._input import Stem, first_conv, uses_cifar_stem
from tspipe.models.networks.cifar_resnet import rename_keys

VARIANTS = {"resnet18": {"depth": 18}, "resnet50": {"depth": 50}}
IMAGENET = {"resnet18": "ResNet18_Weights.IMAGENET1K_V1", "resnet50": "ResNet50_Weights.IMAGENET1K_V2"}


def build(
    num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32), stem: Stem = "auto", *, depth: int = 18
) -> nn.Module:
    """Return a network from (n, C, H, W) float32 to logits (n, num_classes), for any C, H and W.

    The state dict has the keys of torchvision's checkpoints.

    Args:
        stem: `imagenet` is the paper's 7×7 convolution with stride 2 and max-pool. `cifar` is a 3×3 convolution with
            stride 1 and no max-pool: a 32×32 image reaches layer1 at 32×32 instead of 8×8. `auto` is `cifar` where H
            and W are 64 or less.
        depth: the number of layers.
    """
    network: nn.Module = get_model(f"resnet{depth}", weights=None, num_classes=num_classes)
    if uses_cifar_stem(stem, input_shape):
        network.conv1 = first_conv(input_shape[0], 64, kernel=3, stride=1)
        network.maxpool = nn.Identity()
    elif input_shape[0] != 3:
        network.conv1 = first_conv(input_shape[0], 64, kernel=7, stride=2)
    return network


def adapt(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rename a published checkpoint's keys, and return them with the stem that its first kernel implies."""
    state = rename_keys(state)
    conv1 = state.get("conv1.weight")
    if conv1 is None or conv1.ndim != 4 or conv1.shape[-1] not in (3, 7):
        return state, {}
    return state, {"stem": "cifar" if conv1.shape[-1] == 3 else "imagenet"}
