"""Networks: one file per architecture, the file name is the name on the command line.

A network's file defines `build(num_classes, input_shape=(C, H, W), **options) -> nn.Module`, an image classifier
that returns raw logits (n, num_classes). It may define `adapt(state)`, which renames the keys of a published
checkpoint to the network's own and gives the options those keys show, and `complete(state, own)`, which makes weights
to start training from of a file's and a new network's, where more than the last layer may be missing from the file.
A module that has `losses(images, labels) -> dict[str, Tensor]`, of images (n, C, H, W) and labels (n,) int64, is
trained as a teacher with the sum of these scalars in place of the cross-entropy of its logits.
As constants it may name what it is to be had with: `PRETRAINED`, torchvision's weights that training starts from, and
`PUBLISHED`, by dataset the address of trained ones. `torchvision:NAME` is any classifier of torchvision's.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tspipe.errors import NetworkError
from tspipe.utils import plugins

_TORCHVISION = "torchvision:"
_GIVEN = {"num_classes", "input_shape"}  # by the dataset, so they are no options


def names() -> list[str]:
    """The networks there are, those of torchvision aside."""
    return plugins.names("models.networks")


def recorded_name(name: str) -> str:
    """The name a cache or a checkpoint states: a user's `./mine.py` is `mine`, every other name is itself."""
    return plugins.recorded_name("models.networks", name)


def check_exists(name: str) -> None:
    """Raise NetworkError unless there is a network of this name, or a file of the user's that defines one."""
    _defined(name, "build")


def build(name: str, num_classes: int, input_shape: tuple[int, int, int], options: Mapping[str, Any] = {}) -> nn.Module:
    """A network with random initial weights, from torch's own generator.

    Args:
        name: one of `names()`, `torchvision:NAME`, or the path of a Python file.
        num_classes: c; the module maps (n, C, H, W) float32 to logits (n, c).
        input_shape: (C, H, W); a file whose `build` has no such parameter is called without it.
        options: the network's own, by keyword.

    Raises NetworkError: unknown name or option, or images that the network cannot take.
    """
    recorded_name(name)  # refuses a file that no cache could tell from one of ours
    if name.startswith(_TORCHVISION):
        return _build_torchvision(name, num_classes, input_shape, options)
    function = plugins.load("models.networks", name, "build", NetworkError).build
    signature = inspect.signature(function)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    takes_shape = "input_shape" in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds
    given = {"input_shape": input_shape} if takes_shape else {}
    try:
        # Bound before the call, so that a TypeError from inside the file is not taken for a wrong option.
        signature.bind(num_classes, **given, **options)
    except TypeError as problem:
        raise NetworkError(_wrong_options(name, signature, options, problem)) from None
    try:
        module = function(num_classes, **given, **options)
    except (TypeError, ValueError) as problem:
        if not options:
            raise
        raise NetworkError(_unfit_options(name, options, problem)) from problem
    if not isinstance(module, nn.Module):
        raise NetworkError(f"{name}: build returns a {type(module).__name__}, not an nn.Module.")
    return module


def adapt(name: str, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors under the network's own keys, and the build options that the keys show.

    A network that defines no `adapt` takes the checkpoint as it is, with no options.
    """
    function = _defined(name, "adapt")
    return function(state) if function else (state, {})


def complete(name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Weights to start training from, if the network defines a `complete` of its own; else None.

    Args:
        state: a checkpoint's, after `adapt`.
        own: the state dict of the network to be trained.
    """
    function = _defined(name, "complete")
    return function(state, own) if function else None


def pretrained(name: str) -> str | None:
    """torchvision's weights that training this network starts from, as `ResNet50_Weights.IMAGENET1K_V1`, if any."""
    stated: str | None = _defined(name, "PRETRAINED")
    return stated


def published(name: str, dataset: str) -> str | None:
    """Where weights of this network, trained on this dataset, are published, if that is known."""
    return (_defined(name, "PUBLISHED") or {}).get(dataset)


def _defined(name: str, what: str) -> Any:
    """What a network's file may define beside `build`, or None."""
    if name.startswith(_TORCHVISION):
        return None
    return getattr(plugins.load("models.networks", name, "build", NetworkError), what, None)


def _build_torchvision(
    name: str, num_classes: int, input_shape: tuple[int, int, int], options: Mapping[str, Any]
) -> nn.Module:
    from torchvision import models
    from torchvision.models import get_model, list_models

    # Of this module only: the detection, segmentation, video and quantised networks are no image classifiers.
    own, known = name.removeprefix(_TORCHVISION), list_models(module=models)
    if own not in known:
        near = difflib.get_close_matches(own, known, n=5, cutoff=0)
        sentence = plugins.unknown("torchvision network", own, near).removesuffix(".")
        raise NetworkError(f"{sentence}, and {len(known) - len(near)} more.")
    if input_shape[0] != 3:
        raise NetworkError(
            f"{name} takes images of 3 channels, these have {input_shape[0]}. "
            f"tspipe's own networks take any number: {', '.join(names())}."
        )
    try:
        module: nn.Module = get_model(own, weights=None, num_classes=num_classes, **options)
    except Exception as problem:  # what a wrong option raises differs from network to network
        if not options:
            raise
        raise NetworkError(_unfit_options(name, options, problem)) from problem
    return module


def _wrong_options(name: str, signature: inspect.Signature, options: Mapping[str, Any], problem: TypeError) -> str:
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [p.name for p in list(signature.parameters.values())[1:] if p.kind in keyword and p.name not in _GIVEN]
    if wrong := [option for option in options if option not in known]:
        there_are = f"There are: {', '.join(sorted(known))}." if known else "It has none."
        return f"{name} has no option {', '.join(map(repr, wrong))}. {there_are}"
    return f"{name} cannot be built: {problem}."


def _unfit_options(name: str, options: Mapping[str, Any], problem: Exception) -> str:
    given = ", ".join(f"{option}={value!r}" for option, value in options.items())
    return f"{name} cannot be built with {given}: {problem}."
