"""Reads finished runs: results per student, arm and loss, paired over the seeds, with the paper's numbers."""

import contextlib
import csv
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from tspipe.errors import ReportError
from tspipe.experiments.statistics import HELPS, HURTS, Sample
from tspipe.recipes.schema import Paper
from tspipe.training.arms import ALONE, ALONE_RANDOM, OWN, RANDOM, UNTAUGHT
from tspipe.training.metrics_log import loss_ratios
from tspipe.training.run_folder import RunFolder
from tspipe.utils.console import pluralize, printable

Count = Annotated[int, Field(ge=1, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Result:
    """The results of one student in one arm with one loss, over the seeds. Accuracies are fractions.

    `accuracy` has the test accuracies `last`, after the last epoch; `best`, the highest of any epoch, so selected by
    the test set; and with held-back images `chosen`, after the epoch that they selected.
    """

    student: str
    arm: str
    loss: str
    accuracy: dict[str, Sample]
    curve: tuple[Sample, ...]  # the test accuracy after each epoch
    seconds: float  # median per epoch, of training and testing
    parameters: int  # number of the student's weights in training
    deployed: int | None  # the same when g(x) and the classifier are one layer; None for a run that does not state it
    paper: float | None  # the accuracy that the paper reports

    @property
    def taught(self) -> bool:
        """Whether the student learned from the teacher."""
        return self.arm not in UNTAUGHT

    @property
    def name(self) -> str:
        """The arm, and the loss if a taught arm has another loss than the paper's."""
        return f"{self.arm}, {self.loss}" if self.taught and self.loss != "ts" else self.arm


@dataclass(frozen=True)
class Comparison:
    """A result and that of the same student alone, paired by seed: equal initial weights and batches."""

    result: Result
    base: Result

    @property
    def name(self) -> str:
        """The result's name, and what it is compared with unless that is `alone`."""
        return self.result.name + (f", over {self.base.name}" if self.base.arm != ALONE else "")

    def difference(self, choice: str) -> Sample:
        """Return the paired differences of test accuracy as fractions: `last`, `best` or `chosen`."""
        return self.result.accuracy[choice] - self.base.accuracy[choice]

    @property
    def paper(self) -> float | None:
        """The difference of the paper's accuracies as a fraction, or None unless it reports both."""
        ours, base = self.result.paper, self.base.paper
        return None if ours is None or base is None else ours - base

    @property
    def sign(self) -> str:
        """Whether our difference at the best epoch has the sign of the paper's, if it is significant."""
        ours = {HELPS: 1, HURTS: -1}.get(self.difference("best").conclusion, 0)
        if self.paper is None or not ours:
            return "unclear"
        return "same" if ours * self.paper > 0 else "opposite"


class Teacher(BaseModel):
    """The teacher in summary.json."""

    network: str
    test_accuracy: Fraction
    parameters: Count | None


class Cost(BaseModel):
    """What the teacher costs, in summary.json; a pass is that of one image."""

    cache_bytes: Count
    cached_passes: Count
    epoch_passes: Annotated[int, Field(ge=0, lt=2**63)]


class Initial(BaseModel):
    """The weights that a student starts from, in summary.json."""

    name: str
    sha256: str


class Summary(BaseModel):
    """summary.json."""

    identity: str | None = None
    dataset: str
    teacher: Teacher
    parameters: dict[str, Count]
    deployed_parameters: dict[str, Count] = {}
    initial: dict[str, Initial] = {}
    cost: Cost | None = None
    paper: Paper | None = None
    mse_weight: float | None = None


class Config(BaseModel):
    """The fields of config.json that a report uses."""

    seeds: Count
    epochs: Count
    cache: str = ""
    mse_weight: float | str = 1.0
    random_kind: str = "uniform"
    trust_data: bool = False


class ConfigFile(BaseModel):
    """config.json."""

    config: dict[str, JsonValue]
    environment: dict[str, JsonValue]


class _Row(BaseModel):
    """The columns of metrics.csv that a report uses; the loss terms that it compares may be empty."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    seed: int
    epoch: int
    student: str
    arm: str
    loss: str = ""
    test_accuracy: Fraction
    val_accuracy: Fraction | None = None
    seconds_training: Annotated[Finite, Field(ge=0)]
    seconds_testing: Annotated[Finite, Field(ge=0)]
    seconds_teacher: Annotated[Finite, Field(ge=0)] = 0.0
    mse: Finite | None = None
    kl: Finite | None = None
    vid: Finite | None = None
    xent: Finite | None = None


@dataclass(frozen=True)
class Findings:
    """A finished run: its config, its summary, and its results in the order of its rows."""

    run: RunFolder
    config: Config
    summary: Summary
    results: list[Result]
    ratios: list[str]  # a sentence per taught result: its loss terms in the first epoch
    teacher_seconds: float  # median per epoch, for live passes
    random_labels: dict[str, int]

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.run.path.resolve().name

    @property
    def choices(self) -> list[str]:
        """The epochs that accuracies refer to: last, best and, with held-back images, chosen."""
        return [choice for choice in self.results[0].accuracy if all(choice in r.accuracy for r in self.results)]

    @property
    def students(self) -> list[str]:
        """The students, without duplicates."""
        return list(dict.fromkeys(result.student for result in self.results))

    @property
    def duration(self) -> str:
        """The length of the run: `45 epochs, 5 seeds`."""
        return f"{pluralize(self.config.epochs, 'epoch')}, {pluralize(self.config.seeds, 'seed')}"

    @property
    def conditions(self) -> tuple[object, ...]:
        """What two runs must have in common to be compared."""
        summary, config = self.summary, self.config
        return summary.dataset, summary.teacher.network, summary.teacher.test_accuracy, config.epochs, config.seeds

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """All results compared with the student alone, and taught ones also with its other arms.

        The student alone with random images is compared with what the teacher adds to them.
        """
        bases = {(result.student, result.arm): result for result in self.results if not result.taught}
        pairs = [(r, bases.get((r.student, arm))) for r in self.results for arm in _bases(r.arm)]
        return [Comparison(result, base) for result, base in pairs if base]


def _bases(arm: str) -> tuple[str, ...]:
    """Return the arms that an arm is compared with."""
    return {ALONE: (), OWN: (ALONE,), ALONE_RANDOM: (ALONE,), RANDOM: (ALONE, OWN, ALONE_RANDOM)}.get(arm, (ALONE, OWN))


Compared = tuple[Findings, Comparison]  # a comparison, and the run of its result


def across_runs(runs: Sequence[Findings]) -> list[list[Compared]]:
    """Return, for each student, its results in all runs over the student alone, which the first run with one provides.

    Only runs of equal conditions are compared: there, learners of one seed and width start from the same weights.
    Students that only one run trained are left out.
    """
    groups: dict[tuple[object, ...], list[tuple[Findings, Result]]] = {}
    for run in runs:
        for result in run.results:
            groups.setdefault((*run.conditions, result.student), []).append((run, result))
    compared = []
    for group in groups.values():
        base = next((result for _, result in group if result.arm == ALONE), None)
        if base and len({id(run) for run, _ in group}) > 1:
            compared.append([(run, Comparison(result, base)) for run, result in group])
    return compared


def open_run(path: Path) -> RunFolder:
    """Open the run folder at a path. Raises ReportError if there is none or it is not finished."""
    file = path / "config.json"
    if not file.exists():
        raise ReportError(
            f"{path} is not a run folder: it has no config.json. Give a folder that tspipe student wrote, in runs/."
        )
    with _reading(file):
        content = ConfigFile.model_validate(RunFolder(path, {}, {}).read_json(file.name))
    run = RunFolder(path, content.config, content.environment)
    if not run.finished:
        raise ReportError(f"The run in {path} is not finished. Run its command again to resume it.")
    return run


def read(run: RunFolder) -> Findings:
    """Read a finished run. Raises ReportError, naming the file, if a file is not as stage two writes it."""
    with _reading(run.path / "config.json"):
        config = Config.model_validate(run.config)
    with _reading(run.path / "summary.json"):
        summary = Summary.model_validate(run.read_json("summary.json"))
    if summary.identity not in (None, run.identity):
        raise ReportError(f"{run.path / 'summary.json'} is of another run. Run the command of {run.path} again.")
    labels: dict[str, int] = {}
    with _reading(run.path / "random_labels.json"):
        if (run.path / "random_labels.json").exists():  # absent without random images
            labels = TypeAdapter(dict[str, Count]).validate_python(run.read_json("random_labels.json"))
    recorded = run.recorded_files().get("metrics.csv")
    if recorded and not run.is_intact("metrics.csv", recorded):
        raise ReportError(
            f"{run.path / 'metrics.csv'} has changed since the run was finished. Restore it, or train again with "
            "another --out."
        )
    with _reading(run.path / "metrics.csv"):
        groups = _groups(run, config)
        results = [_result(group, config, summary) for group in groups]
        first = [_first_epoch(group, result) for group, result in zip(groups, results, strict=True) if result.taught]
        ratios = list(loss_ratios(first, hint=config.mse_weight != "auto"))
    teacher_seconds = statistics.median(row.seconds_teacher for row in groups[-1][1:] or groups[-1])
    return Findings(run, config, summary, results, ratios, teacher_seconds, labels)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise a ReportError that names the file in place of the errors that its content causes."""
    try:
        yield
        return
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = "input should be a JSON object" if first["type"] == "model_type" else first["msg"]
        reason = f"{place}: {message[0].lower()}{message[1:]}".removeprefix(": ")
    except KeyError as problem:
        reason = f"{problem.args[0]!r} is missing"
    except (OverflowError, RecursionError, ValueError, csv.Error) as problem:
        reason = str(problem)
    reason = printable(reason, 200)
    raise ReportError(f"{file} is not as tspipe student writes it: {reason}. Train the run again with another --out.")


def _groups(run: RunFolder, config: Config) -> list[list[_Row]]:
    """Return the rows of each student, arm and loss, by seed and epoch, in order of first appearance."""
    groups: dict[tuple[str, ...], list[_Row]] = {}
    for cells in run.rows():
        row = _Row.model_validate({name: value for name, value in cells.items() if value not in ("", None)})
        loss = row.loss or ("xent" if row.arm in UNTAUGHT else "ts")
        groups.setdefault((row.student, row.arm, loss), []).append(row.model_copy(update={"loss": loss}))
    for name, group in groups.items():
        complete = len(group) == config.seeds * config.epochs
        expected = itertools.product(range(config.seeds), range(1, config.epochs + 1)) if complete else ()
        if [(row.seed, row.epoch) for row in group] != list(expected):
            raise ValueError(f"{', '.join(name)} has no row for each of {config.epochs} epochs of {config.seeds} seeds")
    if not groups:
        raise ValueError("there are no rows")
    return list(groups.values())


def _result(group: list[_Row], config: Config, summary: Summary) -> Result:
    student, arm, loss = group[0].student, group[0].arm, group[0].loss
    by_seed = [group[i : i + config.epochs] for i in range(0, len(group), config.epochs)]
    tested = [[row.test_accuracy for row in rows] for rows in by_seed]
    accuracy = {"last": Sample(tuple(t[-1] for t in tested)), "best": Sample(tuple(map(max, tested)))}
    if all(row.val_accuracy is not None for row in group):
        validated = [[row.val_accuracy or 0.0 for row in rows] for rows in by_seed]
        accuracy["chosen"] = Sample(tuple(t[v.index(max(v))] for t, v in zip(tested, validated, strict=True)))
    curve = tuple(Sample(epoch) for epoch in zip(*tested, strict=True))
    warm = group[1:] or group  # the first epoch includes the warm-up of the process
    seconds = statistics.median(row.seconds_training + row.seconds_testing for row in warm)
    of_paper = summary.paper.accuracy.get(student, {}) if summary.paper and (arm in UNTAUGHT or loss == "ts") else {}
    return Result(
        student,
        arm,
        loss,
        accuracy,
        curve,
        seconds,
        summary.parameters[student],
        summary.deployed_parameters.get(student),
        of_paper.get(arm),
    )


def _first_epoch(group: list[_Row], result: Result) -> dict[str, object]:
    """Return a result's first epoch as a row with the loss terms' means over the seeds."""
    values = {term: [getattr(row, term) for row in group if row.epoch == 1] for term in ("mse", "kl", "vid", "xent")}
    means = {term: statistics.fmean(terms) for term, terms in values.items() if None not in terms}
    return {"student": result.student, "arm": result.arm, "loss": result.loss, "epoch": 1, **means}
