"""Reads finished runs: results per student, arm and loss, paired over the seeds, with the paper's numbers."""

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
from tspipe.utils.console import pluralize

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """The results of one student in one arm with one loss, over the seeds.

    Attributes:
        accuracy: test accuracies as fractions: `last`, after the last epoch; `best`, the highest of any epoch, so
            selected by the test set; with held-back images `chosen`, after the epoch that they selected.
        curve: the test accuracy after each epoch.
        seconds: median per epoch, of training and testing.
        parameters: number of the student's weights.
        paper: the accuracy that the paper reports, as a fraction, or None.
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
    def agreement(self) -> str:
        """Whether our difference at the best epoch has the sign of the paper's, if it is significant."""
        sign = {HELPS: 1, HURTS: -1}.get(self.difference("best").conclusion, 0)
        if self.paper is None or not sign:
            return "not shown"
        return "agrees" if sign * self.paper > 0 else "disagrees"


class Teacher(BaseModel):
    """The teacher in summary.json."""

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
    """The fields of config.json that a report uses."""

    seeds: int = Field(ge=1)
    epochs: int = Field(ge=1)
    cache: str = ""
    mse_weight: float | str = 1.0
    trust_data: bool = False


@dataclass(frozen=True)
class Findings:
    """A finished run: its config, its summary, and its results in the order of its rows."""

    run: RunFolder
    config: Config
    summary: Summary
    results: list[Result]
    ratios: list[str]  # a sentence per taught result: its loss terms in the first epoch
    random_labels: dict[str, int]

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.run.path.resolve().name

    @property
    def choices(self) -> list[str]:
        """The epochs that accuracies refer to: last, best and, with held-back images, chosen."""
        return list(self.results[0].accuracy)

    @property
    def students(self) -> list[str]:
        """The students, without duplicates."""
        return list(dict.fromkeys(result.student for result in self.results))

    @property
    def duration(self) -> str:
        """The length of the run: `45 epochs, 5 seeds`."""
        return f"{pluralize(self.config.epochs, 'epoch')}, {pluralize(self.config.seeds, 'seed')}"

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """All results compared with the student alone, and taught ones also with it on its own schedule."""
        bases = {(result.student, result.arm): result for result in self.results if not result.taught}
        pairs = [(r, bases.get((r.student, base))) for r in self.results for base in UNTAUGHT]
        return [Comparison(r, base) for r, base in pairs if base and (r.taught or (r.arm, base.arm) == (OWN, ALONE))]


def open_run(path: Path) -> RunFolder:
    """Open the run folder at a path. Raises ReportError if there is none or it is not finished."""
    if not (path / "config.json").is_file():
        raise ReportError(
            f"{path} is not a run folder: it has no config.json. Give a folder that tspipe student wrote, in runs/."
        )
    run = RunFolder(path, *_reading(path / "config.json", lambda: _config(path)))
    if not run.finished:
        raise ReportError(f"The run in {path} is not finished. Run its command again to resume it.")
    return run


def read(run: RunFolder) -> Findings:
    """Read a finished run. Raises ReportError, naming the file, if a file is not as stage two writes it."""
    path = run.path
    config = _reading(path / "config.json", lambda: Config.model_validate(run.config))
    summary = _reading(path / "summary.json", lambda: Summary.model_validate(run.read_json("summary.json")))
    labels = _reading(path / "random_labels.json", lambda: _labels(run))
    groups = _reading(path / "metrics.csv", lambda: _groups(run, config))
    results = _reading(path / "metrics.csv", lambda: [_result(group, config, summary) for group in groups])
    ratios = _reading(path / "metrics.csv", lambda: _ratios(groups, results, config))
    return Findings(run, config, summary, results, ratios, labels)


def _reading(file: Path, make: Callable[[], T]) -> T:
    """Return what `make` returns, or raise a ReportError that names the file."""
    try:
        return make()
    except ValidationError as problem:
        first = problem.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]}"
    except KeyError as problem:
        reason = f"{problem.args[0]!r} is missing"
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError, csv.Error) as problem:
        reason = str(problem)
    raise ReportError(f"{file} is not as tspipe student writes it: {reason}. Train the run again with another --out.")


def _config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    content = RunFolder(path, {}, {}).read_json("config.json")
    config, environment = content["config"], content["environment"]
    if not isinstance(config, dict) or not isinstance(environment, dict):
        raise ValueError("config and environment are not objects")
    return config, environment


def _labels(run: RunFolder) -> dict[str, int]:
    """Return how many random images the teacher labels as each class; empty without random images."""
    if not (run.path / "random_labels.json").exists():
        return {}
    counts = {str(name): int(count) for name, count in run.read_json("random_labels.json").items()}
    if min(counts.values(), default=0) < 1:
        raise ValueError("a class has a count below 1")
    return counts


def _groups(run: RunFolder, config: Config) -> list[list[Row]]:
    """Return the rows of each student, arm and loss, by seed and epoch, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in run.rows():
        row = {"loss": "xent" if row["arm"] in UNTAUGHT else "ts", **row}
        row |= {column: str(row[column]) for column in ("student", "arm", "loss")}  # a name may be a number
        groups.setdefault((row["student"], row["arm"], row["loss"]), []).append(row)
    for name, group in groups.items():
        whole = len(group) == config.seeds * config.epochs
        expected = itertools.product(range(config.seeds), range(1, config.epochs + 1)) if whole else ()
        if [(row["seed"], row["epoch"]) for row in group] != list(expected):
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
    """Return a result's first epoch as a row of means over the seeds."""
    first = [row for row in group if row["epoch"] == 1]
    numbers = [column for column in first[0] if all(isinstance(row[column], int | float) for row in first)]
    means = {column: statistics.fmean(row[column] for row in first) for column in numbers}
    return {**means, "student": first[0]["student"], "arm": name, "epoch": 1}


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _fraction(value: Any) -> float:
    if not 0 <= _number(value) <= 1:
        raise ValueError(f"{value!r} is not an accuracy")
    return float(value)
