"""How several processes divide a cohort: its learners or, where it has fewer than there are processes, its batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from tspipe.training.checkpoint import prefixed
from tspipe.training.learner import Learner
from tspipe.training.metrics import together
from tspipe.utils.distributed import ALONE, Group
from tspipe.utils.timing import Clock

T = TypeVar("T")
_AGREE = 10  # batches after which processes agree on whether a checkpoint is due


@dataclass(frozen=True)
class Sharing:
    """The part of this process, one of a group, in a cohort of so many learners."""

    group: Group = ALONE
    learners: int = 1

    @property
    def splits(self) -> bool:
        """Whether every process trains all learners, on its part of every batch; else it trains some, on all of it."""
        return self.group.size > self.learners

    def mine(self, learners: Sequence[T]) -> list[T]:
        """Those of a cohort's learners that this process trains; the last, with random images, are rank 0's."""
        if self.splits:
            return list(learners)
        return [one for i, one in enumerate(reversed(learners)) if i % self.group.size == self.group.rank][::-1]

    def part(self, rows: Tensor) -> Tensor:
        """This process's part of a batch."""
        return self.group.share(rows) if self.splits else rows

    def total(self, counts: list[int]) -> list[int]:
        """Counts over a split, each process having counted a part of it."""
        return [sum(parts) for parts in zip(*self.group.gather(counts), strict=True)] if self.splits else counts

    def rows(self, mine: list[T]) -> list[T]:
        """What every process has of its learners, together, in no order."""
        return mine if self.splits else [row for rows in self.group.gather(mine) for row in rows]

    def due(self, clock: Clock, number: int) -> bool:
        """Whether a checkpoint is due after batch `number`; the same answer in every process."""
        if self.group.size == 1:
            return clock.due()
        return number % _AGREE == _AGREE - 1 and self.group.broadcast(clock.due())

    def count_together(self, learners: list[Learner]) -> None:
        """Where batches are split, let every process have counted what all have."""
        for learner in learners if self.splits else []:
            counted = {name: value.cpu() for name, value in learner.tally.pack().items()}
            learner.tally.unpack(together(self.group.gather(counted)))

    def count_on(self, learners: list[Learner]) -> None:
        """After that, within an epoch: rank 0 goes on from what all have counted, the others from nothing."""
        for learner in learners if self.splits and self.group.rank else []:
            learner.forget()

    def states(self, mine: list[Learner]) -> dict[str, Tensor]:
        """The state of all of a cohort's learners, as flat tensors."""
        tensors = {key: value for one in mine for key, value in prefixed(one.name, one.pack()).items()}
        if self.group.size == 1 or self.splits:
            return tensors
        parts = self.group.gather({key: value.cpu() for key, value in tensors.items()})
        return {key: value for part in parts for key, value in part.items()}
