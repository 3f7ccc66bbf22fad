"""Networks: one file per architecture; the file's name is the network's name on the command line.

A network's file defines `build(num_classes, input_shape=(C, H, W), **options) -> nn.Module`. It returns an image
classifier that maps images (n, C, H, W) float32 to raw logits (n, num_classes).

A file may also define:

- `VARIANTS`: a literal dict of the names that the file provides in place of its own, each with the arguments that
  `build` gets for it, as in `{"resnet20": {"blocks": 3}}`;
- `adapt(state)`: renames the keys of a published checkpoint to the network's, and returns them with the options of
  `build` that they imply;
- `complete(state, initial)`: merges a checkpoint with a new network's initial weights, where the checkpoint may lack
  more than the last layer;
- `PRETRAINED`: the torchvision weights that the training of a teacher starts from;
- `IMAGENET`: the torchvision weights that `--init imagenet` starts a student from, by the network's name;
- `PUBLISHED`: the web address of trained weights, by dataset.

A module with a method `losses(images, labels) -> dict[str, Tensor]` is trained as a teacher with the sum of these
scalars instead of the cross-entropy of its logits. Labels are (n,) int64.

`torchvision:NAME` is any image classifier of torchvision, `timm:NAME` any of timm, and `hub:OWNER/REPO@COMMIT:NAME` an
entry point of torch.hub, whose code runs only after `trust_remote_code()`.
"""

import difflib
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tspipe.errors import NetworkError
from tspipe.models.networks import _hub, _timm
from tspipe.models.networks._hub import trust_remote_code as trust_remote_code
from tspipe.models.networks._hub import trusts_remote_code as trusts_remote_code
from tspipe.models.probe import probe_images, run_probe
from tspipe.utils import plugins

_TORCHVISION = "torchvision:"
_REPEATED = (
    "A mean and a std of three values repeat a grey channel (--set preprocess.mean=[0.5,0.5,0.5] --set "
    "preprocess.std=[0.5,0.5,0.5] in stage one). "
)
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}  # heads that only training uses


def names() -> list[str]:
    """Return the names of tspipe's networks, without those of torchvision and timm."""
    return plugins.names("models.networks")


def is_from_library(name: str) -> bool:
    """Return whether a name is `torchvision:NAME`, `timm:NAME` or `hub:OWNER/REPO@COMMIT:NAME`."""
    return name.startswith(plugins.LIBRARIES)


def is_user_network(name: str) -> bool:
    """Return whether a recorded name is that of a user's file, neither tspipe's nor a library's."""
    return not is_from_library(name) and name not in names()


def recorded_name(name: str) -> str:
    """Return the name that a cache or a checkpoint records: `mine` for a user's `./mine.py`, else the name itself."""
    return plugins.recorded_name("models.networks", name)


def file_stem(name: str) -> str:
    """Return a network's recorded name as it is written in the names of files: `timm-resnet18` for `timm:resnet18`."""
    return plugins.plain(recorded_name(name).replace(":", "-"))


def check_exists(name: str) -> None:
    """Raise NetworkError unless there is a network of this name, or a user's file that defines one."""
    _attribute(name, "build")


def build(name: str, num_classes: int, input_shape: tuple[int, int, int], options: Mapping[str, Any] = {}) -> nn.Module:
    """Return a network with random initial weights from torch's generator, checked once on two images.

    Args:
        name: one of `names()`, `torchvision:NAME`, `timm:NAME`, or the path of a Python file.
        num_classes: c; the module maps (n, C, H, W) float32 to logits (n, c).
        input_shape: (C, H, W). A `build` without such a parameter is called without it.
        options: the network's own options.

    Raises NetworkError for an unknown name or option, images that the network cannot take, and a `build` that does not
    return a classifier. On the meta device the module is not run.
    """
    recorded_name(name)  # refuses a file whose name is one of tspipe's networks
    if is_from_library(name) and not name.startswith(_hub.PREFIX) and input_shape[0] != 3:
        raise NetworkError(
            f"{name} takes images of 3 channels, these have {input_shape[0]}. {_REPEATED * (input_shape[0] == 1)}"
            f"tspipe's own networks take any number: {', '.join(names())}."
        )
    if name.startswith(_TORCHVISION):
        module = _build_torchvision(name, num_classes, input_shape, options)
    elif name.startswith(_timm.PREFIX):
        module = _timm.build(name, num_classes, input_shape, options)
    elif name.startswith(_hub.PREFIX):
        module = _hub.build(name, num_classes, options)
    else:
        function, fixed = _attribute(name, "build"), dict((_attribute(name, "VARIANTS") or {}).get(name, {}))
        parameters = inspect.signature(function).parameters
        if "input_shape" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            fixed["input_shape"] = input_shape
        given = functools.partial(function, num_classes, **fixed)
        module = plugins.construct(given, name, options, NetworkError, "[teacher.options] or [students.NAME.options]")
    if not isinstance(module, nn.Module):
        raise NetworkError(f"{name}: build returns a {type(module).__name__}, not an nn.Module.")
    if not torch.empty(0).is_meta:
        _check_output(module, name, num_classes, input_shape)
    return module


