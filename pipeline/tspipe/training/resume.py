"""Where a run resumes: what its checkpoint and its metrics claim is compared with the files in its folder."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from tspipe.errors import NetworkError, RecipeError
from tspipe.models import networks, weights
from tspipe.training.arms import LearnerSpec
from tspipe.training.checkpoint import Position
from tspipe.training.run_folder import NAMES, FileFacts, Row, RunFolder, results_sha256


@dataclass(frozen=True)
class WrittenResults:
    """The metrics and students that an earlier process has written into a run folder.

    Attributes:
        cohort: the learners of seed 0.
        columns: those of metrics.csv.
        recorded: the size and SHA-256 of files, as far as a checkpoint or summary.json states them; metrics.csv only
            if summary.json does.
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
        for spec in (replace(spec, seed=seed) for spec in self.cohort):
            for selected, name in spec.files(validation="val_accuracy" in self.columns).items():
                facts = self.recorded.get(name)
                if facts and not self.folder.is_intact(name, facts):
                    yield f"{name} is missing or damaged"
                elif not (facts and "metrics.csv" in self.recorded):
                    metadata = self._metadata(name)
                    if not metadata.items() >= provenance(self.folder.identity, spec, selected).items():
                        yield f"{name} is missing, damaged or of another run"
                    elif metadata.get("results_sha256") != results_sha256(spec.rows(self.rows)):
                        yield f"metrics.csv does not have the results of {name}"

    def _metadata(self, name: str) -> Mapping[str, str]:
        """Return the metadata of a student, which are empty if it is missing or damaged."""
        try:
            return weights.read(self.folder.path / name).metadata
        except NetworkError:
            return {}

    def resume_from(
        self, checkpoint: Position | None, seeds: int, metrics: FileFacts | None = None
    ) -> tuple[Position, str]:
        """Return where to resume, and why that is before the checkpoint; no reason if it is not.

        `metrics` is what the checkpoint states of metrics.csv.
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
            if not checkpoint.epoch or (metrics and self.folder.begins_with("metrics.csv", metrics)):
                return checkpoint, ""
            reason = "metrics.csv is not as the checkpoint states"
        return Position(seed), reason


def provenance(identity: str, spec: LearnerSpec, selected: str) -> dict[str, str]:
    """Return the metadata of a student that say which learner of which run it is, and what selected its epoch."""
    return {
        "arm": spec.arm,
        "identity": identity,
        "loss": spec.loss_name,
        "network": networks.recorded_name(spec.student),
        "seed": str(spec.seed),
        "selected": selected,
    }


def _is_sound(cell: tuple[str, object]) -> bool:
    """Return whether a cell of metrics.csv holds what its column needs; loss terms that a learner lacks are empty."""
    name, value = cell
    if name in NAMES:
        return isinstance(value, str)
    if name in ("seed", "epoch"):
        return isinstance(value, int)
    return value == "" or isinstance(value, int | float)
