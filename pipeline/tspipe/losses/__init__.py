"""Losses: one file per paper; the file's name is the loss's name on the command line.

A loss's file defines a class `Loss`, an `nn.Module` with two members:

- `needs`: a subset of {"features", "logits", "labels"}, the fields of the target that it reads;
- `forward(student, target)`: returns a non-empty dict of named terms, each a floating-point scalar.

Training minimises the sum of the terms. The arguments of the constructor are the loss's options. They come from
`[losses.NAME]` in the recipe, except `feature_dim` and `num_classes`, which are given if the constructor has them.
"""

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tspipe.errors import RecipeError
from tspipe.models.output import Output
from tspipe.utils import plugins


class Target(NamedTuple):
    """What a student learns from n images: the teacher's features and logits, and labels (n,) int64.

    A field that the loss does not need is empty, (n, 0).
    """

    features: Tensor
    logits: Tensor
    labels: Tensor


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


def build(name: str, feature_dim: int, num_classes: int, options: Mapping[str, Any] = {}) -> BuiltLoss:
    """Build a loss, and check its contract once on random outputs for two images.

    Args:
        name: one of `names()`, or the path of a Python file.
        feature_dim: d, the number of features.
        num_classes: c, the number of logits.
        options: arguments of the loss's constructor, from `[losses.NAME]` in the recipe.

    Raises RecipeError for an unknown option, a value that the loss does not accept, and a broken contract.
    """
    constructor = plugins.load("losses", name, "Loss", RecipeError).Loss
    given = {"feature_dim": feature_dim, "num_classes": num_classes}
    named = {key: value for key, value in given.items() if key in inspect.signature(constructor).parameters}
    section = f"[losses.{recorded_name(name)}]"
    loss = plugins.construct(functools.partial(constructor, **named), f"The loss {name}", options, RecipeError, section)
    return BuiltLoss(loss, _check_terms(loss, name, _check_needs(loss, name), feature_dim, num_classes))


def _check_needs(loss: nn.Module, name: str) -> Collection[str]:
    if not isinstance(loss, nn.Module):
        raise RecipeError(f"The loss {name} must be an nn.Module, not a {type(loss).__name__}.")
    needs: Any = getattr(loss, "needs", None)
    if isinstance(needs, set | frozenset | list | tuple) and all(need in Target._fields for need in needs):
        return needs
    raise RecipeError(
        f"The loss {name} must define `needs`, a subset of {{'features', 'logits', 'labels'}}; it is {needs!r}."
    )


def _check_terms(loss: nn.Module, name: str, needs: Collection[str], feature_dim: int, num_classes: int) -> list[str]:
    with torch.random.fork_rng(devices=[]):  # training must not depend on the numbers that the check draws
        torch.default_generator.manual_seed(0)
        output = Output(*(torch.rand(2, size, requires_grad=True) for size in (feature_dim, num_classes)))
        features = torch.rand(2, feature_dim if "features" in needs else 0)
        logits = torch.rand(2, num_classes if "logits" in needs else 0)
        terms = loss(output, Target(features, logits, labels=torch.zeros(2, dtype=torch.int64)))
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
