"""Where a process computes: its device and its place among others. The only file that imports torch.distributed."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tspipe.errors import OtherProcessFailed, RecipeError

T = TypeVar("T")
_PLACE = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # in the environment of torchrun's processes
_PATIENCE = timedelta(days=7)  # one rank may work for long while the others wait; one that has died is noticed at once


@dataclass(frozen=True)
class Group:
    """The processes of a job that torchrun started, or this one alone.

    All of them make the same calls in the same order; each call waits for the others. Values are pickled, so they
    are small Python objects. Raises OtherProcessFailed when another process has ended instead of making the call.
    """

    rank: int = 0
    size: int = 1

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank; what the others give is not looked at."""
        values: list[Any] = [value]
        self._together(lambda dist: dist.broadcast_object_list(values))
        found: T = values[0]
        return found

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        values: list[Any] = [value] * self.size
        self._together(lambda dist: dist.all_gather_object(values, value))
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def shard(self, rows: Tensor) -> Tensor:
        """This rank's part of a batch (n, …): of sizes that differ by at most one; empty where n is below the rank."""
        return rows.tensor_split(self.size)[self.rank]

    def wrap_ddp(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module with its gradients averaged over all ranks at each backward pass.

        Batch norms then take their statistics from the batch of all ranks, which PyTorch can do on GPUs only. Raises
        RecipeError for one elsewhere.
        """
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        gpus = None
        if device.type == "cuda":
            gpus = _between_gpus()
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module, gpus)
        elif norms:
            raise RecipeError(
                "A student with batch norm cannot be split between processes on the CPU: its statistics are of the "
                "whole batch, and PyTorch exchanges them between GPUs only. Train it in one process, or train as many "
                "students, arms counted, as there are processes."
            )
        return nn.parallel.DistributedDataParallel(module, process_group=gpus)

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Rank 0 does what is inside before the others do: what goes wrong for all of them is said once."""
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()

    def _together(self, call: Callable[[Any], object]) -> None:
        if self.size == 1:
            return
        import torch.distributed as dist

        with self.abort_on_lost_peer():
            call(dist)

    @contextlib.contextmanager
    def abort_on_lost_peer(self) -> Iterator[None]:
        """Say of a connection that is lost inside that another process has failed: OtherProcessFailed."""
        try:
            yield
        except RuntimeError as problem:  # PyTorch has no class of its own for it
            if not any(name in str(problem) for name in ("gloo", "NCCL", "Connection")):
                raise
            raise OtherProcessFailed(
                f"Rank {self.rank} stops: another process has failed, or cannot be reached."
            ) from problem


ALONE = Group()


@lru_cache
def _between_gpus() -> Any:
    import torch.distributed as dist

    return dist.new_group(backend="nccl")


@contextlib.contextmanager
def group() -> Iterator[Group]:
    """The group that torchrun's environment variables tell of; without them, or with one process, ALONE.

    It carries small objects over gloo; tensors on GPUs want a group of their own.
    """
    # Some clusters set WORLD_SIZE without torchrun; then nobody says where the others are.
    if not os.environ.keys() >= _PLACE or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
