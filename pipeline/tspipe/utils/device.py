"""Devices: which one to use, and how tensors get there."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from tspipe.errors import RecipeError


def batches_to_device(batches: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Batches of indices (n,) on a device, copied there at once: a copy for each batch would wait for the GPU."""
    if not batches or batches[0].device == device:
        return batches
    there: tuple[Tensor, ...] = torch.cat(list(batches)).to(device).split([len(rows) for rows in batches])
    return there


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; on the way to a GPU nothing waits for what it still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pick_device(wanted: str = "auto") -> torch.device:
    """The device to compute on; `auto` takes a GPU if there is one, each of torchrun's processes its own.

    That one becomes PyTorch's current one, too. Raises RecipeError if `wanted` is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there.get(wanted, False):
        raise RecipeError(f"This machine has no device {wanted!r}; it has {', '.join(n for n in there if there[n])}.")
    if wanted != "cuda" or "LOCAL_RANK" not in os.environ:
        return torch.device(wanted)
    mine, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if mine >= count:
        raise RecipeError(f"This machine has {count} GPUs, one a process: start torchrun with --nproc-per-node {count}")
    torch.cuda.set_device(mine)  # else events and pinned memory would be of the first one, in every process
    return torch.device(wanted, mine)


def use_full_precision() -> None:
    """Have cuDNN and cuBLAS compute what the inputs say: no TF32, no kernel that won a race."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
