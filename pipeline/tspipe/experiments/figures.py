"""The figures of a run: accuracy, increase over the student alone, curves over epochs, accuracy against parameters.

INK and GROUND are used for nothing else, so that a page can replace them with its own colours. The other colours are
from Okabe and Ito (Color Universal Design, 2008), with a contrast of at least 3 on white and on black.
"""

import io
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tspipe.errors import ReportError
from tspipe.experiments.pareto import COLOURS, GREY, Point, pareto
from tspipe.experiments.results import Compared, Findings, Result
from tspipe.experiments.tables import percent, points, verdict
from tspipe.training.arms import ALONE, ARMS
from tspipe.training.run_folder import Row
from tspipe.utils.console import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GROUND = "#1c1c1e", "#fffffe"
_COLOURS = defaultdict(lambda: GREY, zip(ARMS, COLOURS, strict=True))
_HATCHES, _DASHES = ("", "///", "...", "xxx"), ("-", "--", ":", "-.")  # of one arm's losses
_MARKERS = ("o", "s", "^", "v")
_SEED: dict[str, Any] = {"marker": ".", "color": GREY, "markersize": 4, "linestyle": ""}
_PAPER: dict[str, Any] = {"marker": "D", "color": INK, "markerfacecolor": "none", "markersize": 6, "linestyle": ""}
_WIDTH, _LONGEST = 4.9, 40  # inches, so that on a phone its 9 points are 9 pixels; characters of a name
_STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "figure.facecolor": GROUND,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "tspipe",
    "text.parse_math": False,  # a dollar sign in a name is not a formula
}


@dataclass(frozen=True)
class Drawing:
    """A figure as SVG, as PNG, and as text for screen readers."""

    name: str
    caption: str
    words: str
    svg: str
    png: bytes


def names(findings: Findings) -> list[str]:
    """Return the names of a run's figures; `increase` needs a student alone."""
    return [name for name in _FIGURES if name != "increase" or findings.comparisons]


def check() -> None:
    """Raise ReportError if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ReportError("The figures of a report need matplotlib: pip install 'tspipe[plots]'") from None


def draw(findings: Findings, name: str) -> Drawing:
    """Draw one of `names`; the same run gives the same bytes. Raises ReportError without matplotlib."""
    return render(name, lambda figure: _FIGURES[name](figure, findings))


def draw_across_runs(compared: Sequence[Compared]) -> Drawing:
    """Draw what each arm of several runs adds to the same student alone. Raises ReportError without matplotlib."""
    by_run: dict[str, list[Compared]] = {}
    for run, comparison in compared:
        if comparison.result is not comparison.base:
            by_run.setdefault(run.name, []).append((run, comparison))
    return render("across-runs", lambda figure: _differences(figure, by_run))


def draw_teacher(metrics: Sequence[Row], network: str, dataset: str) -> Drawing:
    """Draw a teacher's accuracy over the epochs of its training. Raises ReportError without matplotlib."""

    def plot(figure: "Figure") -> tuple[str, str]:
        figure.set_size_inches(_WIDTH, 3.1)
        axes, epochs, ends = figure.subplots(), [row["epoch"] for row in metrics], []
        for split, colour in (("train", GREY), ("test", _COLOURS[ALONE])):
            if values := [100 * row[f"{split}_accuracy"] for row in metrics if f"{split}_accuracy" in row]:
                axes.plot(epochs, values, color=colour, label=split, marker="o" if len(epochs) == 1 else "")
                ends.append(f"{split} {values[0]:.2f} to {values[-1]:.2f}")
        title = f"{printable(network, _LONGEST)} on {printable(dataset, _LONGEST)}"
        axes.set(title=title, xlabel="epoch", ylabel="accuracy, %")
        _over_epochs(axes)
        figure.legend(loc="outside lower center", ncols=2)
        return (
            "A teacher's accuracy over epochs, on the training images as they are augmented and on the test images.",
            f"Lines of accuracy from the first epoch to the last, in %: {'; '.join(ends)}.",
        )

    return render("curves", plot)


def render(name: str, plot: Callable[["Figure"], tuple[str, str]]) -> Drawing:
    """Return the figure that a function plots, which returns the caption and the words."""
    check()
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**matplotlib.rcParamsDefault, **_STYLE}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font lacks
        figure = Figure(layout="constrained")
        caption, words = plot(figure)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Drawing(name, caption, words, svg.getvalue().decode(), png.getvalue())


