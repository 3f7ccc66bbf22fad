"""ResNet-18, torchvision's (He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, arXiv 1512.03385,
Table 1), with a stem for small images."""

from torch import nn
from torchvision.models import resnet18

from tspipe.models.networks._stem import Stem, adapt_resnet, fit_resnet

adapt = adapt_resnet


def build(num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32), stem: Stem = "auto") -> nn.Module:
    """(n, C, H, W) float32 to logits (n, num_classes), for any C, H and W. Keys are those of torchvision's checkpoints.

    Args:
        stem: `imagenet` is the paper's 7×7 convolution with stride 2 and max-pool; `cifar` a 3×3 convolution
            with stride 1 and no max-pool; `auto` takes `cifar` where H and W are 64 or less.
    """
    return fit_resnet(resnet18(weights=None, num_classes=num_classes), input_shape, stem)
