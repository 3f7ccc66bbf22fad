"""NTS-Net (Yang, Luo, Wang, Hu, Gao and Wang, Learning to Navigate for Fine-grained Classification, ECCV 2018,
arXiv 1809.00287): a ResNet-50 looks at the image, and again at the parts that a small network proposes in it.

The paper's names: the Navigator is `proposal_net`, the Teacher `partcls_net`, the Scrutinizer `concat_net`.
Keys, layers and anchors are those of the published checkpoint for CUB-200-2011; weights from it load as they are.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from tspipe.errors import NetworkError
from tspipe.models.networks import _ntsnet_regions as regions
from tspipe.models.networks._stem import first_conv

PRETRAINED = "ResNet50_Weights.IMAGENET1K_V1"
PUBLISHED = {"cub200": "https://github.com/nicolalandro/ntsnet-cub200/releases/tag/0.2"}

_BACKBONE = "pretrained_model"
_HEADS = (f"{_BACKBONE}.fc", "concat_net", "partcls_net")
_LEAST_SIDE = 16  # below, the smallest anchors have no pixel


class Outputs(NamedTuple):
    """What NTS-Net makes of n images; d = 32 · width is the width of a ResNet's pooled features.

    Attributes:
        raw_logits: (n, c), of the whole image alone.
        concat_logits: (n, c), of the features; the network's answer.
        part_logits: (n, parts, c), of each part alone.
        scores: (n, parts), what the proposal net gives for the parts, in the order they were kept.
        indices: (n, parts) int64, which anchors the parts are.
        features: (n, (concatenated + 1) · d), of the first parts, then of the whole image.
    """

    raw_logits: Tensor
    concat_logits: Tensor
    part_logits: Tensor
    scores: Tensor
    indices: Tensor
    features: Tensor


class NTSNet(nn.Module):
    """Images (n, C, S, S) float32 to logits (n, c); see `build`, and train it with the sum of `losses`."""

    anchors: Tensor  # (a, 4) int64
    overlaps: Tensor  # (a, a) bool

    def __init__(
        self,
        num_classes: int,
        channels: int,
        side: int,
        width: int,
        parts: int,
        concatenated: int,
        always_dropout: bool,
    ):
        super().__init__()
        self.side, self.parts, self.concatenated = side, parts, concatenated
        self.pretrained_model = _Backbone(num_classes, channels, width, always_dropout)
        features = self.pretrained_model.fc.in_features
        self.proposal_net = _ProposalNet(features)
        self.concat_net = nn.Linear(features * (concatenated + 1), num_classes)
        self.partcls_net = nn.Linear(features, num_classes)
        # Not persistent: they follow from the side, and published checkpoints have no such keys.
        self.register_buffer("anchors", regions.anchor_boxes(side), persistent=False)
        self.register_buffer("overlaps", regions.same_place(self.anchors), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, C, S, S) to logits (n, c): those of `concat_net`. Looks only at the parts that it needs for them."""
        return self._look(images, self.concatenated).concat_logits

    def outputs(self, images: Tensor) -> Outputs:
        """Everything, of all parts."""
        return self._look(images, self.parts)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The paper's losses for labels (n,) int64, scalars to be summed.

        `raw` and `concat` are the cross-entropies of the image's logits, means over the batch; `parts` that of the
        parts' logits, the mean over the batch and the parts; `ranking` is `ranking_loss` of the parts' scores.
        """
        found = self.outputs(images)
        each = labels[:, None].expand(-1, self.parts)
        part_losses = F.cross_entropy(found.part_logits.movedim(-1, 1), each, reduction="none")
        return {
            "raw": F.cross_entropy(found.raw_logits, labels),
            "concat": F.cross_entropy(found.concat_logits, labels),
            "parts": part_losses.mean(),
            "ranking": ranking_loss(found.scores, part_losses.detach()),
        }

    def _look(self, images: Tensor, parts: int) -> Outputs:
        raw_logits, maps, whole = self.pretrained_model(images)
        # Neither the maps nor the crops pass a gradient on: the proposal net learns from the ranking alone.
        scores = self.proposal_net(maps.detach())
        with torch.no_grad():
            indices = regions.suppress(scores, self.overlaps, parts)
            padded = F.pad(images, [self.side // 2] * 4)
            crops = regions.crop(padded, self.anchors[indices], self.side // 2)
            del padded  # 9.6 MB an image of side 448, of no use to the backbone
        part_features = self.pretrained_model(crops)[2].unflatten(0, (len(images), parts))
        part_logits = self.partcls_net(part_features)
        features = torch.cat([part_features[:, : self.concatenated].flatten(1), whole], dim=1)
        # Last, because the last Linear to run is where `feature_net.split` cuts.
        concat_logits = self.concat_net(features)
        return Outputs(raw_logits, concat_logits, part_logits, scores.gather(1, indices), indices, features)


class _Backbone(nn.Module):
    """torchvision's ResNet-50 of any width: images to logits, last maps and pooled features after dropout."""

    def __init__(self, num_classes: int, channels: int, width: int, always_dropout: bool):
        super().__init__()
        self.always_dropout = always_dropout
        self.conv1 = first_conv(channels, width, kernel=7, stride=2)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(width, width, blocks=3, stride=1)
        self.layer2 = _stage(4 * width, 2 * width, blocks=4, stride=2)
        self.layer3 = _stage(8 * width, 4 * width, blocks=6, stride=2)
        self.layer4 = _stage(16 * width, 8 * width, blocks=3, stride=2)
        self.fc = nn.Linear(32 * width, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        pooled = F.dropout(maps.mean((2, 3)), 0.5, self.training or self.always_dropout)
        return self.fc(pooled), maps, pooled


def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
    stage = nn.Sequential(
        Bottleneck(inputs, width, stride, shortcut), *(Bottleneck(4 * width, width) for _ in range(blocks - 1))
    )
    for layer in stage.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return stage


class _ProposalNet(nn.Module):
    """The backbone's last maps (n, d, h, w) to a score for each anchor, (n, a) in the anchors' order."""

    def __init__(self, features: int):
        super().__init__()
        self.down1 = nn.Conv2d(features, 128, 3, padding=1)
        self.down2 = nn.Conv2d(128, 128, 3, stride=2, padding=1)
        self.down3 = nn.Conv2d(128, 128, 3, stride=2, padding=1)
        self.tidy1, self.tidy2, self.tidy3 = (nn.Conv2d(128, count, 1) for count in regions.per_position())

    def forward(self, maps: Tensor) -> Tensor:
        first = self.down1(maps).relu()
        second = self.down2(first).relu()
        third = self.down3(second).relu()
        return torch.cat([self.tidy1(first).flatten(1), self.tidy2(second).flatten(1), self.tidy3(third).flatten(1)], 1)


def build(
    num_classes: int,
    input_shape: tuple[int, int, int] = (3, 448, 448),
    *,
    width: int = 64,
    parts: int = 6,
    concatenated: int = 4,
    always_dropout: bool = False,
) -> NTSNet:
    """NTS-Net with random initial weights, for square images (C, S, S) of 16×16 pixels or more.

    For 448×448 pixels and 200 classes it has 1,614 anchors, 10,240 features and 29,033,133 parameters.

    Args:
        width: maps of the ResNet-50's first convolution; the features are (concatenated + 1) · 32 · width.
        parts: how many anchors non-maximum suppression keeps, for training.
        concatenated: how many of them, the first, go into the features.
        always_dropout: drop half of the pooled features in eval mode too, drawn from torch's generator, as the
            code of the paper's time did.

    Raises NetworkError: images of another shape, or more parts than there are.
    """
    channels, height, side = input_shape
    if height != side or side < _LEAST_SIDE:
        raise NetworkError(
            f"ntsnet takes square images of {_LEAST_SIDE}×{_LEAST_SIDE} pixels or more, these have {height}×{side}. "
            "Resize and crop them: --set preprocess.resize=[600,600] --set preprocess.crop=448"
        )
    network = NTSNet(num_classes, channels, side, width, parts, concatenated, always_dropout)
    if not 0 < concatenated <= parts <= len(network.anchors):
        raise NetworkError(
            f"ntsnet cannot concatenate {concatenated} of {parts} parts: there are {len(network.anchors):,} anchors, "
            "at most so many parts, and at most so many are concatenated."
        )
    return network


def adapt(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our keys; those of a ResNet-50, as torchvision's ImageNet weights have them, become the backbone's."""
    if "layer1.0.conv3.weight" in state:
        return {f"{_BACKBONE}.{key}": value for key, value in state.items()}, {}
    return dict(state), {}


def complete(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights to start training from: those of a file, and a network's initial ones where the file has none to give.

    Args:
        state: the file's, after `adapt`: of a whole NTS-Net or of the backbone alone.
        own: the state dict of the network to be trained; its last layers are taken where the file's are for another
            number of classes.

    What else does not fit is left for `weights.load_into` to refuse.
    """
    backbone_only = all(key.startswith(f"{_BACKBONE}.") for key in state)
    completed = {**own, **state} if backbone_only else dict(state)
    for key in own:
        if key.rpartition(".")[0] in _HEADS and key in completed and completed[key].shape[:1] != own[key].shape[:1]:
            completed[key] = own[key]
    return completed


def ranking_loss(scores: Tensor, losses: Tensor) -> Tensor:
    """The mean over the batch of Σ_i Σ_{j: loss_j > loss_i} max(0, 1 − s_i + s_j), a scalar.

    A part that is more surely of its class should have the higher score, by a margin of 1.

    Args:
        scores: (n, parts), the only ones to get a gradient.
        losses: (n, parts), each part's cross-entropy.
    """
    worse = losses[:, None, :] > losses[:, :, None]  # [:, i, j]: part j has the larger loss
    hinge = (1 - scores[:, :, None] + scores[:, None, :]).relu()
    return (hinge * worse).sum((1, 2)).mean()
