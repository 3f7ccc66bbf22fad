"""From run folders to a report: tables in the terminal, figures, and one HTML file that needs nothing beside it."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from tspipe.errors import ReportError
from tspipe.experiments import figures, tables
from tspipe.experiments import html as page
from tspipe.experiments.results import Findings, read
from tspipe.training.run_folder import RunFolder
from tspipe.training.summary import label_shares
from tspipe.utils.console import console, plain
from tspipe.utils.files import write_whole, writing

_OVER = {
    "last": "Over the student alone, in points, with the 95 % interval of the paired seeds:",
    "best": "The same at the best epochs, chosen by the test set:",
    "chosen": "The same at the epochs that the images held back chose:",
}
_MARKS = {"best": "best is chosen by the test set", "chosen": "chosen is chosen by images held back from training"}


def show(run: RunFolder) -> None:
    """Print a finished run: its table, what the arms make of it, the random images' labels, and where the rest is."""
    found = read(run)
    _print(found, ("last", "chosen"))
    there = "metrics.csv, curves.png, students"
    try:
        write_whole(run.path / "curves.png", figures.draw(found, "curves").png)
    except ReportError:
        there = "no curves: pip install 'tspipe[plots]'"
    console().print(Text(f"Run folder: {run.path} ({there})"))


def make(runs: Sequence[RunFolder], out: Path | None = None) -> None:
    """Report finished runs, in the terminal and in a folder.

    Raises ReportError where a run's files are not what stage two writes, or what draws figures is missing.
    """
    findings = [read(run) for run in runs]
    made = write(findings, out or default_folder(runs))
    for found in findings:
        _print(found, ("last", "best", "chosen"))
        for sentence in found.ratios:
            console().print(Text(sentence))
    console().print(Text(f"Report: {made} (figures beside it)"))


def write(found: Sequence[Findings], folder: Path) -> Path:
    """Write report.html and the figures, PNG and SVG, of what runs found; gives the path of report.html.

    The same runs give the same bytes. Raises ReportError where what draws figures is missing.
    """
    drawn = [[figures.draw(one, name) for name in figures.names(one)] for one in found]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for prefix, drawings in zip(_prefixes(found), drawn, strict=True):
        for drawing in drawings:
            write_whole(folder / f"{prefix}{drawing.name}.svg", drawing.svg.encode())
            write_whole(folder / f"{prefix}{drawing.name}.png", drawing.png)
    path = folder / "report.html"
    write_whole(path, page.page(list(zip(found, drawn, strict=True))).encode())
    return path


def default_folder(runs: Sequence[RunFolder]) -> Path:
    """Where these runs' report goes: a single run's own folder, or one in reports/ that is always the same of them."""
    if len(runs) == 1:
        return runs[0].path
    configs = sorted(json.dumps([run.path.resolve().name, run.config], sort_keys=True) for run in runs)
    return Path("reports") / hashlib.sha256("\n".join(configs).encode()).hexdigest()[:8]


def _prefixes(found: Sequence[Findings]) -> list[str]:
    """What the names of each run's figures begin with: of several runs its name, with a number where two share it."""
    if len(found) == 1:
        return [""]
    names = Counter(one.name for one in found)
    return [f"{one.name}-{i}-" if names[one.name] > 1 else f"{one.name}-" for i, one in enumerate(found, 1)]


def _print(found: Findings, choices: Sequence[str]) -> None:
    out = console()
    out.print(table(tables.accuracies(found, brief="chosen" in found.choices)))  # in 80 columns
    marks = ", ".join(text for choice, text in _MARKS.items() if choice in found.choices)
    out.print(Text(f"Test accuracy in %, mean ± sample deviation; {marks}."))
    for choice in choices if found.comparisons else ():
        if choice in found.choices:
            out.print(_OVER[choice])
            for sentence in tables.verdicts(found, choice):
                out.print(Text(f"  {plain(sentence)}"))
    if (beside := tables.beside_paper(found)).rows:
        out.print(table(beside))
    for sentence in tables.paper_notes(found):
        out.print(Text(plain(sentence)))
    if found.random_labels:
        out.print(Text(label_shares(found.random_labels)))
    if found.config.trust_data:
        out.print(tables.UNCHECKED)


def table(of: tables.Table) -> RichTable:
    """A table for the terminal: names break where they must, numbers never."""
    shown = RichTable(title=Text(plain(of.title)), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for i, heading in enumerate(of.headings):
        number = i >= of.names
        shown.add_column(heading, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in of.rows:
        shown.add_row(*(Text(plain(text)) for text in row), end_section=row[1] == "teacher")
    return shown
