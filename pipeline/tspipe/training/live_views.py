"""Targets of views that are drawn anew in each epoch: the teacher's, during training."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tspipe.losses import Target
from tspipe.models.feature_net import FeatureNet
from tspipe.models.teacher import run_teacher
from tspipe.utils.rng import seed_torch
from tspipe.utils.timing import Stopwatch


@dataclass(frozen=True)
class LiveViews:
    """The teacher of views that no cache holds.

    Attributes:
        select: makes a target of labels, features and logits, with only what the losses need.
        teacher_labels: whether the teacher's labels replace the dataset's.
        stopwatch: how long the teacher has worked.
    """

    teacher: FeatureNet
    select: Callable[[Tensor, Tensor, Tensor], Target]
    teacher_labels: bool
    stopwatch: Stopwatch

    def target(self, images: Tensor, labels: Tensor, seed: int, epoch: int, number: int) -> Target:
        """Return the target of the normalised images (m, C, H, W) of a batch of an epoch."""
        seed_torch(seed, "teacher of views", epoch, number)  # it may have dropout that is always on
        with self.stopwatch.on():
            output = run_teacher(self.teacher, images)
        return self.select(output.logits.argmax(1) if self.teacher_labels else labels, *output)
