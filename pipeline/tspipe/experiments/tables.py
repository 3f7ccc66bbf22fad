"""Results as tables of text and as sentences, the same for the terminal and for HTML; foreign names as they are."""

from collections.abc import Iterator
from dataclasses import dataclass

from tspipe.experiments.results import Comparison, Findings
from tspipe.experiments.statistics import Sample

UNCHECKED = "The images were not compared with those of the cache (--trust-data)."


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first `names` columns name things, the others are numbers or what they say."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    names: int = 2


def accuracies(found: Findings, *, brief: bool = False) -> Table:
    """Test accuracies in percent, mean ± sample deviation over the seeds, below the teacher's.

    A `brief` one has neither parameters nor times.
    """
    teacher = found.summary.teacher
    nothing = [""] * (len(found.choices) - 1)
    parameters = "" if teacher.parameters is None else f"{teacher.parameters:,}"
    rows = [[teacher.network, "teacher", f"{100 * teacher.test_accuracy:.2f}", *nothing, parameters, ""]]
    for result in found.results:
        samples = [percent(sample) for sample in result.accuracy.values()]
        pace = f"{result.seconds:.2f}" if result.seconds < 10 else f"{result.seconds:.0f}"
        rows.append([result.student, result.name, *samples, f"{result.parameters:,}", pace])
    headings = ["network", "arm", *found.choices, "parameters", "s/epoch"]
    shown = -2 if brief else len(headings)
    return Table(f"{found.summary.dataset}: {found.duration}", headings[:shown], [row[:shown] for row in rows])


def differences(found: Findings) -> Table:
    """What each comparison comes to, in points, with its 95 % interval and what that allows to say."""
    rows = [
        [c.result.student, c.result.name, c.base.name, *(verdict(c.difference(choice)) for choice in found.choices)]
        for c in found.comparisons
    ]
    return Table("Paired differences of test accuracy", ["network", "arm", "over", *found.choices], rows, names=3)


def verdicts(found: Findings, choice: str = "last") -> list[str]:
    """For each taught arm, in one sentence, whether it differs from the student alone."""
    return [f"{c.result.student}, {c.name}: {verdict(c.difference(choice))}" for c in found.comparisons]


def beside_paper(found: Findings) -> Table:
    """Best test accuracies and differences beside the paper's, then the others it names; no rows without a paper."""
    paper = found.summary.paper
    differences = {id(c.result): c for c in found.comparisons if c.paper is not None}
    rows = [
        [r.student, r.name, percent(r.accuracy["best"]), f"{100 * r.paper:.2f}", *_signs(differences.get(id(r)))]
        for r in found.results
        if r.paper is not None
    ]
    others = paper.others if paper else {}
    rows += [[name, "", "", f"{100 * value:.2f}", "", "", ""] for name, value in others.items()]
    headings = ["network", "arm", "best", "paper", "difference", "paper's", "in sign"]
    return Table(f"Beside the paper's {paper.title}" if paper else "", headings, rows)


def paper_notes(found: Findings) -> Iterator[str]:
    """Where the paper's numbers are from, how to read them, and what is not as there."""
    if paper := found.summary.paper:
        yield (
            f"{paper.source}. It gives the best test accuracy of any epoch, so ours beside it is the best, too. "
            "Not shown: our interval holds zero, or there is one seed."
        )
        if paper.differs:
            yield f"Not as in the paper: {'; '.join(paper.differs)}."


def verdict(difference: Sample) -> str:
    """A difference in points, its 95 % interval, and what that allows to say."""
    mean, margin = difference.mean, difference.margin
    if margin is None:
        return f"{points(mean)} ({difference.conclusion})"
    return f"{points(mean)} ({points(mean - margin)} to {points(mean + margin)}), {difference.conclusion}"


def points(fraction: float) -> str:
    """A difference of fractions in points, with its sign."""
    return f"{100 * fraction:+.2f}"


def percent(sample: Sample) -> str:
    """A mean in percent, and the sample deviation, if there is one."""
    deviation = "" if sample.deviation is None else f" ± {100 * sample.deviation:.2f}"
    return f"{100 * sample.mean:.2f}{deviation}"


def _signs(comparison: Comparison | None) -> list[str]:
    if comparison is None or comparison.paper is None:
        return ["", "", ""]
    return [points(comparison.difference("best").mean), points(comparison.paper), comparison.agreement]
