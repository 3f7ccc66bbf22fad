"""Weights of a network: read from a file of any common form, matched with a network, written as safetensors.

No file can run code: safetensors holds nothing but tensors, and a pickle is read with `weights_only=True`.
"""

import hashlib
import io
import json
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tspipe.errors import NetworkError
from tspipe.models import networks
from tspipe.utils.files import write_whole

_NESTS = ("state_dict", "net_state_dict", "model", "model_state_dict")  # where training scripts put the weights
_METADATA = "tspipe"
_TRACKED = "num_batches_tracked"  # younger than many published checkpoints, and of no use in eval mode
_SIDES = (32, 28)  # image sizes to try, for networks whose shapes depend on it
Shapes = dict[str, tuple[int, ...]]


class Weights(NamedTuple):
    """What a file of weights holds.

    Attributes:
        tensors: by key, on the CPU, without the prefix that DataParallel adds.
        metadata: of a safetensors file; of one that `save` wrote, what it was given. Empty for other files.
        sha256: of the file's bytes, hex.
        source: the file's path, for messages.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str
    source: str


def read(path: Path) -> Weights:
    """Read weights from a safetensors file or from a PyTorch checkpoint, which may hold more than its state_dict.

    `.safetensors` is never read as a pickle; any other name is read as what its content is. Raises NetworkError for
    a file that is missing, damaged, a pickle that needs more than weights, or without tensors.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NetworkError(f"There is no file {path}. Give the path of the weights: --weights FILE") from None
    except OSError as problem:
        raise NetworkError(f"{path} cannot be read: {problem.strerror}.") from problem
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors" or _is_safetensors(data):
        tensors = parse(data, str(path))
        metadata = unpack_metadata(_header(data).get("__metadata__"))
    else:
        tensors = _state_dict(_load_pickle(data, path))
    tensors = _without_prefix(tensors, "module.")
    if not tensors:
        raise NetworkError(f"{path} has no tensors. Save the network's weights in it: torch.save(net.state_dict(), …)")
    return Weights(tensors, metadata, hashlib.sha256(data).hexdigest(), str(path))


