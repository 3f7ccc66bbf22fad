"""Cross-entropy with the labels: the student alone, without a teacher."""

from torch import Tensor, nn

from tspipe.errors import RecipeError
from tspipe.losses import Target, cross_entropy
from tspipe.models.output import Output


class Loss(nn.Module):
    """Mean cross-entropy over the batch, with label smoothing (Szegedy et al., arXiv 1512.00567, section 7)."""

    needs = frozenset({"labels"})

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise RecipeError(
                f"The loss xent cannot have label_smoothing={label_smoothing:g}: it is from 0 to below 1."
            )
        self.label_smoothing = label_smoothing

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the term `xent`."""
        return {"xent": cross_entropy(student.logits, target.labels, self.label_smoothing)}
