"""Reports of run folders: tables in the terminal, figures, and a self-contained HTML page."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from tspipe.data.random_images.score import label_shares
from tspipe.errors import ReportError
from tspipe.experiments import figures, html, tables
from tspipe.experiments.results import Findings, across_runs, read
from tspipe.training.run_folder import Row, RunFolder, read_rows
from tspipe.training.train_teacher import TrainedTeacher, metrics_path
from tspipe.utils.console import echo, printable, stdout_console
from tspipe.utils.files import write_whole, writing
from tspipe.utils.reading import read_file

_OVER = {
    "last": "Over the student alone, in points, with the 95 % interval of the paired seeds:",
    "best": "The same at the best epochs, selected by the test set:",
    "chosen": "The same at the epochs selected by held-back images:",
}
_MARKS = {"best": "best is selected by the test set", "chosen": "chosen by held-back training images"}


def show(run: RunFolder) -> None:
    """Print a finished run: its table, the comparison of arms, the labels of random images, and the run folder."""
    findings = read(run)
    _print_tables(findings, ("last", "chosen"))
    contents = "metrics.csv, curves.png, students"
    try:
        write_whole(run.path / "curves.png", figures.draw(findings, "curves").png)
    except ReportError:
        contents = "no curves: pip install 'tspipe[plots]'"
    _print(f"Run folder: {run.path} ({contents})")


def show_teacher(trained: TrainedTeacher, network: str, dataset: str) -> None:
    """Draw a teacher's curves, unless they were drawn when it was trained; print where they and its metrics are."""
    table = metrics_path(trained.path)
    figure = table.with_name(f"{trained.path.stem}.curves.png")
    metrics = trained.metrics or ([] if figure.exists() else _read_teacher_metrics(table))
    if not metrics:
        return
    try:
        write_whole(figure, figures.draw_teacher(metrics, network, dataset).png)
        drawn = str(figure)
    except ReportError:
        drawn = "no curves: pip install 'tspipe[plots]'"
    echo(f"Its metrics of each epoch: {table} ({drawn})")


def _read_teacher_metrics(table: Path) -> list[Row]:
    """Return the metrics that a finished training has left, [] if there are none or they are damaged."""
    try:
        rows = read_rows(read_file(table).decode())
    except (OSError, ValueError, csv.Error):
        return []
    numbers = [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in rows]
    return numbers if all(row.keys() >= {"epoch", "test_accuracy"} for row in numbers) else []


def make(runs: Sequence[RunFolder], out: Path | None = None) -> None:
    """Report finished runs in the terminal and in a folder.

    Raises ReportError if a run's files are not as stage two writes them, or matplotlib is missing.
    """
    all_findings = [read(run) for run in runs]
    page = write(all_findings, out or default_folder(runs))
    for findings in all_findings:
        _print_tables(findings, ("last", "best", "chosen"))
        for sentence in findings.ratios:
            _print(sentence)
    for compared in across_runs(all_findings):
        _print(tables.across_runs(compared))
        _print(tables.ACROSS_RUNS)
    if untried := tables.untried(all_findings):
        _print(tables.UNTRIED)
        for sentence in untried:
            _print(f"  {sentence}")
    _print(f"Report: {page} (figures beside it)")


def write(findings: Sequence[Findings], folder: Path) -> Path:
    """Write report.html and the figures as PNG and SVG; return the path of report.html.

    The same runs give the same bytes. Raises ReportError if matplotlib is missing.
    """
    drawn = [[figures.draw(one, name) for name in figures.names(one)] for one in findings]
    compared = across_runs(findings)
    common = [figures.draw_across_runs(group) for group in compared]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    names = Counter(one.name for one in findings)
    for number, (one, drawings) in enumerate(zip(findings, drawn, strict=True), 1):
        name = f"{one.name}-{number}-" if names[one.name] > 1 else f"{one.name}-"
        for drawing in drawings:
            _write(drawing, folder / f"{name if len(findings) > 1 else ''}{drawing.name}")
    for number, drawing in enumerate(common, 1):
        _write(drawing, folder / f"{drawing.name}-{number}")
    page = html.page(list(zip(findings, drawn, strict=True)), list(zip(compared, common, strict=True)))
    write_whole(folder / "report.html", page.encode())
    return folder / "report.html"


def _write(drawing: figures.Drawing, path: Path) -> None:
    write_whole(path.with_name(f"{path.name}.svg"), drawing.svg.encode())
    write_whole(path.with_name(f"{path.name}.png"), drawing.png)


def default_folder(runs: Sequence[RunFolder]) -> Path:
    """Return the folder for a report: a single run's own, or one in reports/ named after the runs."""
    if len(runs) == 1:
        return runs[0].path
    configs = sorted(json.dumps([run.path.resolve().name, run.config], sort_keys=True) for run in runs)
    return Path("reports") / hashlib.sha256("\n".join(configs).encode()).hexdigest()[:8]


def _print_tables(findings: Findings, choices: Sequence[str]) -> None:
    _print(tables.accuracies(findings, narrow=True))
    for sentence in tables.initial_weights(findings):
        _print(sentence)
    marks = ", ".join(text for choice, text in _MARKS.items() if choice in findings.choices)
    deployed = " Parameters: in training → deployed." if findings.summary.deployed_parameters else ""
    _print(f"Test accuracy in %, mean ± sample deviation; {marks}.{deployed}")
    if cost := tables.teacher_cost(findings):
        _print(cost)
    for choice in choices if findings.comparisons else ():
        if choice in findings.choices:
            _print(_OVER[choice])
            for sentence in tables.verdicts(findings, choice):
                _print(f"  {sentence}")
    if (beside := tables.beside_paper(findings)).rows:
        _print(beside)
    for sentence in tables.paper_notes(findings):
        _print(sentence)
    if findings.random_labels:
        _print(label_shares(findings.random_labels))
    if findings.config.trust_data:
        _print(tables.UNCHECKED)


def _print(content: str | tables.Table) -> None:
    """Print text, or a table in which names may wrap and numbers never do; names from files are made printable."""
    out = stdout_console()
    if isinstance(content, str):
        out.print(Text(printable(content)))
        return
    table = RichTable(title=Text(printable(content.title)), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for i, heading in enumerate(content.headings):
        number = i >= content.names
        table.add_column(heading, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in content.rows:
        table.add_row(*(Text(printable(text)) for text in row), end_section=row[1] == "teacher")
    out.print(table)
