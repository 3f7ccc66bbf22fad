"""What training a teacher and training students have in common: optimiser, schedule, evaluation, checkpoint."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tspipe import weights
from tspipe.preprocess import Preprocess
from tspipe.randomness import stream
from tspipe.recipe import Optimisation


class Clock:
    """Says when the next checkpoint is due."""

    def __init__(self, every: float):
        self.every, self._last = every, time.monotonic()

    def due(self) -> bool:
        """Whether `every` seconds have passed since it last said so."""
        now = time.monotonic()
        if now - self._last < self.every:
            return False
        self._last = now
        return True


class Stopwatch:
    """Adds up the seconds between `start` and `stop`; on a GPU those of its own work, without waiting for it."""

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Back to zero."""
        self._sum = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin to count."""
        if self._gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop counting."""
        if self._gpu:
            self._events[-1][1].record()
        else:
            self._sum += time.perf_counter() - self._started

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Count what is inside."""
        self.start()
        yield
        self.stop()

    def seconds(self) -> float:
        """What has been counted; on a GPU this waits for it."""
        if self._gpu:
            torch.cuda.synchronize()
            return float(sum(start.elapsed_time(stop) for start, stop in self._events)) / 1000
        return self._sum


def make_optimizer(how: Optimisation, parameters: Iterable[Tensor], device: torch.device) -> torch.optim.Optimizer:
    """Adam or SGD as the recipe says; one fused kernel for all parameters where PyTorch has it."""
    fused = device.type in ("cpu", "cuda")
    if how.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=how.lr, weight_decay=how.weight_decay, fused=fused)
    return torch.optim.SGD(
        parameters, lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay, nesterov=False, fused=fused
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, how: Optimisation, epoch: int) -> None:
    """The learning rate of an epoch (from 0): lr · factor^⌊epoch / every⌋, or a factor for each milestone passed."""
    drops = sum(epoch >= milestone for milestone in how.lr_milestones)
    if not how.lr_milestones:
        drops = epoch // how.lr_drop_every
    for group in optimizer.param_groups:
        group["lr"] = how.lr * how.lr_drop_factor**drops


def order(seed: int, epoch: int, rows: int, batch_size: int) -> list[Tensor]:
    """An epoch's batches: every row once, shuffled, as indices (n,) int64; the last batch may be smaller.

    Where that would be one row alone, it is left out: batch norm cannot train on a single image.
    """
    batches = list(torch.from_numpy(stream(seed, "order", epoch).permutation(rows)).split(batch_size))
    return batches[:-1] if len(batches[-1]) == 1 else batches


def in_turn(rows: int, batch_size: int) -> list[Tensor]:
    """All rows in their own order, as batches of indices (n,) int64."""
    return list(torch.arange(rows).split(batch_size))


@torch.no_grad()
def count_correct(
    networks: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterable[Tensor],
    labels: Iterable[Tensor],
    preprocess: Preprocess,
    stopwatches: Sequence[Stopwatch] = (),
) -> list[int]:
    """How many images each network classifies rightly.

    Args:
        networks: each maps normalised images to logits, in the mode it is in.
        batches: (n, C, H, W) uint8.
        labels: (n,) int64 for each of them, on the networks' device.
        stopwatches: one a network, to time it with.
    """
    correct: list[Tensor | int] = [0] * len(networks)
    for pixels, right in zip(batches, labels, strict=True):
        images = preprocess.normalise(pixels)
        for i, network in enumerate(networks):
            with stopwatches[i].on() if stopwatches else contextlib.nullcontext():
                correct[i] += (network(images).argmax(1) == right).sum()
        del images  # so that the next ones take their memory
    return [int(count) for count in correct]


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
        return tensors, json.loads(weights.stated(file.metadata())["position"])


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with `prefix/` before each name."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `prefixed`: those with this prefix, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
