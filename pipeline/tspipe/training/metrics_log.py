"""What a run reports of its metrics: metrics.csv, TensorBoard, and sentences after the first epoch."""

import math
from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import Field, TypeAdapter

from tspipe.data.random_images.score import balance_report, label_counts, label_shares
from tspipe.errors import RecipeError
from tspipe.training.config import StudentConfig
from tspipe.training.learner import Learner
from tspipe.training.random_source import RandomSource
from tspipe.training.run_folder import Row, RunFolder
from tspipe.training.tensorboard import TensorBoard
from tspipe.utils.console import printable
from tspipe.utils.progress import warn

# Expected ratios to the cross-entropy. By default, kd multiplies its KL by α · T² / (1 − α) = 144, lskd by 360.
_EXPECTED_RATIOS = {"mse": (0.1, 10), "kl": (0.1, 400), "vid": (0.1, 10)}
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

    def close(self) -> None:
        """Close TensorBoard's files."""
        if self.board:
            self.board.close()


def record_random_labels(config: StudentConfig, folder: RunFolder, random: RandomSource | None) -> None:
    """Count the teacher's labels for random images; write and print them, unless the run folder has them.

    This comes after the first epoch and not before: no epoch needs it, and on a CPU it takes up to three seconds.
    """
    if random is None or _has_labels(folder):
        return
    sample = random.first_labels(min(_LABELLED, _LABELLED_PIXELS // math.prod(random.spec.shape[1:]) + 1))
    counts = label_counts(sample.labels.cpu().numpy(), config.cache.classes)
    folder.write_json("random_labels.json", counts)
    sentences = [label_shares(counts)]
    if sample.candidates is not None:
        before = label_counts(sample.candidates.numpy(), config.cache.classes)
        sentences = balance_report(before, counts, len(sample.candidates) / len(sample.labels))
    for sentence in sentences:
        warn(sentence)


def _has_labels(folder: RunFolder) -> bool:
    """Return whether the folder's random_labels.json is sound."""
    name = "random_labels.json"
    if facts := folder.recorded_files().get(name):
        return folder.is_intact(name, facts)
    try:
        TypeAdapter(dict[str, Annotated[int, Field(ge=1, le=_LABELLED)]]).validate_python(folder.read_json(name))
    except (RecipeError, RecursionError, ValueError):
        return False
    return True


def loss_ratios(rows: Iterable[Row], *, hint: bool) -> Iterator[str]:
    """Yield a sentence per row that compares the teacher's loss term with the cross-entropy, and what to do about it.

    Args:
        hint: whether mse_weight=auto has not been tried yet.
    """
    for row in rows:
        loss = row.get("loss", "ts")
        names = [row["student"], row["arm"], *([] if loss in ("ts", "xent") else [loss])]
        learner = f"{', '.join(map(printable, names))}, epoch {row['epoch']}"
        for term in ("mse", "kl", "vid"):
            if isinstance(row.get(term), float) and row.get("xent"):
                ratio = row[term] / row["xent"]
                assessment = _assess_ratio(loss, ratio, _EXPECTED_RATIOS[term], hint)
                yield f"{learner}: {term} {row[term]:.3g} / xent {row['xent']:.3g} = {ratio:.2g}, {assessment}"


def _assess_ratio(loss: str, ratio: float, expected: tuple[float, float], hint: bool) -> str:
    """Say whether a ratio of the teacher's term to the cross-entropy is as expected and, if not, what to change."""
    low, high = expected
    if low <= ratio <= high:
        return "as expected"
    problem = "so the labels hardly count" if ratio > high else "so the teacher hardly counts"
    remedies = {
        "ts": "mse_weight=auto" if hint else f"xent_weight={ratio:.2g}",
        "kd": f"losses.kd.alpha={0.5 if ratio > high else 0.99}",
        "lskd": f"losses.lskd.xent_weight={ratio:.2g}",
    }
    return f"{problem}: try --set {remedies[loss]}" if loss in remedies else problem
