"""Relational knowledge distillation of Park, Kim, Lu and Cho (arXiv 1904.05068): distances and angles."""

import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.losses import Target, check_options, cross_entropy
from tspipe.models.output import Output


def relations(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances (m, m) over their mean, and the cosines (m, m, m) of the angles at i between j and k.

    Args:
        features: (m, d). An image is at distance 0 from itself, which counts neither in the mean nor as an angle.
    """
    differences = features[None, :] - features[:, None]
    distances = differences.norm(dim=2)
    directions = differences / distances.clamp(min=1e-12)[:, :, None]
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.clamp(min=1e-12), directions @ directions.transpose(1, 2)


class Loss(nn.Module):
    """Huber losses of the distances and of the angles within a batch, and the cross-entropy.

    The weights are those of the benchmark of Tian et al. (arXiv 1910.10699). The angles take time and memory that grow
    with the cube of the batch.
    """

    needs = frozenset({"features", "labels"})

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0):
        super().__init__()
        check_options("rkd", not_negative={"distance_weight": distance_weight, "angle_weight": angle_weight})
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms `distance`, `angle` and `xent`."""
        (distances, angles), (teacher_distances, teacher_angles) = map(relations, (student.features, target.features))
        return {
            "distance": self.distance_weight * F.smooth_l1_loss(distances, teacher_distances),
            "angle": self.angle_weight * F.smooth_l1_loss(angles, teacher_angles),
            "xent": cross_entropy(student.logits, target.labels),
        }
