"""Files of weights: PyTorch checkpoints of any common form are read, safetensors are read and written.

No file can run code: safetensors holds only tensors, and a pickle is read with `weights_only=True`.
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
from tspipe.utils.files import write_whole

_STATE_KEYS = ("state_dict", "net_state_dict", "model", "model_state_dict")  # where training scripts put the weights
_METADATA = "tspipe"


class Weights(NamedTuple):
    """The content of a file of weights.

    Attributes:
        tensors: by key, on the CPU, without DataParallel's prefix.
        metadata: a safetensors file's; for one that `save` wrote, what `save` was given. Empty for other files.
        sha256: of the file's bytes, hexadecimal.
        source: the file's path, for messages.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str
    source: str


def read(path: Path) -> Weights:
    """Read weights from a safetensors file or a PyTorch checkpoint, which may hold more than a state dict.

    A `.safetensors` file is never read as a pickle. Other names are read according to their content. Raises
    NetworkError for a file that is missing, damaged or without tensors, and for a pickle that needs more than weights.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NetworkError(f"There is no file {path}. Give the path of the weights: --weights FILE") from None
    except OSError as error:
        raise NetworkError(f"{path} cannot be read: {error.strerror}.") from error
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
    """Return torchvision's weights of a name like `ResNet50_Weights.IMAGENET1K_V1`, from PyTorch's download folder.

    Raises NetworkError if they are damaged, cannot be fetched, or are absent and `download` is false.
    """
    from torchvision.models import get_weight

    entry = get_weight(name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    digest = path.stem.rpartition("-")[2]  # all of torchvision's URLs end in the first digits of the SHA-256
    if not path.exists():
        if not download:
            raise NetworkError(
                f"Training {network} starts from torchvision's {name}, and {path} does not exist. Fetch them "
                f"({entry.meta['_file_size']:.0f} MB): --download. Or start from a file's (--weights FILE), or from "
                "random ones: --set teacher.pretrained=false"
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
    return weights


def parse(data: bytes, source: str) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file. Raises NetworkError, which names `source`, if damaged."""
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:  # RuntimeError: absurd shapes
        raise NetworkError(_damaged(source)) from error


def unpack_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return a safetensors file's metadata; if `save` wrote the file, what `save` was given."""
    metadata = dict(metadata or {})
    try:
        packed = json.loads(metadata.get(_METADATA, ""))
    except ValueError:
        return metadata
    return packed if isinstance(packed, dict) and all(isinstance(v, str) for v in packed.values()) else metadata


def canonical_bytes(module: nn.Module) -> bytes:
    """Return a module's state dict as safetensors without metadata: equal weights give equal bytes."""
    return _bytes(module.state_dict(), None)


def save(path: Path, weights: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as a safetensors file, atomically. Equal weights and metadata give equal bytes."""
    # safetensors writes several metadata keys in random order, so they are packed into one.
    text = json.dumps(dict(metadata), sort_keys=True, separators=(",", ":"))
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _bytes(tensors, {_METADATA: text}))


def _bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    # Cloned, because safetensors refuses tensors that share memory, as tied layers do.
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    return safetensors.torch.save(copies, metadata)


def _is_safetensors(data: bytes) -> bool:
    """Return whether the bytes begin as the format does: the header's length (8 bytes), then a JSON object."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def _header(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def _load_pickle(data: bytes, path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats and pickle protocols; errors are raised
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        refused = isinstance(error, pickle.UnpicklingError) and _is_pickle(data)
        if refused or "TorchScript" in str(error):
            raise NetworkError(
                f"{path} is refused: it holds more than weights, and loading it could run code. If you trust it, load "
                "it elsewhere and save its state_dict: torch.save(net.state_dict(), …)"
            ) from error
        raise NetworkError(_damaged(str(path))) from error


def _is_pickle(data: bytes) -> bool:
    """Return whether the bytes are complete pickles. They are parsed, not run."""
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        stream = io.BytesIO(data)
        # PyTorch's older format has five in a row, followed by the tensors' bytes.
        for _ in range(5):
            for _ in pickletools.genops(stream):
                pass
            if stream.tell() == len(data):
                break
    except Exception:  # a damaged file can raise anything
        return False
    return True


def _damaged(source: str) -> str:
    return f"{source} is damaged, or not a file of weights. Download it again and compare its checksum."


def _state_dict(content: object) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, from the innermost dict that holds the state."""
    while isinstance(content, Mapping):
        nested = [content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)]
        if not nested:
            return {k: v.detach() for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        content = nested[0]
    return {}


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if tensors and all(key.startswith(prefix) for key in tensors):
        return {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors
