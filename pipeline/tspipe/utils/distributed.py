"""The group of processes that compute together. The only file that imports torch.distributed."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tspipe.errors import RecipeError
from tspipe.utils.heartbeat import Heartbeat, lost_peer

T = TypeVar("T")
_TORCHRUN_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # once all ranks have made the call; the wait for them has no limit
_in_rank_zero_first = ContextVar("_in_rank_zero_first", default=False)


@dataclass(frozen=True)
class Group:
    """The processes of a job that torchrun started, or this one alone.

    All of them make the same calls in the same order. A call waits for the others for as long as they live, and
    raises OtherProcessFailed when one has ended instead. Values are pickled, so they are small Python objects.
    """

    rank: int = 0
    size: int = 1
    heartbeat: Heartbeat | None = field(default=None, repr=False, compare=False)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value; the values of other ranks are ignored."""
        values: list[Any] = [value]
        self._run_collective(lambda: dist.broadcast_object_list(values))
        received: T = values[0]
        return received

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks, on every rank."""
        values: list[Any] = [value] * self.size
        self._run_collective(lambda: dist.all_gather_object(values, value))
        return values

    def barrier(self) -> None:
        """Wait until every rank makes this call."""
        self.gather(None)

    def shard(self, rows: Tensor) -> Tensor:
        """Return this rank's part of a batch (n, …). Sizes differ by at most one; a part is empty if n <= rank."""
        return rows.tensor_split(self.size)[self.rank]

    def wrap_ddp(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Return the module with its gradients averaged over all ranks at each backward pass.

        Batch norms take their statistics from the batch of all ranks, which PyTorch supports on GPUs only. Raises
        RecipeError for a batch norm elsewhere.
        """
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        gpus = None
        if device.type == "cuda":
            gpus = _nccl_group()
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module, gpus)
        elif norms:
            raise RecipeError(
                "A student or a loss with batch norm cannot be split between processes on the CPU: its statistics are "
                "of the whole batch, and PyTorch exchanges them between GPUs only. Train it in one process, or train "
                "as many students, arms counted, as there are processes."
            )
        return nn.parallel.DistributedDataParallel(module, process_group=gpus)

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the block on rank 0 before the other ranks, so that an error common to all is reported once.

        The block makes no collective call, which would wait for itself: one raises RuntimeError.
        """
        if self.rank:
            self.barrier()
        token = _in_rank_zero_first.set(True)
        try:
            yield
        finally:
            _in_rank_zero_first.reset(token)
        if not self.rank:
            self.barrier()

    def _run_collective(self, call: Callable[[], object]) -> None:
        if _in_rank_zero_first.get():
            raise RuntimeError("A collective call inside rank_zero_first waits for itself. Move it out of the block.")
        if self.size == 1:
            return
        with self.abort_on_lost_peer():
            if self.heartbeat:
                self.heartbeat.meet()
            call()

    @contextlib.contextmanager
    def abort_on_lost_peer(self) -> Iterator[None]:
        """Raise OtherProcessFailed in place of the error of a lost connection."""
        try:
            yield
        except RuntimeError as problem:  # gloo and NCCL have no class of their own for it
            lost = any(name in str(problem) for name in ("gloo", "NCCL", "Connection"))
            if not lost and not isinstance(problem, dist.DistError):
                raise
            raise lost_peer(self.rank) from problem


ALONE = Group()


@lru_cache
def _nccl_group() -> Any:
    return dist.new_group(backend="nccl", timeout=_COLLECTIVE_TIMEOUT)


@contextlib.contextmanager
def group() -> Iterator[Group]:
    """Join the group that torchrun's environment variables describe; without them, or with one process, yield ALONE.

    It carries small objects over gloo; gradients on GPUs have an NCCL group of their own. A normal exit waits for all
    ranks.
    """
    # Some clusters set WORLD_SIZE without an address.
    if not os.environ.keys() >= _TORCHRUN_VARIABLES or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=_COLLECTIVE_TIMEOUT)
    rank, size, failed = dist.get_rank(), dist.get_world_size(), True
    heartbeat = Heartbeat(_connect, rank, size)
    try:
        joined = Group(rank, size, heartbeat)
        yield joined
        joined.barrier()  # the store lives in rank 0, so it leaves last
        failed = False
    finally:
        heartbeat.stop(failed)
        dist.destroy_process_group()


def _connect() -> Any:
    """Return a connection to the store of `init_process_group`, with a prefix for its keys."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    stores: Any = dist  # PyTorch's stubs do not export the stores
    store = stores.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_COLLECTIVE_TIMEOUT)
    return stores.PrefixStore(f"tspipe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
