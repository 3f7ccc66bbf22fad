"""Epoch metrics do not depend on how many steps are evaluated at once, or in how many processes."""

import math

import pytest
import torch
from torch import Tensor

from tspipe.training.metrics import EpochMetrics, merge_metrics

STEPS = 150  # more than are evaluated at once


def steps(first: int = 0, stop: int = STEPS) -> list[tuple[int, Tensor, float, Tensor, Tensor]]:
    """Return step numbers, loss terms, weights, logits and labels."""
    draw = torch.Generator().manual_seed(0)
    made = [
        (
            step,
            torch.rand(2, generator=draw),
            1.0 + step % 3,
            torch.rand(5, 4, generator=draw),
            torch.randint(4, (5,), generator=draw),
        )
        for step in range(STEPS)
    ]
    return made[first:stop]


def counted(some: list[tuple[int, Tensor, float, Tensor, Tensor]]) -> EpochMetrics:
    metrics = EpochMetrics(["mse", "xent"], torch.device("cpu"))
    for step in some:
        metrics.add(*step)
    return metrics


def test_metrics_equal_those_of_a_plain_loop() -> None:
    result, sums, right = counted(steps()).means(), [0.0, 0.0], 0
    for _, terms, weight, logits, labels in steps():
        sums = [total + weight * term for total, term in zip(sums, terms.tolist(), strict=True)]
        right += sum(int(row.argmax()) == label for row, label in zip(logits, labels, strict=True))
    images = 5 * STEPS
    assert result == {
        "train_accuracy": right / images,
        "mse": pytest.approx(sums[0] / images, rel=1e-5),
        "xent": pytest.approx(sums[1] / images, rel=1e-5),
    }


@pytest.mark.parametrize("bad", [[], [0], [63], [64], [149], [70, 71], [3, 140]])
@pytest.mark.parametrize("left_out", [set(), {2, 65, 66}])
def test_the_first_non_finite_loss_is_recorded(bad: list[int], left_out: set[int]) -> None:
    some = [step for step in steps() if step[0] not in left_out]
    for step, terms, *_ in some:
        if step in bad:
            terms[step % 2] = math.nan if step % 4 < 2 else math.inf
    assert int(counted(some).bad_step) == min(bad, default=-1)


@pytest.mark.parametrize("stop", [0, 1, 64, 100])
def test_metrics_resume_bit_for_bit_from_a_state_dict(stop: int) -> None:
    resumed = counted([])
    resumed.load_state_dict(counted(steps(0, stop)).state_dict())
    for step in steps(stop):
        resumed.add(*step)
    whole = counted(steps()).state_dict()
    assert resumed.state_dict().keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in resumed.state_dict().items())


def test_merged_metrics_equal_those_of_one_process() -> None:
    some = steps()
    for number, *_, labels in some:
        labels[:] = number % 4
    some[90][1][0] = some[20][1][0] = math.inf
    metrics = counted([])
    metrics.load_state_dict(merge_metrics([counted(some[i::3]).state_dict() for i in range(3)]))
    whole = counted(some)
    assert metrics.means()["train_accuracy"] == whole.means()["train_accuracy"]
    assert (int(metrics.bad_step), int(metrics.state_dict()["rows"])) == (20, 5 * STEPS)
    torch.testing.assert_close(metrics.state_dict()["sums"], whole.state_dict()["sums"])
