"""Decoupled distillation (arXiv 2203.08679) of standardised logits (arXiv 2403.01427)."""

from torch import Tensor

from tspipe.losses import Target, dkd
from tspipe.losses.lskd import standardise
from tspipe.models.output import Output


class Loss(dkd.Loss):
    """`dkd` of the standardised logits, and the cross-entropy of the plain ones.

    The defaults are those of `dkd` times 9, at temperature 2, as the second paper states them. Its published code
    computes α 9, β 81 at temperature 4.
    """

    name = "dkd_lskd"

    def __init__(self, alpha: float = 9.0, beta: float = 72.0, temperature: float = 2.0, warmup: int = 20):
        super().__init__(alpha, beta, temperature, warmup)

    def decoupled(self, student: Output, target: Target) -> tuple[Tensor, Tensor]:
        """Return T² · TCKD and T² · NCKD."""
        logits, teacher_logits = standardise(student.logits), standardise(target.logits)
        return dkd.dkd_loss(logits, teacher_logits, target.labels, self.temperature)
