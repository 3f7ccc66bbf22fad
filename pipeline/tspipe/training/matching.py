"""Layers that let a loss compare features of different widths; they are used in training only, and not exported."""

import copy
import functools
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.errors import RecipeError
from tspipe.losses import Sizes, Target
from tspipe.losses._statistics import TeacherStatistics
from tspipe.models.output import Output
from tspipe.recipes.schema import Match
from tspipe.utils.progress import warn

_STEPS, _BATCH, _LR = 1000, 256, 3e-3  # a second for 64 features, half a minute for 2,048


class Regressor(nn.Module):
    """Maps the student's features (n, w) to the teacher's width d by a linear layer that is trained with the student.

    The reverse, a trained map of the targets, has the trivial solution 0.
    """

    def __init__(self, width: int, feature_dim: int):
        super().__init__()
        self.linear = nn.Linear(width, feature_dim)

    def forward(self, output: Output, target: Target) -> tuple[Output, Target]:
        """Return what the loss compares."""
        return Output(self.linear(output.features), output.logits), target


class Encoder(nn.Module):
    """Compresses the teacher's features (n, d) to the student's width w by an encoder that is not trained further.

    Attributes:
        linear: followed by a ReLU, because most networks' own features are not negative.
        scale: gives the codes the mean variance of the features, so that the weights of losses keep their meaning.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, mean: Tensor, scale: Tensor):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def encode(self, features: Tensor) -> Tensor:
        """Return the codes (n, w) of features (n, d)."""
        return self.linear(features - self.mean).relu() * self.scale  # type: ignore[no-any-return]

    def forward(self, output: Output, target: Target) -> tuple[Output, Target]:
        """Return what the loss compares."""
        return output, target._replace(features=self.encode(target.features))


class MatchedLoss(nn.Module):
    """A loss of what `matching` makes of the student's output and the target."""

    def __init__(self, loss: nn.Module, matching: nn.Module):
        super().__init__()
        self.loss, self.matching, self.needs = loss, matching, loss.needs

    def start_epoch(self, epoch: int) -> None:
        """Set what changes from epoch to epoch."""
        if start := getattr(self.loss, "start_epoch", None):
            start(epoch)

    def forward(self, student: Output, target: Target) -> dict[str, Tensor]:
        """Return the terms of the loss."""
        return self.loss(*self.matching(student, target))  # type: ignore[no-any-return]


def sizes_and_statistics(match: Match, sizes: Sizes, statistics: TeacherStatistics) -> tuple[Sizes, TeacherStatistics]:
    """Return the sizes and the statistics that a loss is built with, for those of the teacher and the student."""
    if match == "linear":
        return sizes._replace(student_dim=sizes.feature_dim), statistics
    if match == "autoencoder":
        width = sizes.student_dim
        return sizes._replace(feature_dim=width), encoded(statistics, sizes.num_classes, width)
    return sizes, statistics


def match_widths(loss: nn.Module, match: Match, sizes: Sizes, statistics: TeacherStatistics) -> nn.Module:
    """Return the loss, preceded by what makes the widths meet if it reads features."""
    if "features" not in loss.needs or match in ("project", "none"):  # type: ignore[operator]
        return loss
    if match == "linear":
        return MatchedLoss(loss, Regressor(sizes.student_dim, sizes.feature_dim))
    return MatchedLoss(loss, copy.deepcopy(fit_encoder(statistics, sizes.student_dim)))  # moved to the learner's device


@functools.lru_cache(maxsize=4)  # the learners of a run share it
def encoded(statistics: TeacherStatistics, num_classes: int, width: int) -> TeacherStatistics:
    """Return the statistics of the codes of all cached features."""

    def refuse() -> NoReturn:
        raise RecipeError(
            "The losses simkd and srrl use the teacher's classifier, which takes its features and not their codes. Use "
            "another --match than autoencoder."
        )

    encoder = fit_encoder(statistics, width)
    return TeacherStatistics(
        lambda: ((encoder.encode(features.float()), labels) for features, labels in statistics.blocks()),
        refuse,
        (num_classes, width),
    )


@functools.lru_cache(maxsize=4)
def fit_encoder(statistics: TeacherStatistics, width: int) -> Encoder:
    """Train an autoencoder on the cached features: linear, ReLU, linear; return its encoder.

    It is trained on the CPU with fixed seeds, so that a resumed run has the same one; checkpoints hold it, too.
    """
    features = statistics.memory.features.float()
    mean, spread = features.mean(0), features.std().clamp(min=1e-12)
    inputs = (features - mean) / spread
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        linear, decoder = nn.Linear(inputs.shape[1], width), nn.Linear(width, inputs.shape[1])
        optimizer = torch.optim.Adam([*linear.parameters(), *decoder.parameters()], lr=_LR)
        for _ in range(_STEPS):
            batch = inputs[torch.randint(len(inputs), (min(_BATCH, len(inputs)),))]
            optimizer.zero_grad()
            F.mse_loss(decoder(linear(batch).relu()), batch).backward()
            optimizer.step()
    with torch.no_grad():
        codes = linear(inputs).relu()
        kept = 1 - float(F.mse_loss(decoder(codes), inputs) / inputs.var(0, correction=0).mean().clamp(min=1e-12))
        scale = (features.var(0).mean() / codes.var(0).mean().clamp(min=1e-12)).sqrt()
        linear.weight.div_(spread)
    warn(
        f"The autoencoder turns {len(mean)} features of the teacher into {width}; {kept:.0%} of their variance is kept."
    )
    return Encoder(linear, mean, scale)
