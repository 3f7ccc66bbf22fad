"""A report as one HTML file: its style, figures and words are in it, it has no scripts and asks for nothing.

Every text of a run folder is escaped; figures are the SVG that matplotlib wrote, which escapes for itself.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from tspipe.experiments import tables
from tspipe.experiments.figures import GROUND, INK, Drawing
from tspipe.experiments.results import Findings
from tspipe.utils.console import plain

_CITATION = (
    "N. Landro, I. Gallo and R. La Grassa. Can a powerful neural network be a teacher for a weaker neural network? "
    "arXiv:2005.00393, 2020."
)
_CHOICES = {
    "last": "last: after the last epoch, chosen by nobody.",
    "best": "best †: the highest of all epochs, chosen by the test set itself, as the paper does; it flatters.",
    "chosen": "chosen: at the epoch that images held back from training chose; the test set had no say.",
}
_GUARANTEES = (
    "Arms of one student and seed begin with the same weights and see the same batches, so they are compared in pairs. "
    "Seeds differ in these, in the random images and in the images held back, if any; the teacher, the data and the "
    "test images are the same for all.",
    "An interval is Student's, of the paired differences: in 95 of 100 such experiments it holds the true mean, if the "
    "differences are about normal. Each stands for itself: of twenty comparisons of equals one may seem to differ.",
    "No difference shown does not mean that there is none: more seeds make the interval narrower.",
    "Nothing here speaks of other data, another teacher, or another choice of the recipe.",
    "The cache id shows from which file the students learnt. With it, the recipe and the same software, a processor of "
    "the same kind gives the same numbers; a GPU may round otherwise each time. Times are of this machine, and of what "
    "else it did.",
)


def page(reported: Sequence[tuple[Findings, list[Drawing]]]) -> str:
    """The whole HTML file, of the findings and figures of each run; the same ones give the same text."""
    style = (resources.files("tspipe.experiments") / "report.css").read_text()
    several = len(reported) > 1
    title = f"{len(reported)} runs" if several else _title(reported[0][0])
    sections = "\n".join(_section(found, drawn, i, several) for i, (found, drawn) in enumerate(reported, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tspipe: {_text(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
{_contents(reported) if several else ""}{sections}
<h2>What is guaranteed, and what is not</h2>
{_list(_GUARANTEES)}
<h2>The method</h2>
<p>{_text(_CITATION)}</p>
</main>
</body>
</html>
"""


def _title(found: Findings) -> str:
    return f"{', '.join(found.students)} taught by {found.summary.teacher.network} on {found.summary.dataset}"


def _contents(reported: Sequence[tuple[Findings, list[Drawing]]]) -> str:
    links = (f'<li><a href="#run-{i}">{_text(_title(found))}</a></li>' for i, (found, _) in enumerate(reported, 1))
    return f"<nav><ul>\n{''.join(links)}\n</ul></nav>\n"


def _section(found: Findings, drawn: list[Drawing], number: int, several: bool) -> str:
    """All of a run; under a heading of its own where there are several."""
    head = f'<h2 id="run-{number}">{_text(_title(found))}</h2>\n' if several else ""
    level = 3 if several else 2
    parts = {
        "": f'<p class="lead">{_text(found.duration)}; run folder {_text(found.name)}</p>\n{_verdicts(found)}',
        "Accuracy": _accuracies(found),
        "Beside the paper": _beside_paper(found),
        "Figures": f'<div class="figures">\n{"".join(_figure(one, number) for one in drawn)}</div>',
        "Teacher": _teacher(found),
        "What the teacher calls random images": _shares(found.random_labels),
        "Loss terms in the first epoch": _ratios(found),
        "Recipe": _pairs(_flat(found.run.config)),
        "Environment": _pairs(_flat(found.run.environment)),
        "Cache": f"<p>The students learnt from the cache with the id<br><code>{_text(found.config.cache)}</code></p>",
    }
    return head + "\n".join(
        (f"<h{level}>{name}</h{level}>\n" if name else "") + body for name, body in parts.items() if body
    )


def _verdicts(found: Findings) -> str:
    if not found.comparisons:
        return "<p>There is no student alone in this run, so nothing to compare with.</p>"
    how = "chosen" if "chosen" in found.choices else "last"
    when = "after the last epoch" if how == "last" else "at the epochs that images held back chose"
    intro = f"Over the student alone, {when}, in points, with the 95 % interval of the paired seeds:"
    return f'<p>{intro}</p>\n<div class="verdicts">{_list(tables.verdicts(found, how))}</div>'