def _accuracy(figure: "Figure", findings: Findings) -> tuple[str, str]:
    """Bars, from 0 to 100 %."""
    teacher = findings.summary.teacher
    by_student = [[r for r in findings.results if r.student == student] for student in findings.students]
    groups = [(teacher.network, [("teacher", f"{100 * teacher.test_accuracy:.2f}")])]
    groups += [(rs[0].student, [(r.name, percent(r.accuracy["last"])) for r in rs]) for rs in by_student]
    axes, (top, *places) = _rows(figure, groups)
    axes.barh(top, 100 * teacher.test_accuracy, color=GREY, height=0.76)
    for y, result in zip(places, itertools.chain(*by_student), strict=True):
        last, hatch = result.accuracy["last"], _HATCHES[_loss(findings, result)]
        look: dict[str, Any] = {"color": _COLOURS[result.arm], "edgecolor": GROUND, "linewidth": 0, "hatch": hatch}
        axes.barh(
            y, 100 * last.mean, xerr=last.deviation and 100 * last.deviation, height=0.76, capsize=3, ecolor=INK, **look
        )
        axes.plot(100 * result.accuracy["best"].mean, y, "|", color=INK, markersize=12, markeredgewidth=1.6)
        if result.paper is not None:
            axes.plot(100 * result.paper, y, **_PAPER)
    axes.set(xlim=(0, 100), title=_title(findings), xlabel="test accuracy, %")
    entries: dict[str, dict[str, Any]] = {
        "last epoch, ± sample deviation": {"marker": "s", "color": GREY},
        "best epoch, selected by the test set": {"marker": "|", "color": INK, "markersize": 12},
    }
    _legend(figure, entries, paper=any(r.paper is not None for r in findings.results))
    numbers = "; ".join(f"{name}, {row} {value}" for name, rows in groups for row, value in rows)
    return (
        f"Test accuracy: bars are the mean after the last epoch, whiskers the sample deviation ({_n(findings)}); "
        "strokes are the best epoch, selected by the test set.",
        f"Bars of test accuracy after the last epoch, in %: {numbers}.",
    )


def _increase(figure: "Figure", findings: Findings) -> tuple[str, str]:
    """What each arm adds to the student alone; students sorted by their parameters."""
    by_heading: dict[str, list[Compared]] = {}
    for c in sorted(findings.comparisons, key=lambda c: (c.result.parameters, c.result.student, c.base.arm)):
        of_base = f"{c.result.parameters:,} parameters" if c.base.arm == ALONE else f"over {c.base.name}"
        by_heading.setdefault(f"{c.result.student}, {of_base}", []).append((findings, c))
    return _differences(figure, by_heading)


def _differences(figure: "Figure", by_heading: dict[str, list[Compared]]) -> tuple[str, str]:
    """Draw a row per comparison under its heading: each seed's difference, their mean and its interval."""
    groups = [
        (heading, [(c.result.name, points(c.difference("last").mean)) for _, c in compared])
        for heading, compared in by_heading.items()
    ]
    axes, places = _rows(figure, groups)
    axes.axvline(0, color=INK, linewidth=0.8)
    compared = list(itertools.chain(*by_heading.values()))
    for y, (findings, comparison) in zip(places, compared, strict=True):
        difference, result = comparison.difference("last"), comparison.result
        axes.plot([100 * value for value in difference.values], [y] * len(difference.values), **_SEED)
        look: dict[str, Any] = {"fmt": _MARKERS[_loss(findings, result)], "color": _COLOURS[result.arm], "capsize": 4}
        axes.errorbar(100 * difference.mean, y, xerr=difference.margin and 100 * difference.margin, **look)
        if comparison.paper is not None:
            axes.plot(100 * comparison.paper, y, **_PAPER)
    axes.set(title=_title(compared[0][0]), xlabel="over the student alone, points")
    entries = {"last epoch, with the 95 % interval": {"marker": "o", "color": INK}, "each seed": _SEED}
    _legend(figure, entries, paper=any(c.paper is not None for _, c in compared))
    n, rows = _n(compared[0][0]), [(heading, c) for heading, group in by_heading.items() for _, c in group]
    numbers = "; ".join(f"{heading}: {c.name} {verdict(c.difference('last'))}" for heading, c in rows)
    return (
        f"Increase over the student alone after the last epoch, in points, with the 95 % interval ({n}, paired). An "
        "interval with zero in it shows no difference.",
        f"Points over the student alone: {numbers}.",
    )


