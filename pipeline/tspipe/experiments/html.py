"""HTML pages that load nothing: style, figures and text are inside, and there are no scripts.

The template escapes all text of a run folder; figures are SVG by matplotlib, which escapes text itself.
"""

import re
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import JsonValue

from tspipe.experiments import tables
from tspipe.experiments.figures import GROUND, INK, Drawing
from tspipe.experiments.results import Compared, Findings
from tspipe.utils.console import printable


def page(
    reports: Sequence[tuple[Findings, list[Drawing]]],
    across_runs: Sequence[tuple[Sequence[Compared], Drawing]] = (),
) -> str:
    """Return the HTML of these findings and figures; the same input gives the same text."""
    runs = [
        (findings, [(svg(drawing, number), drawing.caption) for drawing in drawings])
        for number, (findings, drawings) in enumerate(reports, 1)
    ]
    across = [
        (tables.across_runs(compared), svg(drawing, number), drawing.caption)
        for number, (compared, drawing) in enumerate(across_runs, 1)
    ]
    return render("report.html.jinja", runs=runs, across_runs=across, tables=tables, flatten=_flatten)


def render(template: str, **fields: Any) -> str:
    """Return the HTML that a template of this package makes of these fields, whose text is escaped."""
    environment = Environment(
        loader=PackageLoader("tspipe", "experiments"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["printable"] = printable
    style = Markup((resources.files("tspipe.experiments") / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **fields)


def svg(drawing: Drawing, number: int) -> Markup:
    """Return a figure in the page's colours; its ids are made unique in the page."""
    text = drawing.svg[drawing.svg.index("<svg") :]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{drawing.name}-{number}-", text)
    text = text.replace(INK, "currentColor").replace(GROUND, "var(--ground)")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(printable(drawing.words))}"', 1))


def _flatten(value: JsonValue, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the fields of a JSON object with dotted names, each with its value as text."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}.{key}" if name else key)
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else "" if value == {} else str(value)
