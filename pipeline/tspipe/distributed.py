"""Where a process computes: its device and its place among others."""

import ctypes
import os

import torch

from tspipe.errors import RecipeError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def pick_device(wanted: str = "auto") -> torch.device:
    """The device to compute on; `auto` takes a GPU if there is one. Raises RecipeError if `wanted` is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there.get(wanted, False):
        raise RecipeError(f"This machine has no device {wanted!r}; it has {', '.join(n for n in there if there[n])}.")
    if wanted == "cpu":
        _keep_freed_memory()
    return torch.device(wanted)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next batch, up to 2 GiB a piece.

    It would map each large tensor anew and unmap it again, so that batches of large images spend more time in page
    faults than in arithmetic: docs/cub200.md. Other C libraries have no such call.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        mallopt(option, 2**31 - 1)


def cores() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
