"""The two ways to divide a cohort, each on its own."""

import pytest
import torch

from tspipe.training.batches import GlobalBatch
from tspipe.training.partition import Partition, ShardLearners, SplitBatches, choose_partition
from tspipe.utils.distributed import Group
from tspipe.utils.timing import Clock


def test_batches_are_split_only_if_there_are_more_processes_than_learners() -> None:
    assert isinstance(choose_partition(Group(0, 3), 3), ShardLearners)
    assert isinstance(choose_partition(Group(0, 4), 3), SplitBatches)


def test_a_shard_has_whole_batches() -> None:
    part, rows = ShardLearners(Group(1, 2)), torch.arange(9)
    assert part.local_rows(rows) is rows
    assert part.global_batch(9, 3, 2) is None
    assert part.local_batches([rows]) == [rows]
    assert part.dropout_purpose == "dropout"
    assert not part.is_writer


def test_a_split_batch_knows_the_whole() -> None:
    part = SplitBatches(Group(1, 2))
    assert part.local_learners("ab") == ["a", "b"]
    assert part.global_batch(9, 3, 4) == GlobalBatch(images=9, random=3, unlabelled=4, processes=2)
    assert part.local_batches([torch.tensor([i]) for i in range(3)]) == [torch.tensor([1])]
    assert part.dropout_purpose == "dropout, rank 1"


@pytest.mark.parametrize("part", [ShardLearners(), SplitBatches()])
def test_one_process_decides_alone_when_a_checkpoint_is_due(part: Partition) -> None:
    assert part.checkpoint_due(Clock(0), number=3)
    assert not part.checkpoint_due(Clock(1000), number=9)
