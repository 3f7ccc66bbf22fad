"""torchvision's MobileNetV2 (Sandler, Howard, Zhu, Zhmoginov and Chen, MobileNetV2: Inverted Residuals and Linear
Bottlenecks, arXiv 1801.04381, Table 2), with smaller strides for small images."""

from torch import nn
from torchvision.models.mobilenetv2 import mobilenet_v2

from tspipe.models.networks._input import Stem, first_conv, uses_cifar_stem

IMAGENET = {"mobilenet_v2": "MobileNet_V2_Weights.IMAGENET1K_V2"}


def build(num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32), stem: Stem = "auto") -> nn.Module:
    """Return a network from (n, C, H, W) float32 to logits (n, num_classes), for any C, H and W.

    The state dict has the keys of torchvision's checkpoints.

    Args:
        stem: `imagenet` has the paper's strides. `cifar` has stride 1 in the first convolution and in the second
            stage (24 channels): the last map of a 32×32 image is 4×4 instead of 1×1. `auto` is `cifar` where H and W
            are 64 or less. Both have the same keys and shapes, so weights do not imply a stem.
    """
    cifar = uses_cifar_stem(stem, input_shape)
    stages = [  # t, c, n, s of Table 2: expansion, channels, blocks, first stride
        [1, 16, 1, 1],
        [6, 24, 2, 1 if cifar else 2],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    network: nn.Module = mobilenet_v2(weights=None, num_classes=num_classes, inverted_residual_setting=stages)
    if cifar or input_shape[0] != 3:
        conv = first_conv(input_shape[0], 32, kernel=3, stride=1 if cifar else 2)
        network.get_submodule("features.0").add_module("0", conv)
    return network
