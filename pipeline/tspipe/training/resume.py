"""Where a run resumes: what its checkpoint and its metrics claim is compared with the files in its folder."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from tspipe.errors import NetworkError, RecipeError
from tspipe.models import weights
from tspipe.training.arms import LearnerSpec
from tspipe.training.checkpoint import Position
from tspipe.training.run_folder import NAMES, FileFacts, Row, RunFolder


@dataclass(frozen=True)
class WrittenResults:
    """The metrics and students that an earlier process has written into a run folder.

    Attributes:
        cohort: the learners of seed 0.
        columns: those of metrics.csv.
        recorded: the size and SHA-256 of files, as far as a checkpoint or summary.json states them.
    """

    folder: RunFolder
    cohort: list[LearnerSpec]
    columns: list[str]
    epochs: int
    recorded: Mapping[str, FileFacts]

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of metrics.csv that are complete."""
        try:
            rows = self.folder.rows()
        except (ValueError, csv.Error):
            return []
        return [row for row in rows if list(row) == self.columns and all(map(_is_sound, row.items()))]

    def epochs_done(self, seed: int) -> int:
        """Return for how many epochs, from the first, there is one row of each learner."""
        count = Counter((row["epoch"], *(row[name] for name in NAMES)) for row in self.rows if row["seed"] == seed)
        learners = [(spec.student, spec.arm, spec.loss_name) for spec in self.cohort]
        epochs = range(1, self.epochs + 1)
        return next((e - 1 for e in epochs if any(count[e, *learner] != 1 for learner in learners)), self.epochs)

    def missing(self, seed: int) -> Iterator[str]:
        """Yield what is missing or damaged of a seed that is finished."""
        if self.epochs_done(seed) < self.epochs:
            yield f"metrics.csv has no sound row for each epoch of seed {seed}"
        for spec in self.cohort:
            name = replace(spec, seed=seed).file_name
            if not self._is_sound_student(name):
                yield f"{name} is missing or damaged"

    def _is_sound_student(self, name: str) -> bool:
        if facts := self.recorded.get(name):
            return self.folder.is_intact(name, facts)
        path = self.folder.path / name
        try:
            return path.is_file() and "arm" in weights.read(path).metadata
        except NetworkError:
            return False

    def resume_from(self, checkpoint: Position | None, seeds: int) -> tuple[Position, str]:
        """Return where to resume, and why that is before the checkpoint; no reason if it is not.

        Raises RecipeError if a finished run's metrics.csv is complete, but not what was written.
        """
        seed, reason = next(((s, what) for s in range(seeds) for what in self.missing(s)), (seeds, ""))
        facts = self.recorded.get("metrics.csv")
        if seed == seeds and facts and not self.folder.is_intact("metrics.csv", facts):
            path = self.folder.path / "metrics.csv"
            raise RecipeError(f"{path} has changed since the run was finished. Restore it, or choose another --out.")
        if checkpoint is None or checkpoint.seed < seed:
            return Position(seed), ""
        if checkpoint.seed == seed and self.epochs_done(seed) >= checkpoint.epoch:
            return checkpoint, ""
        return Position(seed), reason


def _is_sound(cell: tuple[str, object]) -> bool:
    """Return whether a cell of metrics.csv holds what its column needs; loss terms that a learner lacks are empty."""
    name, value = cell
    if name in NAMES:
        return isinstance(value, str)
    if name in ("seed", "epoch"):
        return isinstance(value, int)
    return value == "" or isinstance(value, int | float)
