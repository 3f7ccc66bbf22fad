"""How the processes of a job divide a cohort: by its learners, or by its batches."""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from tspipe.training.batches import GlobalBatch
from tspipe.training.checkpoint import prefixed
from tspipe.training.learner import Learner
from tspipe.training.metrics import merge_metrics
from tspipe.utils.distributed import ALONE, Group
from tspipe.utils.timing import Clock

T = TypeVar("T")
_AGREE_EVERY = 10  # batches after which the processes agree on whether a checkpoint is due


class Partition:
    """One process's part of the work on a cohort; the methods of this base class are those of a process that does all.

    Attributes:
        dropout_purpose: the random stream that seeds dropout in this process.
        reports_losses: whether this process reports non-finite losses of its learners, so that each is reported once.
    """

    dropout_purpose = "dropout"
    reports_losses = True

    def __init__(self, group: Group = ALONE):
        self.group = group

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the run folder."""
        return self.group.rank == 0

    def checkpoint_due(self, clock: Clock, number: int) -> bool:
        """Return whether a checkpoint is due after batch `number`: the same answer in every process."""
        if self.group.size == 1:
            return clock.due()
        return number % _AGREE_EVERY == _AGREE_EVERY - 1 and self.group.broadcast(clock.due())

    def local_learners(self, cohort: Sequence[T]) -> list[T]:
        """Return the learners of a cohort that this process trains."""
        return list(cohort)

    def local_rows(self, rows: Tensor) -> Tensor:
        """Return this process's part of a batch."""
        return rows

    def local_batches(self, batches: list[Tensor]) -> list[Tensor]:
        """Return the batches of a split that this process evaluates."""
        return batches

    def global_batch(self, images: int, random: int, unlabelled: int) -> GlobalBatch | None:
        """Describe the batch that this process has a part of; None if it has all of it."""
        return None

    def distribute(self, learner: Learner) -> None:
        """Prepare a learner for training in this job."""

    def sum_counts(self, counts: list[int]) -> list[int]:
        """Return the counts over a split, of which this process has counted its part."""
        return counts

    def gather_rows(self, rows: list[T]) -> list[T]:
        """Return the rows of all learners, in no particular order."""
        return rows

    def gather_states(self, learners: list[Learner]) -> dict[str, Tensor]:
        """Return the state of all learners of a cohort as flat tensors."""
        return {key: value for one in learners for key, value in prefixed(f"{one.name}/", one.state_dict()).items()}

    def merge_metrics(self, learners: list[Learner]) -> None:
        """Give the metrics of this epoch over all processes to every process."""

    def split_metrics(self, learners: list[Learner]) -> None:
        """After `merge_metrics`, within an epoch: rank 0 continues from the merged metrics, the others from zero."""


class ShardLearners(Partition):
    """Each process trains some of a cohort's learners on whole batches; a single process trains all of them."""

    def local_learners(self, cohort: Sequence[T]) -> list[T]:
        """Return every n-th learner, counted from the last, so that the last, with random images, is rank 0's."""
        return [one for i, one in enumerate(reversed(cohort)) if i % self.group.size == self.group.rank][::-1]

    def gather_rows(self, rows: list[T]) -> list[T]:
        return [row for rows in self.group.gather(rows) for row in rows]

    def gather_states(self, learners: list[Learner]) -> dict[str, Tensor]:
        tensors = super().gather_states(learners)
        if self.group.size == 1:
            return tensors
        parts = self.group.gather({key: value.cpu() for key, value in tensors.items()})
        return {key: value for part in parts for key, value in part.items()}


class SplitBatches(Partition):
    """All processes train every learner, each on its part of every batch (`DistributedDataParallel`)."""

    def __init__(self, group: Group = ALONE):
        super().__init__(group)
        self.reports_losses = self.is_writer  # all processes have the same merged losses
        if group.rank:  # other images, so dropout draws other numbers
            self.dropout_purpose = f"dropout, rank {group.rank}"

    def local_rows(self, rows: Tensor) -> Tensor:
        return self.group.shard(rows)

    def local_batches(self, batches: list[Tensor]) -> list[Tensor]:
        return batches[self.group.rank :: self.group.size]

    def global_batch(self, images: int, random: int, unlabelled: int) -> GlobalBatch:
        return GlobalBatch(images, random, unlabelled, self.group.size)

    def distribute(self, learner: Learner) -> None:
        learner.distribute(self.group)

    def sum_counts(self, counts: list[int]) -> list[int]:
        return [sum(parts) for parts in zip(*self.group.gather(counts), strict=True)]

    def merge_metrics(self, learners: list[Learner]) -> None:
        for learner in learners:
            local = {name: value.cpu() for name, value in learner.metrics.state_dict().items()}
            learner.metrics.load_state_dict(merge_metrics(self.group.gather(local)))

    def split_metrics(self, learners: list[Learner]) -> None:
        for learner in learners if self.group.rank else []:
            learner.metrics.reset()


def choose_partition(group: Group, cohort_size: int) -> Partition:
    """Split batches where there are more processes than learners, else shard the learners."""
    return SplitBatches(group) if group.size > cohort_size else ShardLearners(group)
