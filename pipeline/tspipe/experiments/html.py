"""A report as one HTML page that loads nothing: style, figures and text are inside, and there are no scripts.

The template escapes all text of a run folder; figures are SVG by matplotlib, which escapes text itself.
"""

import re
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tspipe.experiments import tables
from tspipe.experiments.figures import GROUND, INK, Drawing
from tspipe.experiments.results import Findings
from tspipe.utils.console import printable

_MAX_LABELS = 20  # classes in the histogram of random images
_CHOICES = {
    "last": "last: after the last epoch.",
    "best": "best †: the highest of all epochs, selected by the test set itself, as in the paper; it is optimistic.",
    "chosen": "chosen: at the epoch selected by held-back training images; the test set is not involved.",
}


def page(reports: Sequence[tuple[Findings, list[Drawing]]]) -> str:
    """Return the HTML of these findings and figures; the same input gives the same text."""
    environment = Environment(
        loader=PackageLoader("tspipe", "experiments"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    runs = [_run(findings, drawings, i) for i, (findings, drawings) in enumerate(reports, 1)]
    title = runs[0]["title"] if len(runs) == 1 else f"{len(runs)} runs"
    style = Markup((resources.files("tspipe.experiments") / "report.css").read_text())
    return environment.get_template("report.html.jinja").render(title=title, runs=runs, style=style)


def _run(findings: Findings, drawings: list[Drawing], number: int) -> dict[str, Any]:
    """Return what the template shows of a run."""
    choice = "chosen" if "chosen" in findings.choices else "last"
    total = sum(findings.random_labels.values())
    weight = findings.summary.mse_weight
    return {
        "title": f"{', '.join(findings.students)} taught by {findings.summary.teacher.network} "
        f"on {findings.summary.dataset}",
        "duration": findings.duration,
        "name": findings.name,
        "choice": choice,
        "verdicts": tables.verdicts(findings, choice),
        "accuracies": _marked(tables.accuracies(findings)),
        "choices": [text for name, text in _CHOICES.items() if name in findings.choices],
        "unchecked": tables.UNCHECKED if findings.config.trust_data else "",
        "differences": _marked(tables.differences(findings)),
        "beside_paper": _marked(tables.beside_paper(findings)),
        "paper_notes": list(tables.paper_notes(findings)),
        "figures": [(_svg(drawing, number), drawing.caption) for drawing in drawings],
        "teacher": findings.summary.teacher,
        "labels": [(name, n, n / total) for name, n in list(findings.random_labels.items())[:_MAX_LABELS]],
        "more_labels": max(0, len(findings.random_labels) - _MAX_LABELS),
        "ratios": findings.ratios + ([] if weight is None else [f"mse_weight=auto is {weight:.4g}"]),
        "recipe": list(_flatten(findings.run.config)),
        "environment": list(_flatten(findings.run.environment)),
        "cache": findings.config.cache,
    }


def _marked(table: tables.Table) -> tables.Table:
    """Return the table with a mark on the numbers that the test set selected."""
    columns = [i for i, heading in enumerate(table.headings) if heading == "best"]
    mark = [" †" if i in columns else "" for i in range(len(table.headings))]
    rows = [[text + (mark[i] if text else "") for i, text in enumerate(row)] for row in table.rows]
    headings = [heading + mark[i] for i, heading in enumerate(table.headings)]
    return tables.Table(table.title, headings, rows, table.names)


def _svg(drawing: Drawing, number: int) -> Markup:
    """Return a figure in the page's colours; its ids are made unique in the page."""
    svg = drawing.svg[drawing.svg.index("<svg") :]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{drawing.name}-{number}-", svg)
    svg = svg.replace(INK, "currentColor").replace(GROUND, "var(--ground)")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(printable(drawing.words))}"', 1))


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the fields of a JSON object with dotted names, each with its value as text."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else "" if value == {} else str(value)
