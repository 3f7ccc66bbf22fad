"""The choice of a device, and copies of tensors to it."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tspipe.errors import RecipeError
from tspipe.utils.threads import available_cores


def batches_to_device(batches: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Return batches of indices (n,) on a device, copied in one piece: a copy per batch would wait for the GPU."""
    if not batches or batches[0].device == device:
        return batches
    copied: tuple[Tensor, ...] = torch.cat(list(batches)).to(device).split([len(rows) for rows in batches])
    return copied


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a CPU tensor on a device; the copy to a GPU is asynchronous."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def separate_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a context whose GPU work waits only for itself, for a thread that reads tensors which do not change."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def pick_device(name: str = "auto") -> torch.device:
    """Return the device to compute on; `auto` selects a GPU if one is available, one for each process of torchrun.

    Such a GPU also becomes PyTorch's current device. PyTorch's threads are limited to the processors available, since
    by default it ignores the CPU quota of a container. Raises RecipeError if the device is not available.
    """
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available.get(name, False):
        raise RecipeError(
            f"This machine has no device {name!r}; it has {', '.join(d for d in available if available[d])}."
        )
    if name != "cuda" or "LOCAL_RANK" not in os.environ:
        return torch.device(name)
    local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= count:
        raise RecipeError(f"This machine has {count} GPUs, one a process: start torchrun with --nproc-per-node {count}")
    torch.cuda.set_device(local_rank)  # else every process would use events and pinned memory of the first GPU
    return torch.device(name, local_rank)


def use_full_precision() -> None:
    """Turn off TF32, and cuDNN's choice of kernels by their speed, which varies between runs."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
