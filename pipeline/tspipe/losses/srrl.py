"""Softmax regression representation learning of Yang, Martinez, Bulat and Tzimiropoulos (ICLR 2021)."""

import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.losses import Target, check_options, cross_entropy
from tspipe.models.output import Output


class Loss(nn.Module):
    """CE + α · MSE of the features + β · MSE of the logits that the teacher's classifier gives for the student's.

    The student's features pass a connector: a linear map, batch norm and, if the teacher's features are not negative,
    a ReLU. The authors' is a 1×1 convolution on feature maps; here features are pooled vectors. It is dropped after
    training. The weights are those of the authors' code.
    """

    needs = frozenset({"features", "logits", "labels"})

    def __init__(
        self,
        student_dim: int,
        classifier: nn.Linear,
        is_nonnegative: bool,
        alpha: float = 1.0,
        beta: float = 1.0,
    ):
        super().__init__()
        check_options("srrl", not_negative={"alpha": alpha, "beta": beta})
        self.alpha, self.beta, self.classifier = alpha, beta, classifier
        width = classifier.in_features
        linear = nn.Linear(student_dim, width, bias=False)
        norm = nn.BatchNorm1d(width, track_running_stats=False)
        self.connector = nn.Sequential(linear, norm, nn.ReLU() if is_nonnegative else nn.Identity())

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms `mse`, `regression` and `xent`."""
        connected = self.connector(student.features)
        return {
            "mse": self.alpha * F.mse_loss(connected, target.features),
            "regression": self.beta * F.mse_loss(self.classifier(connected), target.logits),
            "xent": cross_entropy(student.logits, target.labels),
        }
