"""What finished runs found: per student, arm and loss, paired over the seeds, beside what the paper reports."""

import csv
import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from tspipe.errors import ReportError
from tspipe.experiments.statistics import HELPS, HURTS, Sample
from tspipe.recipes.schema import Paper
from tspipe.training.arms import ALONE, OWN, UNTAUGHT
from tspipe.training.run_folder import Row, RunFolder
from tspipe.training.summary import loss_ratios
from tspipe.utils.console import counted

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What came of one student in one arm with one loss, over the seeds.

    Attributes:
        accuracy: test accuracies, fractions: `last`, after the last epoch; `best`, the highest of any epoch, so chosen
            by the test set; where images were held back `chosen`, after the epoch that those chose.
        curve: the test accuracy after each epoch.
        seconds: per epoch, of its own training and testing: the median.
        parameters: of the student.
        paper: the accuracy that the paper reports, a fraction, if it does.
    """

    student: str
    arm: str
    loss: str
    accuracy: dict[str, Sample]
    curve: tuple[Sample, ...]
    seconds: float
    parameters: int
    paper: float | None

    @property
    def taught(self) -> bool:
        """Whether it learnt from the teacher."""
        return self.arm not in UNTAUGHT

    @property
    def name(self) -> str:
        """What its arm and loss are called: the arm, and the loss where a taught one has another than the paper's."""
        return f"{self.arm}, {self.loss}" if self.taught and self.loss != "ts" else self.arm


@dataclass(frozen=True)
class Comparison:
    """A result and that of the same student alone, from the same initial weights and batches, seed by seed."""

    result: Result
    base: Result

    @property
    def name(self) -> str:
        """What is compared; over `alone`, unless it says otherwise."""
        return self.result.name + (f", over {self.base.name}" if self.base.arm != ALONE else "")

    def difference(self, choice: str) -> Sample:
        """Of test accuracies, as fractions: `last`, `best` or `chosen`."""
        return self.result.accuracy[choice] - self.base.accuracy[choice]

    @property
    def paper(self) -> float | None:
        """The difference of the accuracies that the paper reports, a fraction, if it reports both."""
        ours, base = self.result.paper, self.base.paper
        return None if ours is None or base is None else ours - base

    @property
    def agreement(self) -> str:
        """Whether ours, at the best epoch as theirs, goes the way the paper's goes, if it is shown to go any way."""
        said = {HELPS: 1, HURTS: -1}.get(self.difference("best").conclusion, 0)
        if self.paper is None or not said:
            return "not shown"
        return "agrees" if said * self.paper > 0 else "disagrees"


class Teacher(BaseModel):
    """What summary.json says of the teacher."""

    network: str
    test_accuracy: float
    parameters: int | None


class Summary(BaseModel):
    """summary.json."""

    dataset: str
    teacher: Teacher
    parameters: dict[str, int]
    paper: Paper | None = None
    mse_weight: float | None = None


class Config(BaseModel):
    """What of config.json a report computes with."""

    seeds: int = Field(ge=1)
    epochs: int = Field(ge=1)
    cache: str = ""
    mse_weight: float | str = 1.0
    trust_data: bool = False


