"""Results as tables of text and as sentences, for the terminal and for HTML. Names from files are not escaped."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tspipe.cache.layout import FROM_PHOTOS
from tspipe.experiments.results import Compared, Findings, Result
from tspipe.experiments.statistics import Sample
from tspipe.training.arms import ALONE_RANDOM, RANDOM
from tspipe.utils.console import format_bytes, format_count

ACROSS_RUNS = (
    "Test accuracy in % after the last epoch, and the difference from the student alone in points, with the 95 % "
    "interval of the paired seeds. An interval without zero shows a difference."
)
UNTRIED = "Not in these runs, and the most helpful on CIFAR-10 (docs/results.md):"
UNCHECKED = "The images were not compared with those of the cache (--trust-data)."


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first `names` columns are names, the others numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    names: int = 2


def accuracies(findings: Findings, *, narrow: bool = False) -> Table:
    """Return test accuracies in percent, mean ± sample deviation over the seeds, after the teacher's.

    Parameters are those in training and, after an arrow, those deployed. If `narrow`, for 80 columns, they have three
    digits, and make room for the epoch chosen by held-back images, as the times do.
    """
    teacher = findings.summary.teacher
    count = format_count if narrow and findings.summary.deployed_parameters else "{:,}".format
    parameters = "" if teacher.parameters is None else count(teacher.parameters)
    empty = [""] * (len(findings.choices) - 1)
    rows = [[teacher.network, "teacher", f"{100 * teacher.test_accuracy:.2f}", *empty, parameters, ""]]
    for result in findings.results:
        samples = [percent(result.accuracy[choice]) for choice in findings.choices]
        parameters = " → ".join(map(count, (result.parameters, *([result.deployed] if result.deployed else []))))
        mark = " *" if result.student in findings.summary.initial else ""
        rows.append([result.student + mark, result.name, *samples, parameters, _pace(findings, result)])
    headings = ["network", "arm", *findings.choices, "parameters", "s/epoch"]
    end = -2 if narrow and "chosen" in findings.choices else len(headings)
    return Table(f"{findings.summary.dataset}: {findings.duration}", headings[:end], [row[:end] for row in rows])


def teacher_cost(findings: Findings) -> str:
    """Say what the teacher costs: the cache, and passes in training; nothing of a run that does not state it."""
    if not (cost := findings.summary.cost):
        return ""
    least = "at least " if findings.run.config.get("random_balanced") else ""
    live = f"{least}{cost.epoch_passes:,} an epoch, which take {findings.teacher_seconds:.3g} s"
    return (
        f"The teacher's cost: a cache of {format_bytes(cost.cache_bytes)}, made once with {least}"
        f"{cost.cached_passes:,} passes of an image; {live if cost.epoch_passes else 'none'} in training."
    )


def initial_weights(findings: Findings) -> list[str]:
    """Return a sentence per student that starts from other weights than random ones."""
    initial = findings.summary.initial.items()
    return [f"* {student} starts from {start.name} (SHA-256 {start.sha256[:12]})." for student, start in initial]


def differences(findings: Findings) -> Table:
    """Return each comparison in points, with its 95 % interval and the conclusion."""
    rows = [
        [c.result.student, c.result.name, c.base.name, *(verdict(c.difference(choice)) for choice in findings.choices)]
        for c in findings.comparisons
    ]
    return Table("Paired differences of test accuracy", ["network", "arm", "over", *findings.choices], rows, names=3)


def verdicts(findings: Findings, choice: str = "last") -> list[str]:
    """Return a sentence per taught arm: whether it differs from the student alone."""
    return [f"{c.result.student}, {c.name}: {verdict(c.difference(choice))}" for c in findings.comparisons]


def across_runs(compared: Sequence[Compared]) -> Table:
    """Return a student's accuracies in several runs and their differences from the student alone, the best first."""
    run, comparison = compared[0]
    ranked = sorted(compared, key=lambda pair: -pair[1].result.accuracy["last"].mean)
    rows = []
    for findings, c in ranked:
        difference = "" if c.result is c.base else interval(c.difference("last"))
        last = percent(c.result.accuracy["last"])
        rows.append([findings.name, c.result.name, last, difference, _pace(findings, c.result)])
    return Table(f"{comparison.result.student}: {run.duration}", ["run", "arm", "last", "over alone", "s/epoch"], rows)


def _pace(findings: Findings, result: Result) -> str:
    """Return the seconds of an epoch of training and testing; a single epoch includes the warm-up."""
    seconds = f"{result.seconds:.2f}" if result.seconds < 10 else f"{result.seconds:.0f}"
    return f"≤ {seconds}" if findings.config.epochs == findings.config.seeds == 1 else seconds


def beside_paper(findings: Findings) -> Table:
    """Return best test accuracies and differences beside the paper's, then other systems; no rows without a paper."""
    paper = findings.summary.paper
    differences = {
        id(c.result): [points(c.difference("best").mean), points(c.paper), c.sign]
        for c in findings.comparisons
        if c.paper is not None
    }
    rows = [
        [r.student, r.name, percent(r.accuracy["best"]), f"{100 * r.paper:.2f}", *differences.get(id(r), [""] * 3)]
        for r in findings.results
        if r.paper is not None
    ]
    others = paper.others if paper else {}
    rows += [[name, "", "", f"{100 * value:.2f}", "", "", ""] for name, value in others.items()]
    headings = ["network", "arm", "best", "in paper", "difference", "in paper", "sign"]
    return Table(f"Beside the paper's {paper.title}" if paper else "", headings, rows)


def paper_notes(findings: Findings) -> Iterator[str]:
    """Yield where the paper's numbers come from, how to read them, and how the run differs."""
    if paper := findings.summary.paper:
        yield (
            f"{paper.source}. The paper reports the best test accuracy of all epochs, so this table does too. The sign "
            "of a difference is unclear if our 95 % interval contains zero, or there are fewer than three seeds."
        )
        if paper.differs:
            yield f"Differences from the paper: {'; '.join(paper.differs)}."


def untried(runs: Sequence[Findings]) -> list[str]:
    """Return what helped most in docs/results.md and is in none of the runs, as options of `tspipe student`."""
    results = [(run.config.random_kind, result) for run in runs for result in run.results]
    with_mixtures = {result.arm for kind, result in results if kind in FROM_PHOTOS}
    advice = [
        ("srrl" in {result.loss for _, result in results}, "--loss srrl: the teacher's classifier on the features"),
        (RANDOM in with_mixtures, "--random-images 128 --set random_kind=mixed: mixtures of training images"),
        (ALONE_RANDOM in with_mixtures, "--arms alone-random: the same mixtures without a teacher, to compare with"),
    ]
    return [sentence for is_tried, sentence in advice if not is_tried]


def verdict(difference: Sample) -> str:
    """Return a difference in points, its 95 % interval, and the conclusion."""
    if difference.margin is None:
        return f"{points(difference.mean)} ({difference.conclusion})"
    return f"{interval(difference)}, {difference.conclusion}"


def interval(difference: Sample) -> str:
    """Return a difference in points and, from three seeds on, its 95 % interval."""
    mean, margin = difference.mean, difference.margin
    return points(mean) + ("" if margin is None else f" ({points(mean - margin)} to {points(mean + margin)})")


def points(fraction: float) -> str:
    """Return a difference of fractions in points, with its sign."""
    return f"{100 * fraction:+.2f}"


def percent(sample: Sample) -> str:
    """Return a mean in percent, with the sample deviation if there is one."""
    deviation = "" if sample.deviation is None else f" ± {100 * sample.deviation:.2f}"
    return f"{100 * sample.mean:.2f}{deviation}"
