"""Losses: one paper, one file; the file name is the name on the command line.

A loss's file defines a class `Loss`, an `nn.Module` with `needs`, a subset of {"features", "logits", "labels"}, and
`forward(student, target)`, which gives a dict of named terms, each a scalar. Training minimises their sum.
"""

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn

from tspipe import plugins
from tspipe.errors import RecipeError


class Output(NamedTuple):
    """What a network gives for n images: penultimate features (n, d) and logits (n, c), float32."""

    features: Tensor
    logits: Tensor


class Target(NamedTuple):
    """What a student should give for n images: the teacher's features and logits, and labels (n,) int64."""

    features: Tensor
    logits: Tensor
    labels: Tensor


def names() -> list[str]:
    """The losses there are."""
    return plugins.names("losses")


def build(name: str, options: dict[str, Any]) -> nn.Module:
    """The loss of this name; of `options` it gets those its constructor names."""
    loss = plugins.load("losses", name, "Loss", RecipeError).Loss
    wanted = inspect.signature(loss).parameters
    return loss(**{key: value for key, value in options.items() if key in wanted})  # type: ignore[no-any-return]
