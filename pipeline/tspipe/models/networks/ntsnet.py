"""NTS-Net (Yang, Luo, Wang, Hu, Gao and Wang, Learning to Navigate for Fine-grained Classification, ECCV 2018,
arXiv 1809.00287): a ResNet-50 sees the image, and again the parts of it that a small network proposes.

The paper's Navigator is `proposal_net`, its Teacher `partcls_net`, its Scrutinizer `concat_net`. Keys, layers and
anchors are those of the published checkpoint for CUB-200-2011, so its weights load unchanged.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from tspipe.errors import NetworkError
from tspipe.models.networks import _ntsnet_regions as regions
from tspipe.models.networks._input import first_conv

PRETRAINED = "ResNet50_Weights.IMAGENET1K_V1"
PUBLISHED = {"cub200": "https://github.com/nicolalandro/ntsnet-cub200/releases/tag/0.2"}

_BACKBONE = "pretrained_model"
_HEADS = (f"{_BACKBONE}.fc", "concat_net", "partcls_net")
_MIN_SIDE = 16  # pixels; in smaller images the smallest anchors are empty


class Outputs(NamedTuple):
    """All outputs of NTS-Net for n images; d = 32 · width is the width of a ResNet's pooled features."""

    raw_logits: Tensor  # (n, c), from the image alone
    concat_logits: Tensor  # (n, c), from the concatenated features; the network's prediction
    part_logits: Tensor  # (n, parts, c), from each part alone
    scores: Tensor  # (n, parts), of the parts by the proposal net, in the order they were selected
    indices: Tensor  # (n, parts) int64, the parts' anchors
    features: Tensor  # (n, (concatenated + 1) · d), of the first parts, then of the image


class NTSNet(nn.Module):
    """Maps images (n, C, S, S) float32 to logits (n, c); see `build`. Training minimises the sum of `losses`."""

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int], width: int, parts: int, concatenated: int):
        super().__init__()
        channels, _, side = input_shape
        self.parts, self.concatenated = parts, concatenated
        self.pretrained_model = _Backbone(num_classes, channels, width)
        self.proposal_net = _ProposalNet(32 * width)
        self.concat_net = nn.Linear(32 * width * (concatenated + 1), num_classes)
        self.partcls_net = nn.Linear(32 * width, num_classes)
        self.proposals = _Proposals(side)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, c) of `concat_net`. Runs the backbone on the concatenated parts only."""
        return self.outputs(images, self.concatenated).concat_logits

    def outputs(self, images: Tensor, parts: int | None = None) -> Outputs:
        """Return all outputs, for all parts, or for the first ones only."""
        parts = parts or self.parts
        raw_logits, maps, image_features = self.pretrained_model(images)
        # Neither the maps nor the crops pass on a gradient: the proposal net learns from the ranking alone.
        scores = self.proposal_net(maps.detach())
        with torch.no_grad():
            indices, crops = self.proposals(images, scores, parts)
        part_features = self.pretrained_model(crops)[2].unflatten(0, (len(images), parts))
        part_logits = self.partcls_net(part_features)
        features = torch.cat([part_features[:, : self.concatenated].flatten(1), image_features], dim=1)
        # Runs last, because `feature_net.split` cuts the network at the last Linear to run.
        concat_logits = self.concat_net(features)
        return Outputs(raw_logits, concat_logits, part_logits, scores.gather(1, indices), indices, features)

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the paper's losses for labels (n,) int64, as scalars to be summed.

        `raw` and `concat` are the cross-entropies of the image's logits, means over the batch. `parts` is that of the
        parts' logits, the mean over the batch and the parts. `ranking` is `ranking_loss` of the parts' scores.
        """
        outputs = self.outputs(images)
        part_labels = labels[:, None].expand(-1, self.parts)
        part_losses = F.cross_entropy(outputs.part_logits.movedim(-1, 1), part_labels, reduction="none")
        return {
            "raw": F.cross_entropy(outputs.raw_logits, labels),
            "concat": F.cross_entropy(outputs.concat_logits, labels),
            "parts": part_losses.mean(),
            "ranking": ranking_loss(outputs.scores, part_losses.detach()),
        }


