"""Knowledge distillation of Hinton, Vinyals and Dean (arXiv 1503.02531, section 2), from cached logits."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.errors import RecipeError
from tspipe.losses import Target, cross_entropy
from tspipe.models.output import Output


def kd_loss(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 4.0, alpha: float = 0.9
) -> dict[str, Tensor]:
    """Return the two terms of α·T² · KL(softmax(teacher / T) ‖ softmax(student / T)) + (1 − α) · CE(student, y).

    Both are means over the batch. The factor T² compensates for gradients of the first term that scale with 1 / T².

    Args:
        logits: the student's, (m, c).
        teacher_logits: (m, c).
        labels: y, (m,) int64.
        temperature: T.
        alpha: α, the weight of the teacher.
    """
    kl = softened_kl(logits, teacher_logits, temperature)
    return {"kl": alpha * temperature**2 * kl, "xent": (1 - alpha) * cross_entropy(logits, labels)}


def softened_kl(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over the batch, for logits (m, c)."""
    student, teacher = ((z / temperature).log_softmax(1) for z in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class Loss(nn.Module):
    """`kd_loss` with its options. Raises RecipeError for values out of range."""

    needs = frozenset({"logits", "labels"})

    def __init__(self, temperature: float = 4.0, alpha: float = 0.9):
        super().__init__()
        if not 0 < temperature < math.inf or not 0 <= alpha <= 1:
            raise RecipeError(
                f"The loss kd cannot have temperature={temperature:g} and alpha={alpha:g}: a temperature is above 0, "
                "alpha from 0 to 1."
            )
        self.temperature, self.alpha = temperature, alpha

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms `kl` and `xent`."""
        return kd_loss(student.logits, target.logits, target.labels, self.temperature, self.alpha)
