"""Probabilistic knowledge transfer of Passalis and Tefas (arXiv 1803.10837), with cosine similarity."""

import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.losses import Target, check_options, cross_entropy
from tspipe.models.output import Output

_EPSILON = 1e-7


def neighbour_probabilities(features: Tensor) -> Tensor:
    """Return p_j|i, (m, m): the cosine similarities of features (m, d), from 0 to 1, divided by their sum over j."""
    directions = F.normalize(features)
    similarity = (directions @ directions.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


class Loss(nn.Module):
    """weight · the mean over pairs (i, j) of p_j|i · log(p_j|i / p̂_j|i), and the cross-entropy.

    p are the teacher's probabilities that j is a neighbour of i within the batch, p̂ the student's. The mean is over
    m², so the weight, that of the benchmark of Tian et al. (arXiv 1910.10699), is for batches of 64.
    """

    needs = frozenset({"features", "labels"})

    def __init__(self, weight: float = 30_000.0):
        super().__init__()
        check_options("pkt", not_negative={"weight": weight})
        self.weight = weight

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms `pkt` and `xent`."""
        student_p, teacher_p = (neighbour_probabilities(features) for features in (student.features, target.features))
        pkt = (teacher_p * ((teacher_p + _EPSILON) / (student_p + _EPSILON)).log()).mean()
        return {"pkt": self.weight * pkt, "xent": cross_entropy(student.logits, target.labels)}
