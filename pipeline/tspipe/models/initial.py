"""The weights that a student starts from: those published for ImageNet, or those of a file or a URL."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from tspipe.cache.address import is_url, without_secrets
from tspipe.data.preprocess import Preprocess
from tspipe.errors import NetworkError
from tspipe.models import networks, weights
from tspipe.models.checkpoints import AmbiguousWeights
from tspipe.models.loading import NetworkSpec, adapt, load_into, misfit
from tspipe.models.weights import AbsentWeights, Weights

RANDOM, IMAGENET, AUTO = "random", "imagenet", "auto"
_BACKBONE = "backbone.0."  # the network within a student of tspipe's, see feature_net.student_of
_TOLERANCE = 0.005  # of a mean or a deviation: 0.229 is often rounded to 0.23


class InitialWeights(NamedTuple):
    """Weights that a student starts from.

    Attributes:
        tensors: by the network's keys. Those of the layers that g(x) and the classifier replace are not used.
        options: the network's, with those that the weights imply.
        name: torchvision's or timm's name of the weights, or the file's; for messages and tables.
        sha256: of the file, hexadecimal.
        preprocess: the preprocessing that they were trained with, if it is known.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    name: str
    sha256: str
    preprocess: Preprocess | None


def find(init: str, spec: NetworkSpec, *, download: bool) -> InitialWeights | None:
    """Return the weights that a student of this network starts from; None for random ones.

    Args:
        init: `random`; `imagenet`, the weights that torchvision or timm publish for the architecture; `auto`, the same
            if they are on this machine or may be downloaded, else random; or the path or the URL of a file.
        download: whether absent weights are fetched.

    Raises NetworkError if there are none, or they are absent or damaged.
    """
    if init == RANDOM:
        return None
    try:
        read = _imagenet(spec.name, download) if init in (IMAGENET, AUTO) else _from_file(init, download)
    except AbsentWeights:
        if init == AUTO:
            return None
        raise
    tensors, recorded = read.tensors, read.metadata
    if {"network", "width"} <= recorded.keys():  # a student of tspipe's
        tensors = {key.removeprefix(_BACKBONE): value for key, value in tensors.items() if key.startswith(_BACKBONE)}
    if broken := next((key for key, value in tensors.items() if not value.isfinite().all()), None):
        raise NetworkError(f"{read.source}: {broken} has numbers that are not finite. Start from other weights.")
    tensors, options = adapt(spec, tensors, read.sha256)
    return InitialWeights(tensors, options, Path(read.source).name, read.sha256, _preprocess(recorded))


def load_backbone(backbone: nn.Module, keys: set[str], initial: InitialWeights, name: str) -> None:
    """Copy weights into a network whose last layers have been replaced.

    Args:
        keys: those of the network's state dict with its last layers.
        name: the network's name in an error.

    Raises NetworkError if the weights do not fit, or are of another architecture.
    """
    replaced = keys - backbone.state_dict().keys()
    tensors = {key: value for key, value in initial.tensors.items() if key not in replaced}
    if problem := misfit(backbone, tensors):
        raise NetworkError(
            f"{name} cannot start from {initial.name}: {problem}. Name weights of the same architecture, or start from "
            "random ones: --init random"
        )
    load_into(backbone, tensors, name, initial.name)


def preprocess_difference(initial: InitialWeights, preprocess: Preprocess, side: int) -> str:
    """Return in words how the preprocessing of the weights differs from a cache's; empty if it does not.

    Args:
        preprocess: the cache's.
        side: the height in pixels of the cache's images.
    """
    if (stated := initial.preprocess) is None:
        return ""
    parts = []
    for field, expected, actual in (("mean", stated.mean, preprocess.mean), ("std", stated.std, preprocess.std)):
        if len(expected) != len(actual) or max(abs(a - b) for a, b in zip(expected, actual, strict=True)) > _TOLERANCE:
            parts.append(f"{field} {_numbers(expected)}, the cache's is {_numbers(actual)}")
    height = stated.crop or (stated.resize or [side])[0]
    if height != side:
        parts.append(f"images of {height} pixels a side, the cache's have {side}")
    return "; ".join(parts)


def _imagenet(network: str, download: bool) -> Weights:
    name = networks.imagenet(network)
    if name is None:
        raise AbsentWeights(
            f"No ImageNet weights are published for {network}. Start from a file's or a URL's (--init FILE), or from "
            "random ones: --init random"
        )
    if is_url(name):
        return _from_file(name, download)
    otherwise = "start from a file's (--init FILE), or from random ones: --init random"
    read = weights.pretrained(name, network, download=download, otherwise=otherwise)
    stated = networks.preprocess(network) or json.loads(read.metadata.get("preprocess", "{}"))
    return read._replace(source=name, metadata={"preprocess": json.dumps(stated)})


def _from_file(init: str, download: bool) -> Weights:
    path = _from_url(init, download) if is_url(init) else Path(init)
    if not path.is_file():
        raise NetworkError(f"There is no file {init} to start from. Name one, a URL, {IMAGENET}, {AUTO} or {RANDOM}.")
    try:
        read = weights.read(path, ambiguous="Save those to start from in a file of their own: torch.save(…)")
    except NetworkError as error:
        if is_url(init) and not isinstance(error, AmbiguousWeights):
            path.unlink()  # so that the next --download fetches it again
        raise
    return read._replace(source=without_secrets(init))


def _from_url(url: str, download: bool) -> Path:
    """Return the local copy of a file of weights, in PyTorch's download folder."""
    address = without_secrets(url)
    if not url.startswith(("https://", "http://")):
        raise NetworkError(f"{address} is not an address of a web server. Download the file, and give its path.")
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{address.rpartition('/')[2]}"  # many are model.safetensors
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        if not download:
            raise AbsentWeights(f"{address} is not on this machine. Fetch it: --download")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, RuntimeError, ValueError, HTTPException) as error:
            raise NetworkError(f"{address} cannot be fetched: {error}") from error
    return path


def _preprocess(metadata: Mapping[str, str]) -> Preprocess | None:
    """Return the preprocessing in the metadata of weights; None if there is none, or it is another program's."""
    try:
        return TypeAdapter(Preprocess).validate_json(metadata.get("preprocess", ""))
    except ValidationError:
        return None


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
