"""PyTorch's checkpoints: pickles that are read within bounds and without running code, and the state dicts in them."""

import argparse
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tspipe.errors import NetworkError

MAX_RECORD_BYTES = 2**21  # of all names and shapes; those of a thousand tensors take 0.1 MB
_MAX_TENSORS = 10_000  # with those of an optimizer and of averaged weights
_MAX_READS = 500_000  # of the opcodes in a file of the older format; a thousand tensors take 0.05 million
_MAX_EXPANSION = 10  # PyTorch does not compress
_ZIP = b"PK\3\4"  # how PyTorch, too, tells archives from the older format
_REMEDY = "save its state_dict: torch.save(net.state_dict(), …)"
TOO_MANY = f"{{}} holds too many objects for a file of weights. Load it elsewhere and {_REMEDY}"
TOP = "its own tensors"  # the name of the checkpoint itself among the state dicts in it
_NAMES = {"model", "model_state_dict", "module", "net", "net_state_dict", "network", "params", "state_dict", "weights"}
_EMA = re.compile(r"(^|[._])((model|net)?(ema|swa)(model|net)?|(averaged?|avg)_?(model|net))([._]|$)", re.IGNORECASE)
_UNNAMED = re.compile(rf"{_EMA.pattern}|(^|[._])shadow([._]|$)", re.IGNORECASE)
_OPTIMIZER = re.compile(r"(^|_)(optim|optimizers?|schedulers?|scaler)(_|$)")


class AmbiguousWeights(NetworkError):
    """A sound file that holds several sets of weights, none of which is preferred."""


def damaged(source: str) -> str:
    """Return the message for a file whose bytes are not weights."""
    return f"{source} is damaged, or not a file of weights. Download it again and compare its checksum."


def read_state_dicts(data: bytes, source: str) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return the state dicts in the bytes of a PyTorch checkpoint by their dotted path, "" for the checkpoint itself.

    Those of optimizers are left out. Return also the paths of averaged weights (EMA) in lists: they have no names, so
    they cannot be loaded. Raises NetworkError, which names `source`, if there is none, for a damaged file,
    for one that holds more than weights, and for one that would take much memory or time.
    """
    content = _load(data, source)
    states, lists = dict[str, dict[str, Tensor]](), list[str]()
    pending, visited = [("", content)], set[int]()
    while pending:
        path, value = pending.pop()
        if isinstance(value, list | tuple) and _UNNAMED.search(path) and any(isinstance(v, Tensor) for v in value):
            lists.append(path)
        if not isinstance(value, Mapping) or id(value) in visited:
            continue
        visited.add(id(value))
        named = {key: item for key, item in value.items() if isinstance(key, str)}
        # The counter of torch.optim.swa_utils.AveragedModel is no weight.
        tensors = {k: v.detach() for k, v in named.items() if isinstance(v, Tensor) and k != "n_averaged"}
        if tensors:
            states[path] = tensors
        pending += [(f"{path}.{k}" if path else k, v) for k, v in named.items() if not _OPTIMIZER.search(k)]
    if not states:
        kinds = content.items() if isinstance(content, Mapping) else [("a value", content)]
        listed = [f"{key} ({type(value).__name__})" for key, value in kinds]
        listed = [*listed[:5], "…"] if len(listed) > 5 else listed
        raise NetworkError(
            f"{source} has no tensors in a dict by name; it holds {', '.join(listed) or 'nothing'}. Load it elsewhere "
            f"and {_REMEDY}"
        )
    vectors = {path: state for path, state in states.items() if any(tensor.ndim for tensor in state.values())}
    return vectors or states, lists


def choose(
    states: Mapping[str, dict[str, Tensor]], key: str | None, source: str, ambiguous: str
) -> tuple[str, dict[str, Tensor]]:
    """Return the path of the state dict to load, and the state dict.

    Without a `key`, averaged weights (EMA) are preferred, then a common name. A `key` is a path, or a path and a prefix
    of the keys there; its beginning may be left out if the rest is unique. Raises AmbiguousWeights, which lists
    the paths and ends with `ambiguous`, if the choice is not unique, or there is no such key.
    """
    if key is not None and key in states:
        return key, states[key]
    if key is not None:
        flat = {f"{path}.{name}".lstrip("."): value for path, state in states.items() for name, value in state.items()}
        prefixes = {f".{name}".partition(f".{key}.")[0] for name in flat if f".{key}." in f".{name}"}
        if len(prefixes) == 1 or "" in prefixes:
            prefix = key if "" in prefixes else f"{prefixes.pop()[1:]}.{key}"
            return prefix, {n.removeprefix(f"{prefix}."): flat[n] for n in flat if n.startswith(f"{prefix}.")}
    else:
        for is_preferred in (_EMA.search, lambda path: path.rpartition(".")[2] in _NAMES, lambda path: not path, bool):
            preferred = [path for path in states if is_preferred(path)]
            if len(preferred) == 1:
                return preferred[0], states[preferred[0]]
            if preferred:
                break
    listed = ", ".join(sorted(path or TOP for path in states)[:10])
    problem = "several sets of weights" if key is None else f"no weights {key!r}, only"
    raise AmbiguousWeights(f"{source} holds {problem}: {listed}. {ambiguous}")


def check_kinds(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise NetworkError for tensors whose numbers cannot be copied into a network."""
    for key, tensor in tensors.items():
        kinds = {"meta": tensor.is_meta, "quantised": tensor.is_quantized, "nested": tensor.is_nested}
        kinds["sparse"] = tensor.layout != torch.strided
        if kind := next((kind for kind, applies in kinds.items() if applies), None):
            reason = "has no numbers" if kind == "meta" else "cannot be loaded as weights"
            raise NetworkError(f"{source}: {key} is a {kind} tensor, which {reason}. Save dense float32 tensors.")