def _curves(figure: "Figure", findings: Findings) -> tuple[str, str]:
    """Test accuracy over epochs, a panel for each student."""
    students, epochs = findings.students, range(1, findings.config.epochs + 1)
    figure.set_size_inches(_WIDTH, 2.5 * len(students) + 0.6)
    panels = figure.subplots(len(students), sharex=True, squeeze=False)[:, 0]
    for axes, student in zip(panels, students, strict=True):
        for result in (r for r in findings.results if r.student == student):
            means = np.array([100 * sample.mean for sample in result.curve])
            spread = np.array([100 * (sample.deviation or 0) for sample in result.curve])
            style, colour = _DASHES[_loss(findings, result)], _COLOURS[result.arm]
            (line,) = axes.plot(epochs, means, style, color=colour, label=printable(result.name, _LONGEST))
            line.set_marker("o" if len(epochs) == 1 else "")
            axes.fill_between(epochs, means - spread, means + spread, color=colour, alpha=0.2, linewidth=0)
        axes.axhline(100 * findings.summary.teacher.test_accuracy, color=GREY, linestyle=(0, (1, 1)), label="teacher")
        axes.set(title=_title(findings, student), ylabel="test accuracy, %")
        _over_epochs(axes)
    panels[-1].set_xlabel("epoch")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=2)
    ends = "; ".join(f"{r.student}, {r.name} {percent(r.curve[0])} to {percent(r.curve[-1])}" for r in findings.results)
    return (
        f"Test accuracy over epochs: lines are means, bands the sample deviation ({_n(findings)}).",
        f"Lines of test accuracy from the first epoch to the last, in %: {ends}.",
    )


def _pareto(figure: "Figure", findings: Findings) -> tuple[str, str]:
    """Test accuracy against the number of parameters: a run does not measure latency, `tspipe eval` does."""
    teacher = findings.summary.teacher
    points = [
        Point(f"{r.student}, {r.name}", r.deployed or r.parameters, r.accuracy["last"].mean) for r in findings.results
    ]
    if teacher.parameters is not None:
        points.insert(0, Point(f"teacher {teacher.network}", teacher.parameters, teacher.test_accuracy))
    return pareto(figure, points, "parameters as exported", findings.summary.dataset)


_FIGURES: dict[str, Callable[["Figure", Findings], tuple[str, str]]] = {
    "accuracy": _accuracy,
    "increase": _increase,
    "curves": _curves,
    "pareto": _pareto,
}


def _over_epochs(axes: Any) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color=GREY, alpha=0.3, linewidth=0.5)


def _rows(figure: "Figure", groups: list[tuple[str, list[tuple[str, str]]]]) -> tuple["Axes", list[float]]:
    """Return axes with a row per (label, value) under its group's heading, and the rows' y positions.

    A row is one unit high, and lower rows have larger y.
    """
    from matplotlib.transforms import blended_transform_factory

    axes, places, labels = figure.subplots(), [], []
    y = 0.0
    at_left_edge = blended_transform_factory(figure.transFigure, axes.transData)
    for heading, rows in groups:
        box = {"facecolor": GROUND, "edgecolor": "none", "pad": 1}  # over the grid
        text = printable(heading, _LONGEST)
        axes.text(0.02, y, text, weight="bold", va="center", transform=at_left_edge, bbox=box).set_in_layout(False)
        for label, value in rows:
            y += 1
            places.append(y)
            labels.append(printable(label, _LONGEST))
            axes.text(1.03, y, value, va="center", transform=axes.get_yaxis_transform())
        y += 1.2
    figure.set_size_inches(_WIDTH, 0.24 * y + 1.1)
    axes.set_yticks(places, labels)
    axes.set_ylim(y - 0.7, -0.5)
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GREY, alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
    return axes, places


def _legend(figure: "Figure", entries: dict[str, dict[str, Any]], *, paper: bool) -> None:
    from matplotlib.lines import Line2D

    entries = {**entries, **({"the paper, best epoch": _PAPER} if paper else {})}
    handles = [Line2D([], [], label=text, **{**look, "linestyle": ""}) for text, look in entries.items()]
    figure.legend(handles=handles, loc="outside lower left")


def _title(findings: Findings, student: str = "") -> str:
    dataset = printable(findings.summary.dataset, _LONGEST)
    return f"{printable(student, _LONGEST)} on {dataset}" if student else f"{dataset}, {_n(findings)}"


def _n(findings: Findings) -> str:
    return "n = 1, so no deviation" if findings.config.seeds == 1 else f"n = {findings.config.seeds} seeds"


def _loss(findings: Findings, result: Result) -> int:
    """Return the index of a loss's style: 0 for the paper's loss and the student alone, then the others in turn."""
    others = list(dict.fromkeys(r.loss for r in findings.results if r.name != r.arm))
    return 1 + others.index(result.loss) % (len(_HATCHES) - 1) if result.loss in others else 0
