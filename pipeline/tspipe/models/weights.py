"""Files of weights: PyTorch checkpoints of any common form are read, safetensors are read and written.

No file can run code: safetensors holds only tensors, and a pickle is read with `weights_only=True`.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tspipe.errors import NetworkError
from tspipe.models import checkpoints
from tspipe.utils.files import write_whole
from tspipe.utils.memory import memory_limit
from tspipe.utils.reading import read_file

_METADATA, _CHECKSUM = "tspipe", "tensors_sha256"
_AMBIGUOUS = "Name the one to load: --set teacher.weights_key=NAME"
_OTHERWISE = "start from a file's (--weights FILE), or from random ones: --set teacher.pretrained=false"


class AbsentWeights(NetworkError):
    """Published weights that are not on this machine, or that nobody publishes."""


class Weights(NamedTuple):
    """The content of a file of weights."""

    tensors: dict[str, Tensor]  # by key, on the CPU
    metadata: dict[str, str]  # a safetensors file's; for one that `save` wrote, what `save` was given
    sha256: str  # of the file's bytes, hexadecimal
    source: str  # the file's path, for messages
    choice: str = ""  # which of several state dicts in the file these are, for messages


def read(path: Path, key: str | None = None, *, ambiguous: str = _AMBIGUOUS) -> Weights:
    """Read weights from a safetensors file or a PyTorch checkpoint, which may hold more than a state dict.

    A `.safetensors` file is never read as a pickle. Other names are read according to their content.

    Args:
        key: the dotted path of the state dict in a PyTorch checkpoint; see `checkpoints.choose` for None.
        ambiguous: what to do if there are several state dicts, for an error.

    Raises NetworkError for a file that is missing, damaged or without tensors, and for a pickle that needs more than
    weights.
    """
    try:
        if (size := path.stat().st_size) > (limit := memory_limit(torch.device("cpu"))):
            raise OSError(None, f"it has {size:,} bytes, more than the memory limit of {limit:,}")
        data = read_file(path)
    except FileNotFoundError:
        raise NetworkError(f"There is no file {path}. Give the path of the weights: --weights FILE") from None
    except OSError as error:
        raise NetworkError(f"{path} cannot be read: {error.strerror}.") from error
    metadata, lists = dict[str, str](), list[str]()
    if path.suffix == ".safetensors" or _is_safetensors(data):
        states = {"": parse(data, str(path))}
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = unpack_metadata(header.get("__metadata__"))
        expected = metadata.pop(_CHECKSUM, None)
        if expected is not None and expected != tensors_sha256(states[""]):
            raise NetworkError(f"{path} is damaged: its weights have changed since tspipe wrote them. Make it again.")
        if not states[""]:
            raise NetworkError(
                f"{path} has no tensors. Save the network's weights in it: torch.save(net.state_dict(), …)"
            )
    else:
        states, lists = checkpoints.read_state_dicts(data, str(path))
    chosen, tensors = checkpoints.choose(states, key, str(path), ambiguous)
    checkpoints.check_kinds(tensors, str(path))
    others = sorted(other or checkpoints.TOP for other in states if other != chosen)
    others += [f"{averaged} (a list: its tensors have no names)" for averaged in lists]
    choice = f"{chosen or checkpoints.TOP}, not {', '.join(others)}" if others else ""
    return Weights(tensors, metadata, hashlib.sha256(data).hexdigest(), str(path), choice)


def pretrained(name: str, network: str, *, download: bool, otherwise: str = _OTHERWISE) -> Weights:
    """Return weights that `networks.pretrained` names, from PyTorch's or the Hugging Face hub's download folder.

    The metadata of torchvision's have the preprocessing that torchvision states for them.

    Args:
        otherwise: what to do without them, for an error.

    Raises NetworkError if they are damaged or cannot be fetched, AbsentWeights if `download` is false and they are
    absent.
    """
    if "/" in name:
        return read(_from_hub(name, network, download, otherwise))
    from torchvision.models import get_weight

    entry = get_weight(name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    digest = path.stem.rpartition("-")[2]  # all of torchvision's URLs end in the first digits of the SHA-256
    if not path.exists():
        if not download:
            raise AbsentWeights(
                f"Training {network} starts from torchvision's {name}, and {path} does not exist. Fetch them "
                f"({entry.meta['_file_size']:.0f} MB): --download. Or {otherwise}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(entry.url, str(path), digest)
        except (OSError, RuntimeError, HTTPException) as error:
            raise NetworkError(f"{entry.url} cannot be fetched: {error}") from error
    weights = read(path)
    if not weights.sha256.startswith(digest):
        raise NetworkError(
            f"{path} is damaged: its SHA-256 does not begin with {digest}. Remove it and fetch it again: --download"
        )
    return weights._replace(metadata={"preprocess": json.dumps(stated_preprocess(name))})


def stated_preprocess(name: str | None) -> dict[str, Any]:
    """Return the fields of the preprocessing that torchvision states for its weights of this name; empty for others."""
    if name is None or "/" in name:
        return {}
    from torchvision.models import get_weight

    transforms = get_weight(name).transforms()
    return {
        "mean": transforms.mean,
        "std": transforms.std,
        "resize": transforms.resize_size * 2,  # a list of one number
        "crop": transforms.crop_size[0],
        "interpolation": transforms.interpolation.value,
    }


def _from_hub(name: str, network: str, download: bool, otherwise: str) -> Path:
    """Return the file of weights in a repository of the Hugging Face hub, as `timm/resnet18.a1_in1k`."""
    from huggingface_hub import hf_hub_download  # which timm requires

    if "://" in name:
        raise NetworkError(f"Training {network} starts from the weights at {name}. Fetch that file, then {otherwise}")
    try:
        return Path(hf_hub_download(name, "model.safetensors", local_files_only=not download))
    except Exception as error:  # of the hub's, of its HTTP client's and of the file system's types
        if download:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise NetworkError(f"{name} cannot be fetched from the Hugging Face hub: {reason}") from error
        raise AbsentWeights(
            f"Training {network} starts from {name} on the Hugging Face hub, which is not on this machine. Fetch it: "
            f"--download. Or {otherwise}"
        ) from None


def parse(data: bytes, source: str) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file. Raises NetworkError, which names `source`, if damaged."""
    if _is_safetensors(data) and int.from_bytes(data[:8], "little") > checkpoints.MAX_RECORD_BYTES:
        raise NetworkError(checkpoints.TOO_MANY.format(source))
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:  # RuntimeError: absurd shapes
        raise NetworkError(checkpoints.damaged(source)) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return a safetensors file's metadata, without reading its tensors. Raises NetworkError if it is damaged."""
    try:
        with path.open("rb") as header:
            length = int.from_bytes(header.read(8), "little")
        if checkpoints.MAX_RECORD_BYTES < length < path.stat().st_size:
            raise NetworkError(checkpoints.TOO_MANY.format(path))
        with safetensors.safe_open(path, "pt") as file:
            return unpack_metadata(file.metadata())
    except (OSError, SafetensorError) as error:
        raise NetworkError(checkpoints.damaged(str(path))) from error