def pretrained(name: str, network: str, *, download: bool) -> Weights:
    """torchvision's weights of a name like `ResNet50_Weights.IMAGENET1K_V1`, from PyTorch's folder of downloads.

    Raises NetworkError where they are not there and `download` is not set, cannot be fetched, or are damaged.
    """
    from torchvision.models import get_weight

    entry = get_weight(name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    digest = path.stem.rpartition("-")[2]  # the first digits of its SHA-256, as in all of torchvision's addresses
    if not path.exists():
        if not download:
            raise NetworkError(
                f"Training {network} begins with torchvision's {name}, and {path} does not exist. Fetch them "
                f"({entry.meta['_file_size']:.0f} MB): --download. Or begin with a file's (--weights FILE), or with "
                "random ones: --set teacher.pretrained=false"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(entry.url, str(path), digest)
        except (OSError, RuntimeError, HTTPException) as problem:
            raise NetworkError(f"{entry.url} could not be fetched: {problem}") from problem
    found = read(path)
    if not found.sha256.startswith(digest):
        raise NetworkError(
            f"{path} is damaged: its SHA-256 does not begin with {digest}. Remove it, and fetch it again: --download"
        )
    return found


def parse(data: bytes, source: str) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file; `source` is what to call it in the NetworkError for others."""
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as problem:  # the last: of absurd shapes
        raise NetworkError(_damaged(source)) from problem


def unpack_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """A safetensors file's metadata; where `save` wrote the file, what `save` was given."""
    metadata = dict(metadata or {})
    try:
        own = json.loads(metadata.get(_METADATA, ""))
    except ValueError:
        return metadata
    return own if isinstance(own, dict) and all(isinstance(value, str) for value in own.values()) else metadata


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], network: str, source: str) -> None:
    """Copy weights into a module, whose keys and shapes they must have; see `check_fit`."""
    check_fit(module, tensors, network, source)
    counters = {key: value for key, value in module.state_dict().items() if key.endswith(_TRACKED)}
    module.load_state_dict({**counters, **tensors})


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], network: str, source: str) -> None:
    """Check that weights have a module's keys and shapes; it may be on the meta device.

    Args:
        tensors: under the network's own keys (`networks.adapt`). Batch norm's `num_batches_tracked` may be missing.
        network: the module's name, and `source` that of the weights, for the message.

    Raises NetworkError: what does not fit, and which of tspipe's networks the weights belong to, if one fits exactly.
    """
    wanted, found = _shapes(module.state_dict()), _shapes(tensors)
    unexpected = [key for key in found if key not in wanted]
    missing = [key for key in wanted if key not in found and not key.endswith(_TRACKED)]
    reshaped = [key for key in wanted if key in found and found[key] != wanted[key]]
    if not (unexpected or missing or reshaped):
        _check_types(module, tensors, network, source)
        return
    if not (unexpected or missing) and (classes := _other_classes(reshaped, found, wanted)):
        raise NetworkError(
            f"{source} has {classes[0]} classes, the dataset has {classes[1]}. Give weights for these classes, or "
            f"fine-tune them first: tspipe teacher --dataset NAME --weights {source}"
        )
    if not unexpected and _completed(tensors, module, network):
        raise NetworkError(
            f"{source} holds a part of {network} only ({len(found)} of {len(wanted)} keys), enough to begin training "
            f"with: tspipe teacher --dataset NAME --weights {source}"
        )
    problems = [
        _counted(unexpected, "is not in the network", "are not in the network"),
        _counted(missing, "of the network is not in the weights", "of the network are not in the weights"),
        _counted(
            [f"{key} {found[key]}, not {wanted[key]}" for key in reshaped], "has another shape", "have another shape"
        ),
    ]
    remedy = _guess(tensors, network) or "Name the network that they belong to: --teacher NAME"
    raise NetworkError(f"{source} does not fit {network}: {', '.join(filter(None, problems))}. {remedy}")


def _check_types(module: nn.Module, tensors: Mapping[str, Tensor], network: str, source: str) -> None:
    """Floating-point numbers of another precision are rounded; whole or complex ones are no weights."""
    state = module.state_dict()
    floats = [key for key in tensors if state[key].is_floating_point()]
    if wrong := [f"{key} {tensors[key].dtype}" for key in floats if not tensors[key].is_floating_point()]:
        problem = _counted(wrong, "holds no floating-point numbers", "hold no floating-point numbers")
        raise NetworkError(f"{source} does not fit {network}: {problem}. Save them as float32.")


def canonical_bytes(module: nn.Module) -> bytes:
    """A module's state dict as safetensors without metadata: equal weights give equal bytes."""
    return _bytes(module.state_dict(), None)