def adapt(name: str, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a checkpoint's tensors under the network's keys, and the build options that its keys imply."""
    function = _attribute(name, "adapt")
    unused = _AUXILIARY.get(name.removeprefix(_TORCHVISION), ())
    state = {key: value for key, value in state.items() if not key.startswith(unused)} if unused else state
    return function(state) if function else (state, {})


def published_options(name: str, sha256: str) -> dict[str, Any]:
    """Return the options that torchvision builds a network with for weights that it publishes, by their SHA-256.

    GoogLeNet's and Inception's come from TensorFlow: with them, the network normalises its input once more.
    """
    model = name.removeprefix(_TORCHVISION)
    if model == name or model not in _AUXILIARY:
        return {}
    from torchvision.models import get_model_weights

    digests = [entry.url.rpartition("-")[2].partition(".")[0] for entry in get_model_weights(model)]
    return {"transform_input": True} if sha256.startswith(tuple(digests)) else {}


def complete(name: str, state: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return a checkpoint's `state`, after `adapt`, completed by the initial state dict of the network to be trained.

    Returns None if the network does not define `complete`.
    """
    function = _attribute(name, "complete")
    return function(state, initial) if function else None


def pretrained(name: str) -> str | None:
    """Return the weights that training starts from, if the network names any.

    They are torchvision's, as `ResNet50_Weights.IMAGENET1K_V1`, or in a repository of the Hugging Face hub, as
    `timm/resnet18.a1_in1k`, or at a URL.
    """
    if name.startswith(_timm.PREFIX):
        return _timm.pretrained(name)
    weights: str | None = _attribute(name, "PRETRAINED")
    return weights


def imagenet(name: str) -> str | None:
    """Return the weights of this architecture that torchvision or timm publish, named as `pretrained` does, if any."""
    if name.startswith(_TORCHVISION):
        from torchvision.models import get_model_weights

        return str(get_model_weights(_torchvision_model(name)).DEFAULT)
    weights: str | None = pretrained(name) if is_from_library(name) else (_attribute(name, "IMAGENET") or {}).get(name)
    return weights


def preprocess(name: str) -> dict[str, Any]:
    """Return the fields of the preprocessing that a library states for a network's weights; empty if it states none."""
    return _timm.preprocess(name) if name.startswith(_timm.PREFIX) else {}


def library(name: str) -> str | None:
    """Return timm's version, as `timm 1.0.31`, for a network of timm's; None for others, or if it is not installed."""
    version = _timm.version() if name.startswith(_timm.PREFIX) else None
    return f"timm {version}" if version else None


def published(name: str, dataset: str) -> str | None:
    """Return where weights of this network, trained on this dataset, are published, if known."""
    return (_attribute(name, "PUBLISHED") or {}).get(dataset)


def _attribute(name: str, attribute: str) -> Any:
    """Return what a network's file defines under this name, or None."""
    if is_from_library(name):
        return None
    return getattr(plugins.load("models.networks", name, "build", NetworkError), attribute, None)


def _build_torchvision(
    name: str, num_classes: int, input_shape: tuple[int, int, int], options: Mapping[str, Any]
) -> Any:
    from torchvision import models

    model = _torchvision_model(name)
    defaults: dict[str, Any] = {"aux_logits": False, "init_weights": True} if model in _AUXILIARY else {}
    try:
        return models.get_model(model, weights=None, num_classes=num_classes, **{**defaults, **options})
    except Exception as error:  # the type for a wrong option differs from network to network
        if not options:
            raise
        raise NetworkError(plugins.refused_options(name, options, error)) from error


def _torchvision_model(name: str) -> str:
    """Return torchvision's name of an image classifier. Raises NetworkError if there is none."""
    from torchvision import models

    # Listed from this module only: torchvision's detection, segmentation, video and quantised networks are elsewhere.
    model, known = name.removeprefix(_TORCHVISION), models.list_models(module=models)
    if model not in known:
        near = difflib.get_close_matches(model, known, n=5, cutoff=0)
        sentence = plugins.unknown("torchvision network", model, near).removesuffix(".")
        raise NetworkError(f"{sentence}, and {len(known) - len(near)} more.")
    return model


def _check_output(module: nn.Module, name: str, num_classes: int, input_shape: tuple[int, int, int]) -> None:
    images = probe_images(input_shape)
    try:
        output = run_probe(module, name, images)
    except NetworkError as problem:
        if not name.startswith(_timm.PREFIX):
            raise
        raise NetworkError(f"{problem}. Resize them in stage one: {_timm.resize(name)}") from problem
    if not isinstance(output, Tensor):
        returned = f"a {type(output).__name__}"
    elif output.shape != (len(images), num_classes) or not output.is_floating_point():
        returned = f"{tuple(output.shape)} {str(output.dtype).removeprefix('torch.')}"
    elif not output.isfinite().all():
        returned = "numbers that are not finite"
    else:
        return
    raise NetworkError(
        f"{name} must return logits of shape (n, {num_classes}), floating-point and finite, for n images of "
        f"{input_shape}. For {len(images)} images it returns {returned}."
    )
