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


def pack(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A module's and its optimiser's state as one flat dict of tensors."""
    tensors = {f"module/{name}": value for name, value in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer/{i}/{name}": v for name, v in state.items() if isinstance(v, Tensor)})
    return tensors


def unpack(tensors: Mapping[str, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The inverse of `pack`, into a module and an optimiser built alike."""
    module.load_state_dict(below("module", tensors))
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in below("optimizer", tensors).items():
        index, _, field = name.partition("/")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:  # in the parameter's layout, which fused kernels take for granted
            value = torch.empty_like(parameter).copy_(value)
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(path: Path, tensors: dict[str, Tensor], position: dict[str, Any]) -> None:
    """Replace the checkpoint by this one, all at once."""
    weights.save(path, tensors, {"position": json.dumps(position)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The checkpoint's tensors and position, or None where there is none yet."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        return tensors, json.loads(weights.unpack_metadata(file.metadata())["position"])


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with `prefix/` before each name."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `prefixed`: those with this prefix, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


@dataclass
class Position:
    """How far a run is: the next batch of an epoch of a seed, all from 0."""

    seed: int = 0
    epoch: int = 0
    batch: int = 0
