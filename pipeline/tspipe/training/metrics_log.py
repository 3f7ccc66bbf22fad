"""Writes a run's metrics as they come: metrics.csv, TensorBoard, and what is printed after the first epoch."""

import math

import torch

from tspipe.training.config import StudentConfig
from tspipe.training.learner import Learner
from tspipe.training.random_source import RandomSource
from tspipe.training.run_folder import Row, RunFolder
from tspipe.training.summary import label_shares, loss_ratios
from tspipe.training.tensorboard import TensorBoard
from tspipe.utils.progress import stderr_console

_LABELLED, _LABELLED_PIXELS = 1000, 2**24  # the most random images, and pixels of them, whose labels are counted
_COLUMNS = ["seed", "epoch", "student", "arm", "loss", "train_accuracy", "test_accuracy"]
_SECONDS = ["seconds_training", "seconds_testing", "seconds_teacher"]


class MetricsLog:
    """Writes the rows of each epoch, in the order of the cohort.

    Args:
        cohort: the learners of one seed.
        validation: whether rows have a validation accuracy.
    """

    def __init__(self, folder: RunFolder, cohort: list[Learner], board: TensorBoard | None, *, validation: bool):
        self.folder, self.board = folder, board
        self._order = [(one.spec.student, one.spec.arm, one.spec.loss_name) for one in cohort]
        terms = sorted({term for learner in cohort for term in learner.metrics.names})
        self.columns = [*_COLUMNS, *(["val_accuracy"] if validation else []), *terms, *_SECONDS]

    def write(self, rows: list[Row]) -> list[Row]:
        """Write an epoch's rows, and return them in the order of the cohort."""
        rows = sorted(rows, key=lambda row: self._order.index((row["student"], row["arm"], row["loss"])))
        self.folder.append(rows, self.columns)
        if self.board:
            self.board.write(rows)
        return rows


def print_first_epoch(config: StudentConfig, folder: RunFolder, rows: list[Row], random: RandomSource | None) -> None:
    """Print how the loss terms compare and which labels random images get, and keep the latter in the run folder.

    This comes after the first epoch and not before: no epoch needs it, and on a CPU it takes up to three seconds.
    """
    for sentence in loss_ratios(rows, hint=folder.config.get("mse_weight") != "auto"):
        stderr_console.print(sentence, markup=False)
    if random and not (folder.path / "random_labels.json").exists():
        labels = random.first_labels(min(_LABELLED, _LABELLED_PIXELS // math.prod(random.spec.shape[1:]) + 1))
        counts = _ranked_counts(labels, config.cache.classes)
        folder.write_json("random_labels.json", counts)
        stderr_console.print(label_shares(counts), markup=False)


def _ranked_counts(labels: torch.Tensor, classes: list[str]) -> dict[str, int]:
    """Return how often each class is among the labels, the most frequent first."""
    counts = labels.bincount(minlength=len(classes)).tolist()
    ranked = sorted(zip(classes, counts, strict=True), key=lambda item: -item[1])
    return {name: count for name, count in ranked if count}
