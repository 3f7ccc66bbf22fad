"""A student without what only training needs: g(x) is merged with the classifier, batch norms with convolutions."""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from tspipe.deploy.student import Student
from tspipe.errors import NetworkError
from tspipe.models.feature_net import FeatureNet
from tspipe.models.inference import fold_if_equal
from tspipe.models.probe import eval_mode, probe_images

_TOLERANCE = 1e-4  # max|Δ| / max|logit|


def fold(student: Student) -> nn.Module:
    """Return a module that computes the student's logits with fewer weights; see `fold_network`."""
    return fold_network(student.network, student.facts.input_shape, str(student.path))


def fold_network(student: FeatureNet, input_shape: tuple[int, int, int], source: str) -> nn.Module:
    """Return a module that computes a student's logits with fewer weights, in eval mode; the student is not modified.

    g(x) = Linear(native, d) and the classifier Linear(d, c) become one Linear(native, c), so a wide teacher costs
    nothing at inference. Batch norms are folded into convolutions where that leaves the output unchanged. Raises
    NetworkError if the logits of a probe change by more than 1e-4, max|Δ| / max|logit|.
    """
    network = copy.deepcopy(student).eval()
    (backbone, *projection), head = cast(nn.Sequential, network.backbone), network.head
    probe = probe_images(input_shape).to(head.weight.device)
    classifier = merge(cast(nn.Linear, projection[0]), head) if projection else head
    folded = nn.Sequential(fold_if_equal(backbone, probe), classifier).eval()
    with eval_mode(student):
        expected = student(probe).logits
    with eval_mode(folded):
        difference = relative_difference(folded(probe), expected)
    if not difference <= _TOLERANCE:
        raise NetworkError(f"Folding changes the logits of {source} by {difference:.1g} of the largest.")
    return folded.requires_grad_(False)


def merge(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """Return the Linear that computes second(first(x)); the product of the weights is computed in float64."""
    weight, bias = second.weight.double(), second.bias.double()
    merged = nn.Linear(first.in_features, second.out_features, device=second.weight.device)
    with torch.no_grad():
        merged.weight.copy_(weight @ first.weight.double())
        merged.bias.copy_(weight @ first.bias.double() + bias)
    return merged


def relative_difference(one: Tensor, two: Tensor) -> float:
    """Return max|one − two| / max|two|."""
    return float((one - two).abs().max() / two.abs().max().clamp(min=1e-12))