def unpack_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return a safetensors file's metadata; if `save` wrote the file, what `save` was given."""
    metadata = dict(metadata or {})
    try:
        packed = json.loads(metadata.get(_METADATA, ""))
    except (ValueError, RecursionError):
        return metadata
    return packed if isinstance(packed, dict) and all(isinstance(v, str) for v in packed.values()) else metadata


def check_classes(weights: Weights, classes: Sequence[str], dataset: str) -> None:
    """Raise NetworkError if the weights' metadata record other classes than a dataset has, given by its name."""
    recorded = recorded_classes(weights)
    if recorded is not None and (difference := class_difference(recorded, classes)):
        command = shlex.join(["tspipe", "teacher", "--dataset", dataset, "--weights", weights.source])
        raise NetworkError(
            f"{weights.source} was trained for other classes: {difference} of {dataset}. Fine-tune it ({command}), or "
            "use it as it is: --set teacher.any_classes=true"
        )


def recorded_classes(weights: Weights) -> list[Any] | None:
    """Return the class names in the weights' metadata; None if there are none, or another program's in another form."""
    try:
        recorded = json.loads(weights.metadata.get("classes", ""))
    except (ValueError, RecursionError):
        return None
    return recorded if isinstance(recorded, list) else None


def class_difference(trained: Sequence[Any], classes: Sequence[str]) -> str:
    """Return in words how the classes of a teacher differ from a dataset's; an empty string if they do not."""
    if len(trained) != len(classes):
        return f"it has {len(trained):,} classes in place of the {len(classes):,}"
    pairs = enumerate(zip(trained, classes, strict=True))
    return next((f"class {i} is {one!r} in place of {two!r}" for i, (one, two) in pairs if one != two), "")


def canonical_bytes(module: nn.Module) -> bytes:
    """Return a module's state dict as safetensors without metadata: equal weights give equal bytes."""
    return _bytes(module.state_dict(), None)


def save(
    path: Path, weights: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, str], *, checksum: bool = True
) -> None:
    """Write weights as a safetensors file, atomically, with a checksum. Equal weights and metadata give equal bytes."""
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    fields = {**metadata, **({_CHECKSUM: tensors_sha256(tensors)} if checksum else {})}
    # safetensors writes several metadata keys in random order, so they are packed into one.
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _bytes(tensors, {_METADATA: text}))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def _bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    # Cloned, because safetensors refuses tensors that share memory, as tied layers do.
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    return safetensors.torch.save(copies, metadata)


def _is_safetensors(data: bytes) -> bool:
    """Return whether the bytes begin as the format does: the header's length (8 bytes), then a JSON object."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8
