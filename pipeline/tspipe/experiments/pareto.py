"""The Pareto plot: test accuracy against a cost, with the models that no other one beats in both."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tspipe.utils.console import format_count, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS, GREY = ("#0072B2", "#B5659A", "#56B4E9", "#D55E00", "#009E73"), "#808080"
_LONGEST, _WIDTH = 50, 4.9  # characters of a name; inches


class Point(NamedTuple):
    """A model: its cost, on a logarithmic axis, and its test accuracy as a fraction."""

    name: str
    cost: float
    accuracy: float


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points than which no other is both cheaper and more accurate, by cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def pareto(figure: "Figure", points: Sequence[Point], cost: str, dataset: str) -> tuple[str, str]:
    """Draw the points, numbered in their order; return the caption and the text for screen readers.

    Args:
        cost: what the horizontal axis shows.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure.set_size_inches(_WIDTH, 3.2 + 0.17 * len(points))
    axes, best = figure.subplots(), front(points)
    axes.set_xscale("log")
    steps = [point.cost for point in best], [100 * point.accuracy for point in best]
    axes.plot(*steps, color=GREY, linewidth=1, linestyle="--", drawstyle="steps-post", zorder=1)
    for number, point in enumerate(points, 1):
        place, colour = (point.cost, 100 * point.accuracy), COLOURS[(number - 1) % len(COLOURS)]
        filled = colour if point in best else "none"
        label = f"{number}  {printable(point.name, _LONGEST)}"
        axes.plot(*place, "o", color=colour, markerfacecolor=filled, markersize=7, label=label)
        axes.annotate(str(number), place, (5, 4 if number % 2 else -10), textcoords="offset points")
    axes.margins(0.12, 0.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: _label(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GREY, alpha=0.3, linewidth=0.5)
    axes.set(title=printable(dataset, _LONGEST), xlabel=cost, ylabel="test accuracy, %")
    figure.legend(loc="outside lower left")
    numbers = "; ".join(f"{i} {p.name}: {_label(p.cost)}, {100 * p.accuracy:.2f} %" for i, p in enumerate(points, 1))
    return (
        f"Test accuracy against {cost}. Filled: no other model is both cheaper and more accurate.",
        f"Points of {cost} and test accuracy: {numbers}.",
    )


def _label(value: float) -> str:
    """Format a number: 0.02, 5, 20k, 1M."""
    return format_count(round(value)) if value >= 1000 else f"{value:.3g}"