class _Limited(io.BytesIO):
    """A file that is read in a limited number of calls, because a pickle takes one for each of its opcodes."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise OverflowError
        return super().read(size)


def _load(data: bytes, source: str) -> Any:
    if data.startswith(_ZIP):
        _check_archive(data, source)
    try:
        # timm's checkpoints hold the arguments of their training as a Namespace, which is only a record.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about old formats and pickle protocols; errors are raised
            return torch.load(_Limited(data), map_location="cpu", weights_only=True)
    except OverflowError:
        raise NetworkError(TOO_MANY.format(source)) from None
    except Exception as error:  # a damaged file can raise anything
        names = _names_in(data) if isinstance(error, pickle.UnpicklingError) else []
        names = ["TorchScript code"] if "TorchScript" in str(error) else names
        if not names:
            raise NetworkError(damaged(source)) from error
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise NetworkError(
            f"{source} is refused: beside tensors, it holds {refused[1] if refused else names[-1]}, and loading that "
            f"could run code. If you trust it, load it elsewhere and {_REMEDY}"
        ) from error


def _names_in(data: bytes) -> list[str]:
    """Return the names of classes and functions in complete pickles, which are parsed, not run; none in other bytes."""
    names, texts = [], list[str]()
    try:
        if data.startswith(_ZIP):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        stream = io.BytesIO(data)
        for _ in range(5):  # PyTorch's older format has five in a row, followed by the tensors' bytes
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name == "STACK_GLOBAL":
                    names.append(".".join(texts[-2:]))
                elif operation.name == "GLOBAL":
                    names.append(str(argument).replace(" ", "."))
                elif isinstance(argument, str):
                    texts.append(argument)
            if stream.tell() == len(data):
                break
    except Exception:  # a damaged file can raise anything
        return []
    return names


def _check_archive(data: bytes, source: str) -> None:
    """Raise NetworkError if unpacking an archive takes much memory or time, or if its checksums are wrong."""
    end = data.rfind(b"PK\5\6")  # the record that states the number of entries; 65,535 means that or more
    if int.from_bytes(data[end + 10 : end + 12], "little") > _MAX_TENSORS:
        raise NetworkError(TOO_MANY.format(source))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            total = sum(entry.file_size for entry in entries)
            bounded = total <= _MAX_EXPANSION * len(data)
            has_checksums = any(entry.CRC for entry in entries)  # see torch.serialization.set_crc32_options
            intact = not (bounded and has_checksums and archive.testzip())
    except Exception as error:  # a damaged archive can raise anything
        raise NetworkError(damaged(source)) from error
    if any(entry.filename.endswith(".pkl") and entry.file_size > MAX_RECORD_BYTES for entry in entries):
        raise NetworkError(TOO_MANY.format(source))
    if not bounded:
        raise NetworkError(
            f"{source} is refused: its {len(data):,} bytes unpack to {total:,}. Files of weights are not compressed so."
        )
    if not intact:
        raise NetworkError(damaged(source))
