"""Variational information distillation of Ahn, Hu, Damianou, Lawrence and Dai (arXiv 1904.05835), Equations 4 to 6."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.losses import Target
from tspipe.models.output import Output

_LEAST, _INITIAL = 1e-5, 5.0  # variances


def vid_loss(
    regressed: Tensor, logits: Tensor, teacher_features: Tensor, labels: Tensor, variance: Tensor
) -> dict[str, Tensor]:
    """Mean of ½((μ(s) − t)² / σ² + log σ²) over the m·d elements, and CE over the batch, as two terms.

    The first is −log q(t | s) of a normal distribution, without its constant: low where the student says what the
    teacher says.

    Args:
        regressed: μ(s), what is made of the student's features, (m, d).
        logits: the student's (m, c).
        teacher_features: t, (m, d).
        labels: y, (m,) int64.
        variance: σ², (d,), one for each of the teacher's features.
    """
    surprise = ((regressed - teacher_features) ** 2 / variance + variance.log()) / 2
    return {"vid": surprise.mean(), "xent": F.cross_entropy(logits, labels)}


class Loss(nn.Module):
    """`vid_loss` with what it learns beside the student: the regressor μ, and α, of which σ² = softplus(α) + 1e-5.

    The paper's μ for a map of features is a stack of 1×1 convolutions. For a vector of them, and a student whose
    features g(x) have the teacher's width d already, ours is one Linear(d, d).
    """

    needs = frozenset({"features", "labels"})

    def __init__(self, width: int):
        super().__init__()
        self.regressor = nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.full((width,), math.log(math.expm1(_INITIAL - _LEAST))))

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Terms `vid` and `xent`."""
        variance = F.softplus(self.alpha) + _LEAST
        regressed = self.regressor(student.features)
        return vid_loss(regressed, student.logits, target.features, target.labels, variance)
