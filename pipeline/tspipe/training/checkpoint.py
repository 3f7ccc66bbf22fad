"""Checkpoints: state as one flat dict of tensors, in one safetensors file that says whose it is and has a checksum."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import Tensor, nn

from tspipe.errors import TrainingError
from tspipe.models import weights
from tspipe.training.run_folder import FileFacts
from tspipe.utils.files import writing
from tspipe.utils.progress import warn
from tspipe.utils.reading import read_file
from tspipe.utils.timing import Clock


class Position(NamedTuple):
    """The next batch to train on, as seed, epoch and batch, each from 0."""

    seed: int = 0
    epoch: int = 0
    batch: int = 0


class Checkpoint(NamedTuple):
    """A checkpoint: state, the next batch, the run's identity, and the students and metrics written by then."""

    tensors: dict[str, Tensor]
    position: Position
    identity: str
    files: dict[str, FileFacts]


class Checkpointer:
    """Saves a run's state in a file, at intervals of `seconds`, and keeps the checkpoint before it.

    Args:
        identity: what determines the results; a checkpoint of another identity is not used. None accepts any.

    Attributes:
        files: the students that are finished, and metrics.csv as of the last epoch; every checkpoint states them.
    """

    def __init__(self, path: Path, seconds: float, identity: str | None):
        self.path, self.previous = path, path.with_name(f"{path.stem}.previous{path.suffix}")
        self.clock, self.identity, self.files = Clock(seconds), identity, dict[str, FileFacts]()

    def save(self, tensors: Mapping[str, Tensor], position: Position) -> None:
        """Write a checkpoint atomically; the last one becomes the previous one."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {
            "identity": self.identity or "",
            "position": json.dumps(position._asdict()),
            "files": json.dumps(self.files),
        }
        if self.path.exists():
            with writing(self.previous):
                self.path.replace(self.previous)
        weights.save(self.path, tensors, {**metadata, "sha256": _checksum(tensors, metadata)}, checksum=False)

    def load(self, *, visible: bool = True, refuse_foreign: bool = False) -> Checkpoint | None:
        """Return the last checkpoint that can be used, or None if there is none.

        Args:
            visible: print why a checkpoint cannot be used.
            refuse_foreign: raise TrainingError for a checkpoint of another identity.

        Raises TrainingError for a folder of the checkpoint's name.
        """
        for path in (self.path, self.previous):
            if not os.path.lexists(path):
                continue
            if path.is_dir():
                raise TrainingError(f"{path} is a folder, and checkpoints are written there. Remove it.")
            try:
                checkpoint = read_checkpoint(path)
            except TrainingError as problem:
                reason = str(problem)
            else:
                if self.identity in (None, checkpoint.identity):
                    self.files = checkpoint.files
                    return checkpoint
                reason = f"{path} is a checkpoint of other settings or data."
                if refuse_foreign:
                    raise TrainingError(f"{reason} Use those to resume it, or delete it to start again.")
            if visible:
                warn(f"{reason} Training continues from before it.")
        return None

    def delete(self) -> None:
        """Delete the checkpoints."""
        self.path.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises TrainingError if it is damaged or not finite."""
    try:
        data = read_file(path)
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = weights.unpack_metadata(header.get("__metadata__"))
        position = TypeAdapter(Position).validate_json(metadata["position"])
        files = TypeAdapter(dict[str, FileFacts]).validate_json(metadata["files"])
        checksum = metadata.pop("sha256")
    except OSError as problem:
        raise TrainingError(f"The checkpoint {path} cannot be read: {problem.strerror}.") from problem
    except (SafetensorError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as problem:
        raise TrainingError(f"The checkpoint {path} is damaged.") from problem
    if _checksum(tensors, metadata) != checksum:
        raise TrainingError(f"The checkpoint {path} is damaged: its checksum is wrong.")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise TrainingError(f"The checkpoint {path} has weights that are not finite.")
    return Checkpoint(tensors, position, metadata["identity"], files)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of a checkpoint's content."""
    content = [dict(metadata), weights.tensors_sha256(tensors)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def training_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of a module and its optimiser as one flat dict of tensors."""
    tensors = prefixed("module/", module.state_dict())
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors


def load_training_state(tensors: Mapping[str, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `training_state` returned for a module and an optimiser like these. Raises TrainingError for others."""
    try:
        module.load_state_dict(without_prefix("module/", tensors))
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, value in without_prefix("optimizer/", tensors).items():
            index, _, field = name.partition("/")
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:  # in the parameter's memory layout, which fused kernels rely on
                value = torch.empty_like(parameter).copy_(value)
            state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (IndexError, KeyError, RuntimeError, ValueError) as problem:
        raise TrainingError(
            "The checkpoint does not fit the network: other code wrote it. Delete it to train again from before it."
        ) from problem


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a prefix before each name."""
    return {prefix + name: value for name, value in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