@dataclass(frozen=True)
class Findings:
    """A finished run, read: what it was asked, what it says of itself, and its results in the order of its rows."""

    run: RunFolder
    config: Config
    summary: Summary
    results: list[Result]
    ratios: list[str]  # how large each taught result's losses were in the first epoch, a sentence each
    random_labels: dict[str, int]

    @property
    def name(self) -> str:
        """What its folder is called."""
        return self.run.path.resolve().name

    @property
    def choices(self) -> list[str]:
        """Which epochs accuracies are of: last, best and, where images were held back, chosen."""
        return list(self.results[0].accuracy)

    @property
    def students(self) -> list[str]:
        """The students, each once."""
        return list(dict.fromkeys(result.student for result in self.results))

    @property
    def duration(self) -> str:
        """How long and how often it trained: `45 epochs, 5 seeds`."""
        return f"{counted(self.config.epochs, 'epoch')}, {counted(self.config.seeds, 'seed')}"

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every other result over the student alone, and taught ones also over it under a schedule of its own."""
        bases = {(result.student, result.arm): result for result in self.results if not result.taught}
        pairs = [(r, bases.get((r.student, base))) for r in self.results for base in UNTAUGHT]
        return [Comparison(r, base) for r, base in pairs if base and (r.taught or (r.arm, base.arm) == (OWN, ALONE))]


def open_run(path: Path) -> RunFolder:
    """The run folder at a path. Raises ReportError where there is none, or one that is not finished."""
    if not (path / "config.json").is_file():
        raise ReportError(
            f"{path} is not a run folder: it has no config.json. Name one that tspipe student wrote, in runs/."
        )
    run = RunFolder(path, *_reading(path / "config.json", lambda: _config(path)))
    if not run.finished:
        raise ReportError(f"The run in {path} is not finished. Run the command that began it again: it goes on.")
    return run


def read(run: RunFolder) -> Findings:
    """What a finished run found. Raises ReportError, naming the file, where it is not what stage two writes."""
    path = run.path
    config = _reading(path / "config.json", lambda: Config.model_validate(run.config))
    summary = _reading(path / "summary.json", lambda: Summary.model_validate(run.read_json("summary.json")))
    labels = _reading(path / "random_labels.json", lambda: _labels(run))
    groups = _reading(path / "metrics.csv", lambda: _groups(run, config))
    results = _reading(path / "metrics.csv", lambda: [_result(group, config, summary) for group in groups])
    ratios = _reading(path / "metrics.csv", lambda: _ratios(groups, results, config))
    return Findings(run, config, summary, results, ratios, labels)


def _reading(file: Path, make: Callable[[], T]) -> T:
    """What `make` gives; where the file does not allow it, a ReportError that names it."""
    try:
        return make()
    except ValidationError as problem:
        first = problem.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]}"
    except KeyError as problem:
        reason = f"there is no {problem.args[0]!r}"
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError, csv.Error) as problem:
        reason = str(problem)
    raise ReportError(f"{file} is not as tspipe student writes it: {reason}. Train the run again, with another --out.")


def _config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = RunFolder(path, {}, {}).read_json("config.json")
    config, environment = found["config"], found["environment"]
    if not isinstance(config, dict) or not isinstance(environment, dict):
        raise ValueError("config and environment are not objects")
    return config, environment


def _labels(run: RunFolder) -> dict[str, int]:
    """What the teacher calls random images, by class; empty of a run without them."""
    if not (run.path / "random_labels.json").exists():
        return {}
    counts = {str(name): int(count) for name, count in run.read_json("random_labels.json").items()}
    if min(counts.values(), default=0) < 1:
        raise ValueError("a class without images is counted")
    return counts


def _groups(run: RunFolder, config: Config) -> list[list[Row]]:
    """The rows of each student, arm and loss, by seed and epoch, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in run.rows():
        row = {"loss": "xent" if row["arm"] in UNTAUGHT else "ts", **row}
        row |= {column: str(row[column]) for column in ("student", "arm", "loss")}  # a name may be a number
        groups.setdefault((row["student"], row["arm"], row["loss"]), []).append(row)
    for name, group in groups.items():
        whole = len(group) == config.seeds * config.epochs
        wanted = itertools.product(range(config.seeds), range(1, config.epochs + 1)) if whole else ()
        if [(row["seed"], row["epoch"]) for row in group] != list(wanted):
            raise ValueError(f"{', '.join(name)} has no row for each of {config.epochs} epochs of {config.seeds} seeds")
    if not groups:
        raise ValueError("there are no rows")
    return list(groups.values())


def _result(group: list[Row], config: Config, summary: Summary) -> Result:
    student, arm, loss = (group[0][column] for column in ("student", "arm", "loss"))
    by_seed = [group[i : i + config.epochs] for i in range(0, len(group), config.epochs)]
    tested = [[_fraction(row["test_accuracy"]) for row in rows] for rows in by_seed]
    accuracy = {"last": Sample(tuple(t[-1] for t in tested)), "best": Sample(tuple(map(max, tested)))}
    if "val_accuracy" in group[0]:
        validated = [[_fraction(row["val_accuracy"]) for row in rows] for rows in by_seed]
        accuracy["chosen"] = Sample(tuple(t[v.index(max(v))] for t, v in zip(tested, validated, strict=True)))
    curve = tuple(Sample(epoch) for epoch in zip(*tested, strict=True))
    seconds = statistics.median(_number(row["seconds_training"]) + _number(row["seconds_testing"]) for row in group)
    of_paper = summary.paper.accuracy.get(student, {}) if summary.paper and (arm in UNTAUGHT or loss == "ts") else {}
    return Result(student, arm, loss, accuracy, curve, seconds, summary.parameters[student], of_paper.get(arm))


def _ratios(groups: list[list[Row]], results: list[Result], config: Config) -> list[str]:
    first = [_mean_row(group, result.name) for group, result in zip(groups, results, strict=True) if result.taught]
    return list(loss_ratios(first, hint=config.mse_weight != "auto"))


def _mean_row(group: list[Row], name: str) -> Row:
    """The first epoch's row of a result, its numbers the mean over the seeds."""
    first = [row for row in group if row["epoch"] == 1]
    numbers = [column for column in first[0] if all(isinstance(row[column], int | float) for row in first)]
    means = {column: statistics.fmean(row[column] for row in first) for column in numbers}
    return {**means, "student": first[0]["student"], "arm": name, "epoch": 1}


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _fraction(value: Any) -> float:
    if not 0 <= _number(value) <= 1:
        raise ValueError(f"{value!r} is not an accuracy")
    return float(value)
