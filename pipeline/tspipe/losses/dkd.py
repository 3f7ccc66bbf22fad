"""Decoupled knowledge distillation of Zhao, Cui, Song, Qiu and Liang (arXiv 2203.08679), Equation 7."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tspipe.losses import Target, check_options, cross_entropy, labelled_mean
from tspipe.losses._warm_up import WarmUpLoss
from tspipe.models.output import Output

_EXCLUDED = -1e30  # the logit of a class that is left out; a softmax turns it into 0


def dkd_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return T² · TCKD and T² · NCKD, each the mean over the images with a label.

    TCKD is KL(b ‖ b̂) of the probabilities b = (p_y, 1 − p_y) of the label y and of all other classes together. NCKD is
    KL(p ‖ p̂) among the other classes. p is the teacher's softmax(logits / T), p̂ the student's.

    Args:
        logits: the student's, (m, c).
        teacher_logits: (m, c).
        labels: y, (m,) int64, or `NO_LABEL`.
        temperature: T.
    """
    known = labels.clamp(min=0)[:, None]
    (student, student_others), (teacher, teacher_others) = (
        _decouple(z / temperature, known) for z in (logits, teacher_logits)
    )
    tckd = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    nckd = F.kl_div(student_others, teacher_others, reduction="none", log_target=True).sum(1)
    return temperature**2 * labelled_mean(tckd, labels), temperature**2 * labelled_mean(nckd, labels)


def _decouple(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithms of (p_y, 1 − p_y), (m, 2), and of the probabilities among the other classes, (m, c)."""
    others = logits.scatter(1, labels, _EXCLUDED)
    parts = torch.cat([logits.gather(1, labels), others.logsumexp(1, keepdim=True)], dim=1)
    return parts - logits.logsumexp(1, keepdim=True), others.log_softmax(1)


class Loss(WarmUpLoss):
    """α · T² · TCKD + β · T² · NCKD, which grow over `warmup` epochs, and the cross-entropy.

    The defaults are the authors' for ResNet-56 and ResNet-20 on CIFAR-100, of 240 epochs.
    """

    needs = frozenset({"logits", "labels"})
    name = "dkd"  # in messages

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, warmup: int = 20):
        super().__init__(warmup)
        check_options(self.name, {"temperature": temperature}, {"alpha": alpha, "beta": beta, "warmup": warmup})
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms `tckd`, `nckd` and `xent`."""
        tckd, nckd = self.decoupled(student, target)
        xent = cross_entropy(student.logits, target.labels)
        return {"tckd": self.ramp * self.alpha * tckd, "nckd": self.ramp * self.beta * nckd, "xent": xent}

    def decoupled(self, student: Output, target: Target) -> tuple[Tensor, Tensor]:
        """Return T² · TCKD and T² · NCKD."""
        return dkd_loss(student.logits, target.logits, target.labels, self.temperature)