def _accuracies(found: Findings) -> str:
    note = "Test accuracy in %, mean ± sample deviation over the seeds; seconds per epoch are training and testing."
    legend = _list(text for choice, text in _CHOICES.items() if choice in found.choices)
    trust = tables.UNCHECKED if found.config.trust_data else ""
    second = tables.differences(found)
    first = f'{_table(tables.accuracies(found))}\n<p class="note">{note} {trust}</p>\n<div class="note">{legend}</div>'
    if not second.rows:
        return first
    return f"{first}\n<p>{_text(second.title)}, in points, with their 95 % intervals:</p>\n{_table(second)}"


def _beside_paper(found: Findings) -> str:
    beside, notes = tables.beside_paper(found), list(tables.paper_notes(found))
    return (_table(beside) if beside.rows else "") + "".join(f'\n<p class="note">{_text(note)}</p>' for note in notes)


def _figure(drawing: Drawing, number: int) -> str:
    """A figure in the page's own ink and ground; ids are made different from those of the page's other figures."""
    svg = drawing.svg[drawing.svg.index("<svg") :]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{drawing.name}-{number}-", svg)
    svg = svg.replace(INK, "currentColor").replace(GROUND, "var(--ground)")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_text(drawing.words)}"', 1)
    return f"<figure>\n{svg}<figcaption>{_text(drawing.caption)}</figcaption>\n</figure>\n"


def _teacher(found: Findings) -> str:
    teacher = found.summary.teacher
    size = "" if teacher.parameters is None else f", {teacher.parameters:,} parameters"
    return f"<p>{_text(teacher.network)}{size}: {100 * teacher.test_accuracy:.2f} % of the test images right.</p>"


def _shares(counts: dict[str, int], most: int = 20) -> str:
    """The histogram of the random images' labels: a row and a bar for each class, the most first."""
    if not (total := sum(counts.values())):
        return ""
    rows = "\n".join(
        f'<tr><th scope="row" class="name">{_text(name)}</th><td class="number">{count:,}</td>'
        f'<td class="number">{count / total:.1%}</td>'
        f'<td class="bar"><span style="width:{100 * count / total:.2f}%"></span></td></tr>'
        for name, count in list(counts.items())[:most]
    )
    rest = f'<p class="note">{len(counts) - most} other classes have fewer.</p>' if len(counts) > most else ""
    return _scrolling(f'<table class="shares"><tbody>{rows}</tbody></table>', "random images") + rest


def _ratios(found: Findings) -> str:
    weight = found.summary.mse_weight
    auto = [] if weight is None else [f"mse_weight=auto came to {weight:.4g}"]
    sentences = [*found.ratios, *auto]
    return f"<p>Means over the seeds, weighted as they were summed:</p>\n{_list(sentences)}" if sentences else ""


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "\n".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in pairs)
    return _scrolling(f'<table class="pairs"><tbody>{rows}</tbody></table>', "settings")


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """A JSON object's fields with dotted names, each on its own."""
    if isinstance(value, dict) and value:
        for inner, of in value.items():
            yield from _flat(of, f"{name}.{inner}" if name else str(inner))
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else "" if value == {} else str(value)


def _table(of: tables.Table) -> str:
    """A table whose first column heads its rows; best numbers carry the mark of what chose them."""
    kinds = ["name"] * of.names + ["number"] * (len(of.headings) - of.names)
    marks = [" †" if heading == "best" else "" for heading in of.headings]
    head = "".join(
        f'<th scope="col" class="{kind}">{_text(heading + mark)}</th>'
        for kind, heading, mark in zip(kinds, of.headings, marks, strict=True)
    )
    body = "\n".join(
        f'<tr><th scope="row" class="name">{_text(row[0])}</th>'
        + "".join(
            f'<td class="{kind}">{_text(text + (mark if text else ""))}</td>'
            for kind, text, mark in zip(kinds[1:], row[1:], marks[1:], strict=True)
        )
        + "</tr>"
        for row in of.rows
    )
    return _scrolling(f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>", of.title)


def _scrolling(table: str, label: str) -> str:
    """A table that a narrow screen scrolls by itself, with the keyboard, too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(label)}">\n{table}\n</div>'


def _list(sentences: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{_text(sentence)}</li>" for sentence in sentences) + "\n</ul>"


def _text(text: str) -> str:
    """Text that means itself in HTML, in quotes, too; control characters become visible."""
    return escape(plain(text))
