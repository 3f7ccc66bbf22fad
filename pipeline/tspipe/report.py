"""From run folders to tables and figures."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from tspipe.run_folder import RunFolder
from tspipe.show import console, plain, shares

# 97.5 % quantiles of Student's t for 1, 2, … 30 degrees of freedom; beyond, the normal's with its first correction.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One number per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Their sample standard deviation; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def margin(self) -> float | None:
        """Half the width of the mean's 95 % interval by Student's t; None of a single one."""
        if self.deviation is None:
            return None
        freedom = len(self.values) - 1
        t = _T[freedom - 1] if freedom <= len(_T) else 1.960 + 2.37 / freedom
        return t * self.deviation / math.sqrt(len(self.values))

    def __sub__(self, other: "Sample") -> "Sample":
        """The differences, seed by seed."""
        return Sample(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


@dataclass(frozen=True)
class Result:
    """What came of one student in one arm, over the seeds."""

    student: str
    arm: str
    last: Sample  # test accuracy after the last epoch
    best: Sample  # the highest test accuracy of any epoch, chosen by the test set
    seconds: float  # per epoch, of its own training and testing: the median


def results(run: RunFolder) -> list[Result]:
    """A result per student and arm, in the order of the config."""
    rows = run.rows()
    found = []
    for student in run.config["students"]:
        for arm in run.config["arms"]:
            mine = [row for row in rows if (row["student"], row["arm"]) == (student, arm)]
            by_seed = [[row for row in mine if row["seed"] == seed] for seed in range(run.config["seeds"])]
            last = Sample(tuple(epochs[-1]["test_accuracy"] for epochs in by_seed))
            best = Sample(tuple(max(row["test_accuracy"] for row in epochs) for epochs in by_seed))
            seconds = statistics.median(row["seconds_training"] + row["seconds_testing"] for row in mine)
            found.append(Result(student, arm, last, best, seconds))
    return found


def table(run: RunFolder) -> Table:
    """Last and best test accuracy in percent, mean ± standard deviation over the seeds, beside the teacher's."""
    summary, seeds = run.read_json("summary.json"), run.config["seeds"]
    teacher = summary["teacher"]
    epochs = run.config["epochs"]
    title = f"{summary['dataset']}: {epochs} epoch{'s' * (epochs > 1)}, {seeds} seed{'s' * (seeds > 1)}"
    shown = Table("network", "arm", title=Text(title), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("last", "best", "parameters", "s/epoch"):
        shown.add_column(heading, justify="right", no_wrap=True)
    accuracy = f"{100 * teacher['test_accuracy']:.2f}"
    parameters = "" if teacher["parameters"] is None else f"{teacher['parameters']:,}"
    shown.add_row(Text(plain(teacher["network"])), "teacher", accuracy, "", parameters, "", end_section=True)
    for found in results(run):
        parameters = f"{summary['parameters'][found.student]:,}"
        seconds = f"{found.seconds:.2f}" if found.seconds < 10 else f"{found.seconds:.0f}"
        shown.add_row(
            Text(plain(found.student)), found.arm, _percent(found.last), _percent(found.best), parameters, seconds
        )
    return shown


def verdicts(run: RunFolder) -> list[str]:
    """For each taught arm, in one sentence, whether it differs from the student alone."""
    found = results(run)
    alone = {result.student: result for result in found if result.arm == "alone"}
    return [
        f"{result.student}, {result.arm}: {_verdict(result.last - alone[result.student].last)}"
        for result in found
        if result.arm != "alone" and result.student in alone
    ]


def show(run: RunFolder) -> None:
    """Print a finished run: its table, what the arms make of it, the random images' labels, and where the rest is."""
    out = console()
    out.print(table(run))
    out.print("Test accuracy in %, mean ± sample deviation; best is chosen by the test set.")
    if found := verdicts(run):
        out.print("Over the student alone, in points, with the 95 % interval of the paired seeds:")
    for sentence in found:
        out.print(Text(f"  {sentence}"))
    if (run.path / "random_labels.json").exists():
        out.print(Text(shares(run.read_json("random_labels.json"))))
    if run.config.get("trust_data"):
        out.print("The images were not compared with those of the cache (--trust-data).")
    curves = draw_curves(run)
    missing = "no curves: pip install 'tspipe[plots]'"
    out.print(Text(f"Run folder: {run.path} ({'metrics.csv, curves.png, students' if curves else missing})"))


def _verdict(difference: Sample) -> str:
    points = f"{100 * difference.mean:+.2f}"
    if difference.margin is None:
        return f"{points} (one seed: no interval, so no conclusion)"
    low, high = 100 * (difference.mean - difference.margin), 100 * (difference.mean + difference.margin)
    conclusion = "it helps" if low > 0 else "it hurts" if high < 0 else "no difference shown"
    return f"{points} ({low:+.2f} to {high:+.2f}), {conclusion}"


def _percent(sample: Sample) -> str:
    if sample.deviation is None:
        return f"{100 * sample.mean:.2f}"
    return f"{100 * sample.mean:.2f} ± {100 * sample.deviation:.2f}"


def draw_curves(run: RunFolder) -> Path | None:
    """Test accuracy over epochs, a panel per student, as `curves.png` in the run folder; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows, students, summary = run.rows(), list(run.config["students"]), run.read_json("summary.json")
    figure = Figure(figsize=(6 * len(students), 4), layout="constrained")
    axes = figure.subplots(1, len(students), squeeze=False)[0]
    epochs = range(1, run.config["epochs"] + 1)
    for axis, student in zip(axes, students, strict=True):
        for arm in run.config["arms"]:
            mine = [row for row in rows if (row["student"], row["arm"]) == (student, arm)]
            samples = [Sample(tuple(100 * row["test_accuracy"] for row in mine if row["epoch"] == e)) for e in epochs]
            means, spread = [s.mean for s in samples], [s.deviation or 0 for s in samples]
            (line,) = axis.plot(epochs, means, label=arm)
            low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
            axis.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.axhline(100 * summary["teacher"]["test_accuracy"], color="grey", linestyle=":", label="teacher")
        axis.set(title=f"{student} on {summary['dataset']}", xlabel="epoch", ylabel="test accuracy, %")
        axis.legend(loc="lower right")
        axis.grid(alpha=0.3)
    path = run.path / "curves.png"
    figure.savefig(path, dpi=150)
    return path
