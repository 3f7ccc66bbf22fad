"""The reused teacher classifier of Chen, Mei, Zhang, Wang, Feng and Chen (arXiv 2203.14001)."""

import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.losses import Target
from tspipe.models.output import Output


class Loss(nn.Module):
    """MSE(f(x), g(x)) alone; the student's classifier is the teacher's, and is not trained.

    The projector is g(x), one linear layer on the pooled features. At export it folds with the classifier, so nothing
    of it remains in the student; the authors' projector of three convolutions on feature maps would.
    """

    needs = frozenset({"features"})

    def __init__(self, classifier: nn.Linear):
        super().__init__()
        self.student_head = classifier

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the term `mse`."""
        return {"mse": F.mse_loss(student.features, target.features)}