def save(path: Path, weights: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as a safetensors file, whole or not at all; the same weights and metadata give the same bytes."""
    # safetensors writes several metadata keys in random order, so they go into one.
    text = json.dumps(dict(metadata), sort_keys=True, separators=(",", ":"))
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _bytes(tensors, {_METADATA: text}))


def _bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    # Cloned, because safetensors refuses tensors that share memory, as tied layers do.
    own = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    return safetensors.torch.save(own, metadata)


def _is_safetensors(data: bytes) -> bool:
    """Whether the bytes begin as the format does: the header's length (8 bytes), then a JSON object."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def _header(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def _load_pickle(data: bytes, path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old forms and pickle protocols; what matters is raised
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as problem:  # a damaged file can raise anything
        refused = isinstance(problem, pickle.UnpicklingError) and _is_pickle(data)
        if refused or "TorchScript" in str(problem):
            raise NetworkError(
                f"{path} is refused: it holds more than weights, and loading it could run code. If you trust it, load "
                "it elsewhere and save its state_dict: torch.save(net.state_dict(), …)"
            ) from problem
        raise NetworkError(_damaged(str(path))) from problem


def _is_pickle(data: bytes) -> bool:
    """Whether these are whole pickles, which are read here without being run."""
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        stream = io.BytesIO(data)
        # PyTorch's older form has five in a row, and then the tensors' bytes.
        for _ in range(5):
            for _ in pickletools.genops(stream):
                pass
            if stream.tell() == len(data):
                break
    except Exception:  # a damaged file can raise anything
        return False
    return True


def _damaged(source: str) -> str:
    return f"{source} is damaged, or no file of weights. Download it again and compare its checksum."


def _state_dict(content: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint, from the dict they lie in."""
    while isinstance(content, Mapping):
        nested = [content[nest] for nest in _NESTS if isinstance(content.get(nest), Mapping)]
        if not nested:
            return {k: v.detach() for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        content = nested[0]
    return {}


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if tensors and all(key.startswith(prefix) for key in tensors):
        return {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _shapes(tensors: Mapping[str, Any]) -> Shapes:
    return {key: tuple(value.shape) for key, value in tensors.items() if isinstance(value, Tensor)}


def _without_counters(shapes: Shapes) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.endswith(_TRACKED)}


def _other_classes(reshaped: list[str], found: Shapes, wanted: Shapes) -> tuple[int, int] | None:
    """The two numbers of classes, if the outputs of layers with that number are all that differs: the last ones."""
    if any(found[key][1:] != wanted[key][1:] or not found[key] for key in reshaped):
        return None
    pairs = {(found[key][0], wanted[key][0]) for key in reshaped}
    return pairs.pop() if len(pairs) == 1 else None


def _completed(tensors: Mapping[str, Tensor], module: nn.Module, network: str) -> bool:
    """Whether training could begin with these weights, which are no whole network."""
    own = module.state_dict()
    completed = networks.complete(network, tensors, own)
    return completed is not None and _without_counters(_shapes(completed)) == _without_counters(_shapes(own))


def _counted(keys: list[str], one: str, several: str) -> str:
    if not keys:
        return ""
    shown = ", ".join([*keys[:2], "…"] if len(keys) > 2 else keys)
    return f"{len(keys)} {f'key {one}' if len(keys) == 1 else f'keys {several}'} ({shown})"


def _guess(tensors: Mapping[str, Tensor], network: str) -> str:
    """A sentence on which of our networks the weights fit exactly, or nothing."""
    for name in networks.names():
        state, options = networks.adapt(name, dict(tensors))
        found = _without_counters(_shapes(state))
        channels = next((shape[1] for shape in found.values() if len(shape) == 4), 0)
        classes = next((shape[0] for shape in reversed(found.values()) if len(shape) == 2), 0)
        if not (0 < channels < 2**16 and 0 < classes < 2**24):
            return ""
        for side in _SIDES:
            wanted = _without_counters(_meta_shapes(name, classes, (channels, side, side), options))
            if wanted.keys() != found.keys():
                break
            if wanted == found:
                return _recommended(name, classes, (channels, side, side), options, network)
    return ""


def _meta_shapes(name: str, classes: int, input_shape: tuple[int, int, int], options: dict[str, Any]) -> Shapes:
    with torch.device("meta"):
        return _shapes(networks.build(name, classes, input_shape, options).state_dict())


def _recommended(
    name: str, classes: int, input_shape: tuple[int, int, int], options: dict[str, Any], network: str
) -> str:
    sentence = f"It seems to be {name} with {classes} classes"
    if name != network:
        return f"{sentence}: use --teacher {name}"
    if options:
        stating = " ".join(f"--set teacher.options.{option}={value}" for option, value in options.items())
        return f"{sentence}: use {stating}"
    return f"{sentence} for images of {'×'.join(map(str, input_shape))}."
