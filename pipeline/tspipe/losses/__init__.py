"""Losses: one file per paper; the file's name is the loss's name on the command line.

A loss's file defines a class `Loss`, an `nn.Module` with two members:

- `needs`: a subset of {"features", "logits", "labels"}, the fields of the target that it reads;
- `forward(student, target)`: returns a non-empty dict of named terms, each a floating-point scalar.

Training minimises the sum of the terms. Images without a label have the label `NO_LABEL`; `cross_entropy` and
`labelled_mean` leave them out.

The arguments of the constructor are the loss's options, from `[losses.NAME]` in the recipe, except those that are given
if the constructor has parameters of their names: the fields of `Sizes`, and the statistics of the cache's training rows
in `TeacherStatistics`, such as `class_means`. A statistic is computed only if a loss asks for it.

Two more members are optional:

- `start_epoch(epoch)`: called before each epoch, counted from 0, for weights that change during training;
- `student_head`: an `nn.Linear` that replaces the student's classifier and is not trained.

A buffer that changes in training must be persistent, so that checkpoints hold it.
"""

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.cache.layout import NO_LABEL
from tspipe.errors import RecipeError
from tspipe.losses._statistics import NAMES as STATISTICS
from tspipe.losses._statistics import TeacherStatistics
from tspipe.models.output import Output
from tspipe.utils import plugins


class Target(NamedTuple):
    """What a student learns from n images: the teacher's features and logits, and labels (n,) int64.

    A field that the loss does not need is empty, (n, 0). An image without a label has `NO_LABEL`. The student alone may
    learn from labels that are probabilities (n, c).
    """

    features: Tensor
    logits: Tensor
    labels: Tensor


class Sizes(NamedTuple):
    """The sizes that a loss's constructor may ask for.

    Attributes:
        feature_dim: d, the number of features in a target.
        num_classes: c, the number of logits.
        student_dim: the number of the student's features, d unless it keeps its own width.
    """

    feature_dim: int
    num_classes: int
    student_dim: int


class BuiltLoss(NamedTuple):
    """A loss that fulfils the contract, and the names of its terms in order."""

    module: nn.Module
    terms: list[str]


def names() -> list[str]:
    """Return the names of tspipe's losses."""
    return plugins.names("losses")


def recorded_name(name: str) -> str:
    """Return the name that tables show: `mine` for a user's `./mine.py`, else the name itself."""
    return plugins.recorded_name("losses", name)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy over the images that have a label, 0 if none has one.

    Args:
        logits: (n, c).
        labels: (n,) int64, or `NO_LABEL`; or probabilities (n, c).
        label_smoothing: the probability that is spread over all classes.
    """
    if labels.is_floating_point():
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    total = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum", label_smoothing=label_smoothing)
    return total / labels.ne(NO_LABEL).sum().clamp(min=1)


def labelled_mean(values: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of values (n,) over the images that have a label, 0 if none has one."""
    labelled = labels.ne(NO_LABEL)
    return values.where(labelled, 0).sum() / labelled.sum().clamp(min=1)


def check_options(loss: str, positive: Mapping[str, float] = {}, not_negative: Mapping[str, float] = {}) -> None:
    """Raise RecipeError for an option of a loss that is not a finite number in its range."""
    for option, value in {**positive, **not_negative}.items():
        in_range = value > 0 if option in positive else value >= 0
        if not in_range or not math.isfinite(value):
            needed = "above 0" if option in positive else "of 0 or more"
            raise RecipeError(f"The loss {loss} cannot have {option}={value:g}: it is a number {needed}.")


def build(
    name: str, sizes: Sizes, options: Mapping[str, Any] = {}, statistics: TeacherStatistics | None = None
) -> BuiltLoss:
    """Build a loss, and check its contract once on random outputs for two images.

    Args:
        name: one of `names()`, or the path of a Python file.
        sizes: the widths of the features and the number of classes.
        options: arguments of the loss's constructor, from `[losses.NAME]` in the recipe.
        statistics: those of the cache; None for placeholders, which suffice to check the options.

    Raises RecipeError for an unknown option, a value that the loss does not accept, and a broken contract.
    """
    constructor = plugins.load("losses", name, "Loss", RecipeError).Loss
    statistics = statistics or TeacherStatistics.placeholder(sizes.feature_dim, sizes.num_classes)
    parameters = inspect.signature(constructor).parameters.keys()
    given = {key: value for key, value in sizes._asdict().items() if key in parameters}
    given |= {key: getattr(statistics, key) for key in sorted(STATISTICS & parameters)}
    section = f"[losses.{recorded_name(name)}]"
    loss = plugins.construct(functools.partial(constructor, **given), f"The loss {name}", options, RecipeError, section)
    return BuiltLoss(loss, _check_terms(loss, name, _check_needs(loss, name), sizes))


def _check_needs(loss: nn.Module, name: str) -> Collection[str]:
    if not isinstance(loss, nn.Module):
        raise RecipeError(f"The loss {name} must be an nn.Module, not a {type(loss).__name__}.")
    needs: Any = getattr(loss, "needs", None)
    if isinstance(needs, set | frozenset | list | tuple) and all(need in Target._fields for need in needs):
        return needs
    raise RecipeError(
        f"The loss {name} must define `needs`, a subset of {{'features', 'logits', 'labels'}}; it is {needs!r}."
    )


def _check_terms(loss: nn.Module, name: str, needs: Collection[str], sizes: Sizes) -> list[str]:
    d, c, w = sizes
    state = copy.deepcopy(loss.state_dict())
    # Training must not depend on the numbers that the check draws; PyTorch warns of widths that differ.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        torch.default_generator.manual_seed(0)
        output = Output(*(torch.rand(2, size, requires_grad=True) for size in (w, c)))
        features = torch.rand(2, d if "features" in needs else 0)
        logits = torch.rand(2, c if "logits" in needs else 0)
        try:
            terms = loss(output, Target(features, logits, labels=torch.zeros(2, dtype=torch.int64)))
        except RuntimeError as problem:
            if w == d:
                raise
            raise RecipeError(
                f"The loss {name} cannot compare the student's {w} features with {d} of the teacher's. "
                "Use --match linear, or a loss of logits."
            ) from problem
    loss.load_state_dict(state)
    if not isinstance(terms, dict):
        returned = f"a {type(terms).__name__}"
    elif not terms:
        returned = "an empty dict"
    elif wrong := [key for key, term in terms.items() if not isinstance(key, str) or not _is_scalar(term)]:
        term = terms[wrong[0]]
        kind = f"{tuple(term.shape)} {term.dtype}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
        returned = f"{wrong[0]!r}: {kind}"
    else:
        return list(terms)
    raise RecipeError(
        f"The loss {name} must return a dict of names and floating-point scalar tensors, such as "
        f"{{'mse': tensor(0.5)}}; it returns {returned}."
    )


def _is_scalar(term: object) -> bool:
    return isinstance(term, Tensor) and term.shape == () and term.is_floating_point()
