"""Distillation from a stronger teacher of Huang, You, Wang, Qian and Xu (arXiv 2205.10536)."""

import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.losses import Target, check_options, cross_entropy
from tspipe.models.output import Output


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean over rows of Pearson's correlation of a (n, k) and b (n, k)."""
    a, b = (rows - rows.mean(1, keepdim=True) for rows in (a, b))
    return F.cosine_similarity(a, b).mean()


class Loss(nn.Module):
    """CE + β · T² · (1 − inter) + gamma · T² · (1 − intra).

    `inter` is Pearson's correlation of the student's and the teacher's softmax(logits / T) over the classes, averaged
    over images; `intra` is over the images of the batch, averaged over classes. The defaults are the authors' for
    ImageNet; for CIFAR-100 their temperature is 4.
    """

    needs = frozenset({"logits", "labels"})

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0):
        super().__init__()
        check_options("dist", {"temperature": temperature}, {"beta": beta, "gamma": gamma})
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms `inter`, `intra` and `xent`."""
        student_p, teacher_p = ((logits / self.temperature).softmax(1) for logits in (student.logits, target.logits))
        scale = self.temperature**2
        return {
            "inter": self.beta * scale * (1 - correlation(student_p, teacher_p)),
            "intra": self.gamma * scale * (1 - correlation(student_p.T, teacher_p.T)),
            "xent": cross_entropy(student.logits, target.labels),
        }
