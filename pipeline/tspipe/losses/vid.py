"""Variational information distillation of Ahn, Hu, Damianou, Lawrence and Dai (arXiv 1904.05835), Equations 4 to 6."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.losses import Target, cross_entropy
from tspipe.models.output import Output

_MIN_VARIANCE, _INITIAL_VARIANCE = 1e-5, 5.0


def vid_loss(
    prediction: Tensor, logits: Tensor, teacher_features: Tensor, labels: Tensor, variance: Tensor
) -> dict[str, Tensor]:
    """Return two terms: the mean of ½((μ(s) − t)² / σ² + log σ²) over the m·d elements, and CE over the batch.

    The first is −log q(t | s) of a normal distribution without its constant.

    Args:
        prediction: μ(s), the teacher's features as predicted from the student's, (m, d).
        logits: the student's, (m, c).
        teacher_features: t, (m, d).
        labels: y, (m,) int64.
        variance: σ², (d,), one for each feature.
    """
    negative_log_likelihood = ((prediction - teacher_features) ** 2 / variance + variance.log()) / 2
    return {"vid": negative_log_likelihood.mean(), "xent": cross_entropy(logits, labels)}


class Loss(nn.Module):
    """`vid_loss` with its trainable weights: the regressor μ, and α with σ² = softplus(α) + 1e-5.

    The paper's μ for feature maps is a stack of 1×1 convolutions. Here features are vectors, so μ is one Linear.
    """

    needs = frozenset({"features", "labels"})

    def __init__(self, student_dim: int, feature_dim: int):
        super().__init__()
        self.regressor = nn.Linear(student_dim, feature_dim)
        initial_alpha = math.log(math.expm1(_INITIAL_VARIANCE - _MIN_VARIANCE))
        self.alpha = nn.Parameter(torch.full((feature_dim,), initial_alpha))

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms `vid` and `xent`."""
        variance = F.softplus(self.alpha) + _MIN_VARIANCE
        prediction = self.regressor(student.features)
        return vid_loss(prediction, student.logits, target.features, target.labels, variance)
