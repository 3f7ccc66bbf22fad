"""Checkpoints: state as one flat dict of tensors, in one safetensors file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tspipe.models import weights
from tspipe.utils.timing import Clock


@dataclass(frozen=True)
class Position:
    """The next batch to train on, as seed, epoch and batch, each from 0."""

    seed: int = 0
    epoch: int = 0
    batch: int = 0


class Checkpointer:
    """Saves a run's state in a file, at intervals of `seconds`."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.clock = path, Clock(seconds)

    def save(self, tensors: Mapping[str, Tensor], position: dict[str, Any]) -> None:
        """Replace the checkpoint atomically."""
        weights.save(self.path, tensors, {"position": json.dumps(position)})

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the checkpoint's tensors and position, or None if there is none."""
        if not self.path.exists():
            return None
        with safe_open(self.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, json.loads(weights.unpack_metadata(file.metadata())["position"])

    def delete(self) -> None:
        """Delete the checkpoint, if there is one."""
        self.path.unlink(missing_ok=True)


def training_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of a module and its optimiser as one flat dict of tensors."""
    tensors = prefixed("module/", module.state_dict())
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= prefixed(
            f"optimizer/{i}/", {name: value for name, value in state.items() if isinstance(value, Tensor)}
        )
    return tensors


def load_training_state(tensors: Mapping[str, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `training_state` returned into a module and an optimiser that were built alike."""
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


def network_state(learner: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a learner's student network, from the state of a cohort."""
    return without_prefix(f"{learner}/module/network.", tensors)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a prefix before each name."""
    return {prefix + name: value for name, value in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
