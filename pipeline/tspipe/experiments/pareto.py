"""The Pareto plot: test accuracy against a cost, with the models that no other one beats in both."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tspipe.utils.console import format_count, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS, GREY = ("#0072B2", "#B5659A", "#56B4E9", "#D55E00", "#009E73"), "#808080"
_LONGEST, _WIDTH = 50, 4.9  # characters of a name; inches
_OVERLAP, _MOST_TICKS = 12, 8  # pixels; on the horizontal axis


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


def close_groups(places: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Return the indices of places in pixels, those together whose labels would overlap."""
    groups: list[list[int]] = []
    for index, place in enumerate(places):
        near = (group for group in groups if math.dist(place, places[group[0]]) < _OVERLAP)
        if group := next(near, None):
            group.append(index)
        else:
            groups.append([index])
    return groups


def pareto(figure: "Figure", points: Sequence[Point], cost: str, dataset: str) -> tuple[str, str]:
    """Draw the points, numbered in their order; return the caption and the text for screen readers.

    Args:
        cost: what the horizontal axis shows.
    """
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
    axes.margins(0.12, 0.15)
    axes.autoscale_view()
    pixels = axes.transData.transform([(point.cost, 100 * point.accuracy) for point in points])
    for number, group in enumerate(close_groups(pixels.tolist())):
        first = points[group[0]]
        text = ", ".join(str(i + 1) for i in group)
        place, offset = (first.cost, 100 * first.accuracy), (5, -10 if number % 2 else 4)
        axes.annotate(text, place, offset, textcoords="offset points")
    axes.minorticks_off()
    axes.set_xticks(values := ticks(*axes.get_xlim()), [_label(value) for value in values])
    axes.grid(color=GREY, alpha=0.3, linewidth=0.5)
    axes.set(title=printable(dataset, _LONGEST), xlabel=cost, ylabel="test accuracy, %")
    figure.legend(loc="outside lower left")
    numbers = "; ".join(f"{i} {p.name}: {_label(p.cost)}, {100 * p.accuracy:.2f} %" for i, p in enumerate(points, 1))
    return (
        f"Test accuracy against {cost}. Filled: no other model is both cheaper and more accurate.",
        f"Points of {cost} and test accuracy: {numbers}.",
    )


def ticks(low: float, high: float) -> list[float]:
    """Return the round values of a logarithmic axis, as many as there is room for."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        values = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(values) <= _MOST_TICKS:
            break
    if len(values) > 1:
        return values
    return [float(value) for value in MaxNLocator(4).tick_values(low, high) if low <= value <= high]


def _label(value: float) -> str:
    """Format a number: 0.02, 5, 20k, 1M."""
    return format_count(round(value)) if value >= 1000 else f"{value:.3g}"
