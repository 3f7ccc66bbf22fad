"""Logit standardisation of Sun, Ren, Li, Wang and Cao (arXiv 2403.01427), Algorithm 1, before Hinton's distillation."""

from torch import Tensor, nn

from tspipe.losses import Target, check_options, cross_entropy
from tspipe.losses.kd import softened_kl
from tspipe.models.output import Output


def standardise(logits: Tensor) -> Tensor:
    """Return logits (m, c) with mean 0 and standard deviation 1 for each image."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


class Loss(nn.Module):
    """weight · T² · KL of the standardised logits, and xent_weight · CE of the plain ones; the authors' weights."""

    needs = frozenset({"logits", "labels"})

    def __init__(self, temperature: float = 2.0, weight: float = 9.0, xent_weight: float = 0.1):
        super().__init__()
        check_options("lskd", {"temperature": temperature}, {"weight": weight, "xent_weight": xent_weight})
        self.temperature, self.weight, self.xent_weight = temperature, weight, xent_weight

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms `kl` and `xent`."""
        kl = softened_kl(standardise(student.logits), standardise(target.logits), self.temperature)
        xent = cross_entropy(student.logits, target.labels)
        return {"kl": self.weight * self.temperature**2 * kl, "xent": self.xent_weight * xent}