class _Proposals(nn.Module):
    """The anchors of images of one side: selects the best ones and crops them."""

    anchors: Tensor  # (a, 4) int64
    overlaps: Tensor  # (a, a) bool

    def __init__(self, side: int):
        super().__init__()
        self.side = side
        # Not persistent: they follow from the side, and published checkpoints do not have these keys.
        self.register_buffer("anchors", regions.anchor_boxes(side), persistent=False)
        self.register_buffer("overlaps", regions.overlapping(self.anchors), persistent=False)

    def forward(self, images: Tensor, scores: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        """Return the best anchors (n, parts) by their scores (n, a), and crops (n · parts, C, S // 2, S // 2)."""
        indices = regions.suppress(scores, self.overlaps, parts)
        padded = F.pad(images, [self.side // 2] * 4)
        return indices, regions.crop(padded, self.anchors[indices], self.side // 2)


class _Backbone(nn.Sequential):
    """torchvision's ResNet-50 of any width: images to logits, last maps and pooled features after dropout."""

    def __init__(self, num_classes: int, channels: int, width: int):
        super().__init__(
            OrderedDict(
                conv1=first_conv(channels, width, kernel=7, stride=2),
                bn1=nn.BatchNorm2d(width),
                relu=nn.ReLU(inplace=True),
                maxpool=nn.MaxPool2d(3, stride=2, padding=1),
                layer1=_stage(width, width, blocks=3, stride=1),
                layer2=_stage(4 * width, 2 * width, blocks=4, stride=2),
                layer3=_stage(8 * width, 4 * width, blocks=6, stride=2),
                layer4=_stage(16 * width, 8 * width, blocks=3, stride=2),
                fc=nn.Linear(32 * width, num_classes),
            )
        )
        self.always_dropout = False

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *layers, fc = self
        maps = images
        for layer in layers:
            maps = layer(maps)
        pooled = F.dropout(maps.mean((2, 3)), 0.5, self.training or self.always_dropout)
        return fc(pooled), maps, pooled


def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
    later = (Bottleneck(4 * width, width) for _ in range(blocks - 1))
    stage = nn.Sequential(Bottleneck(inputs, width, stride, shortcut), *later)
    for layer in stage.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return stage


class _ProposalNet(nn.Module):
    """Maps the backbone's last maps (n, d, h, w) to a score for each anchor, (n, a) in the anchors' order."""

    def __init__(self, features: int):
        super().__init__()
        self.down1 = nn.Conv2d(features, 128, 3, padding=1)
        self.down2 = nn.Conv2d(128, 128, 3, stride=2, padding=1)
        self.down3 = nn.Conv2d(128, 128, 3, stride=2, padding=1)
        self.tidy1, self.tidy2, self.tidy3 = (nn.Conv2d(128, n, 1) for n in regions.anchors_per_position())

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
    """Return an NTS-Net for square images (C, S, S) of 16×16 pixels or more.

    For 448×448 pixels and 200 classes it has 1,614 anchors, 10,240 features and 29,033,133 parameters.

    Args:
        width: channels of the ResNet-50's first convolution; there are (concatenated + 1) · 32 · width features.
        parts: the number of anchors that non-maximum suppression selects in training.
        concatenated: the number of these, the first ones, whose features are concatenated.
        always_dropout: drop half of the pooled features in eval mode too, with torch's generator, as the paper's
            original code did.

    Raises NetworkError for images of another shape, and for more parts than anchors.
    """
    _, height, side = input_shape
    if height != side or side < _MIN_SIDE:
        raise NetworkError(
            f"ntsnet takes square images of {_MIN_SIDE}×{_MIN_SIDE} pixels or more, these have {height}×{side}. "
            "Resize and crop them: --set preprocess.resize=[600,600] --set preprocess.crop=448"
        )
    network = NTSNet(num_classes, input_shape, width, parts, concatenated)
    network.pretrained_model.always_dropout = always_dropout
    anchors = len(network.proposals.anchors)
    if not 0 < concatenated <= parts <= anchors:
        raise NetworkError(
            f"ntsnet cannot concatenate {concatenated} of {parts} parts: there are {anchors:,} anchors. "
            "Parts are at most as many as anchors, and between 1 and all parts are concatenated."
        )
    return network


def adapt(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return NTS-Net's keys unchanged; prefix those of a ResNet-50, such as torchvision's, with the backbone's."""
    if "layer1.0.conv3.weight" in state:
        return {f"{_BACKBONE}.{key}": value for key, value in state.items()}, {}
    return dict(state), {}


def complete(state: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that training starts from: those of a complete NTS-Net or of its backbone, and initial ones.

    Initial weights replace last layers of another number of classes, too. `loading.load_into` reports other mismatches.
    """
    backbone_only = all(key.startswith(f"{_BACKBONE}.") for key in state)
    completed = {**initial, **state} if backbone_only else dict(state)
    for key, value in initial.items():
        if key.rpartition(".")[0] in _HEADS and key in completed and completed[key].shape[:1] != value.shape[:1]:
            completed[key] = value
    return completed


def ranking_loss(scores: Tensor, losses: Tensor) -> Tensor:
    """Return the mean over the batch of Σ_i Σ_{j: loss_j > loss_i} max(0, 1 − s_i + s_j), a scalar.

    A part with a lower loss should have a higher score, by a margin of 1.

    Args:
        scores: (n, parts), the only argument to receive a gradient.
        losses: (n, parts), each part's cross-entropy.
    """
    worse = losses[:, None, :] > losses[:, :, None]  # [:, i, j]: part j has the larger loss
    hinge = (1 - scores[:, :, None] + scores[:, None, :]).relu()
    return (hinge * worse).sum((1, 2)).mean()
