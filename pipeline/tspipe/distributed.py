"""Where a process computes: its device and its place among others."""

import os

import torch

from tspipe.errors import RecipeError


def pick_device(wanted: str = "auto") -> torch.device:
    """The device to compute on; `auto` takes a GPU if there is one. Raises RecipeError if `wanted` is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name]))
    if not there.get(wanted, False):
        raise RecipeError(f"This machine has no device {wanted!r}; it has {', '.join(n for n in there if there[n])}.")
    return torch.device(wanted)


def cores() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
