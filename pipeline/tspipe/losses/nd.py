"""KD++ of Wang, Cheng, Duan, Li, Yang and Yang (arXiv 2305.17007): feature norm and direction, beside Hinton's loss."""

import torch.nn.functional as F
from torch import Tensor

from tspipe.losses import Target, check_options, cross_entropy, labelled_mean
from tspipe.losses._warm_up import WarmUpLoss
from tspipe.losses.kd import softened_kl
from tspipe.models.output import Output


class Loss(WarmUpLoss):
    """weight · (1 − s·e_y / max(‖s‖, ‖t‖)), kd_weight · T² · KL, which grows over `warmup` epochs, and CE.

    s and t are the student's and the teacher's features, e_y the direction of the mean of the label's cached features.
    The defaults are the authors' for ResNet-56 and ResNet-20 on CIFAR-100.
    """

    needs = frozenset({"features", "logits", "labels"})
    directions: Tensor

    def __init__(
        self,
        class_means: Tensor,
        weight: float = 2.0,
        kd_weight: float = 1.0,
        temperature: float = 4.0,
        warmup: int = 20,
    ):
        super().__init__(warmup)
        check_options("nd", {"temperature": temperature}, {"weight": weight, "kd_weight": kd_weight, "warmup": warmup})
        self.weight, self.kd_weight, self.temperature = weight, kd_weight, temperature
        self.register_buffer("directions", F.normalize(class_means), persistent=False)

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms `nd`, `kl` and `xent`."""
        projection = (student.features * self.directions[target.labels.clamp(min=0)]).sum(1)
        norm = student.features.norm(dim=1).maximum(target.features.norm(dim=1)).clamp(min=1e-12)
        kl = softened_kl(student.logits, target.logits, self.temperature)
        return {
            "nd": self.weight * labelled_mean(1 - projection / norm, target.labels),
            "kl": self.ramp * self.kd_weight * self.temperature**2 * kl,
            "xent": cross_entropy(student.logits, target.labels),
        }
