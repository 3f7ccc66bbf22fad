"""Losses: one paper, one file; the file name is the name on the command line.

A loss's file defines a class `Loss`, an `nn.Module` with `needs`, a subset of {"features", "logits", "labels"}, and
`forward(student, target)`, which gives a dict of named terms, each a scalar. Training minimises their sum.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from tspipe.errors import RecipeError
from tspipe.utils import plugins


class Target(NamedTuple):
    """What a student should give for n images: the teacher's features and logits, and labels (n,) int64."""

    features: Tensor
    logits: Tensor
    labels: Tensor


def names() -> list[str]:
    """The losses there are."""
    return plugins.names("losses")


def recorded_name(name: str) -> str:
    """The name that tables state: a user's `./mine.py` is `mine`, every other name is itself."""
    return plugins.recorded_name("losses", name)


def build(name: str, offered: Mapping[str, Any], options: Mapping[str, Any] = {}) -> nn.Module:
    """The loss of this name.

    Args:
        offered: of these it gets those that its constructor names.
        options: its own, by keyword.

    Raises RecipeError for an option that it has not, or a value that it cannot take.
    """
    loss = plugins.load("losses", name, "Loss", RecipeError).Loss
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    wanted = [name for name, parameter in inspect.signature(loss).parameters.items() if parameter.kind not in variable]
    if wrong := [option for option in options if option not in wanted]:
        raise RecipeError(f"The loss {name} has no option {wrong[0]!r}. There are: {', '.join(wanted) or 'none'}.")
    given = {key: value for key, value in offered.items() if key in wanted}
    try:
        return loss(**{**given, **options})  # type: ignore[no-any-return]
    except (TypeError, ValueError) as problem:
        if not options:
            raise
        said = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise RecipeError(f"The loss {name} cannot be built with {said}: {problem}.") from problem
