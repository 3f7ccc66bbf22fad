"""The projector of Miles and Mikolajczyk (arXiv 2303.11098): a linear map, batch norm, log Σ|d|⁴."""

import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.errors import RecipeError
from tspipe.losses import Target, check_options, cross_entropy
from tspipe.models.output import Output


class Loss(nn.Module):
    """weight · log Σ|d|⁴, or weight · MSE, and the cross-entropy; the sum is over the batch and the features.

    d is the difference of the projected student's features, standardised over the batch (a batch norm without affine
    parameters), and the teacher's, standardised over the cache in place of the authors' second batch norm. The weight
    is the one in the authors' code. The projector is dropped after training.
    """

    needs = frozenset({"features", "labels"})
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        student_dim: int,
        feature_mean: Tensor,
        feature_std: Tensor,
        weight: float = 2.0,
        distance: str = "logsum",
    ):
        super().__init__()
        check_options("projector", not_negative={"weight": weight})
        if distance not in ("logsum", "mse"):
            raise RecipeError(f"The loss projector cannot have distance={distance!r}: it is logsum or mse.")
        self.weight, self.distance = weight, distance
        width = len(feature_mean)
        norm = nn.BatchNorm1d(width, eps=1e-4, affine=False, track_running_stats=False)
        self.projector = nn.Sequential(nn.Linear(student_dim, width), norm)
        self.register_buffer("mean", feature_mean, persistent=False)
        self.register_buffer("std", feature_std, persistent=False)

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms `projector` and `xent`."""
        projected, expected = self.projector(student.features), (target.features - self.mean) / self.std
        if self.distance == "mse":
            term = F.mse_loss(projected, expected)
        else:
            term = ((projected - expected) ** 4).sum().clamp(min=1e-12).log()
        return {"projector": self.weight * term, "xent": cross_entropy(student.logits, target.labels)}
