"""ResNet-32 for CIFAR (He et al., arXiv 1512.03385, section 4.2): n = 5 blocks a stage."""

from torch import nn

from tspipe.models.networks._cifar_resnet import CifarResNet, Shortcut, adapt_keys

adapt = adapt_keys


def build(num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32), shortcut: Shortcut = "A") -> nn.Module:
    """(n, C, H, W) float32 to logits (n, num_classes), for any C, H and W.

    Args:
        shortcut: where the number of maps doubles, `A` pads with zeros (the paper's), `B` projects.
    """
    return CifarResNet(blocks=5, num_classes=num_classes, channels=input_shape[0], shortcut=shortcut)
