"""ResNets for CIFAR-10 (He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, arXiv 1512.03385,
section 4.2): 6n + 2 layers with 16, 32 and 64 channels."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.errors import NetworkError

Shortcut = Literal["A", "B"]
VARIANTS = {
    "resnet20": {"blocks": 3},
    "resnet32": {"blocks": 5},
    "resnet44": {"blocks": 7},
    "resnet56": {"blocks": 9},
    "resnet110": {"blocks": 18},
}


class PadShortcut(nn.Module):
    """Option A, without parameters: every second pixel, and channels of zeros, half of them on each side.

    The paper does not say where the zeros go. Published checkpoints were trained with half on each side.
    """

    def __init__(self, zeros: int):
        super().__init__()
        self.zeros = zeros

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, C, H, W) to (n, C + zeros, ⌈H/2⌉, ⌈W/2⌉)."""
        before = self.zeros // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.zeros - before))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm; the shortcut is added before the last ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs and shortcut == "A":
            self.downsample = PadShortcut(outputs - inputs)
        elif inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, H, W) to (n, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class CifarResNet(nn.Module):
    """A 3×3 convolution, three stages of n blocks, global average pooling and a Linear; see `build`."""

    def __init__(self, blocks: int, num_classes: int, channels: int, shortcut: Shortcut):
        super().__init__()
        if shortcut not in get_args(Shortcut):
            raise NetworkError(f"shortcut cannot be {shortcut!r}. There are: {', '.join(get_args(Shortcut))}.")
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, 1, shortcut)
        self.layer2 = _stage(blocks, 16, 32, 2, shortcut)
        self.layer3 = _stage(blocks, 32, 64, 2, shortcut)
        self.fc = nn.Linear(64, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # arXiv 1502.01852, as in section 4.2
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map (n, C, H, W) float32 to logits (n, num_classes)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _stage(blocks: int, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    later = (BasicBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut), *later)


def build(
    num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32), shortcut: Shortcut = "A", *, blocks: int = 3
) -> nn.Module:
    """Return a network from (n, C, H, W) float32 to logits (n, num_classes), for any C, H and W.

    Args:
        shortcut: where the number of channels doubles, `A` (the paper's) pads with zeros; `B` projects with a 1×1
            convolution and batch norm.
        blocks: n, the blocks per stage.
    """
    return CifarResNet(blocks, num_classes, channels=input_shape[0], shortcut=shortcut)


def rename_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename `linear` to `fc` and `shortcut` to `downsample`, as ResNets published for CIFAR often name them."""

    def renamed(key: str) -> str:
        key = "fc." + key.removeprefix("linear.") if key.startswith("linear.") else key
        return key.replace(".shortcut.", ".downsample.")

    return {renamed(key): tensor for key, tensor in state.items()}


def adapt(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rename a published checkpoint's keys, and return them with the shortcut: B if there are projections, else A."""
    state = rename_keys(state)
    return state, {"shortcut": "B" if any(".downsample." in key for key in state) else "A"}
