"""The teacher-student loss of Landro, Gallo and La Grassa (arXiv 2005.00393), Equations 5 and 6."""

import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.losses import Target, cross_entropy
from tspipe.models.output import Output


def ts_loss(
    features: Tensor,
    logits: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    mse_weight: float = 1.0,
    xent_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Return the two terms of λ_mse · MSE(f(x), g(x)) + λ_xent · CE(z(g(x)), y).

    The MSE is the mean over the m·d elements (Eq. 6), the cross-entropy the mean over the batch.

    Args:
        features: g(x), the student's, (m, d).
        logits: z(g(x)), the student's, (m, c).
        teacher_features: f(x), (m, d).
        labels: y, (m,) int64; for random images the teacher's argmax.
        mse_weight: λ_mse.
        xent_weight: λ_xent.
    """
    return {
        "mse": mse_weight * F.mse_loss(features, teacher_features),
        "xent": xent_weight * cross_entropy(logits, labels),
    }


class Loss(nn.Module):
    """`ts_loss` with its weights, both 1 in the paper."""

    needs = frozenset({"features", "labels"})

    def __init__(self, mse_weight: float = 1.0, xent_weight: float = 1.0):
        super().__init__()
        self.mse_weight, self.xent_weight = mse_weight, xent_weight

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms `mse` and `xent`."""
        return ts_loss(*student, target.features, target.labels, self.mse_weight, self.xent_weight)
