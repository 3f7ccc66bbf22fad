"""Cross-entropy with the labels: the student alone, without a teacher."""

import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.losses import Target
from tspipe.models.output import Output


class Loss(nn.Module):
    """Mean cross-entropy over the batch."""

    needs = frozenset({"labels"})

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the term `xent`."""
        return {"xent": F.cross_entropy(student.logits, target.labels)}
