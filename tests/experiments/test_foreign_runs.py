"""Run folders of others: any value in place of any field is reported or refused in one printable line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from made_runs import ALONE, PAPER, TAUGHT, make_run
from tspipe.errors import ReportError
from tspipe.experiments import report
from tspipe.experiments.results import open_run, read

VALUES = ["\x1b[31mred\n\u202e", "x" * 5000, None, -1, 10**400, float("nan"), [[[1]]], {"a": {"b": None}}]


def fields(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all fields in a JSON value."""
    yield place
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from fields(inner, (*place, key))


def replaced(value: Any, place: tuple[Any, ...], new: object) -> Any:
    """A copy of a JSON value with another value in one place."""
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = replaced(value[place[0]], place[1:], new)
    return copy


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_any_value_in_any_field_is_reported_or_refused(
    value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {ALONE: [[0.6], [0.5]], TAUGHT: [[0.6], [0.5]]}
    columns = {"mse": 2.0, "xent": 2.0, "val_accuracy": 0.5}
    run = make_run(tmp_path / "run", made, columns=columns, labels={"bird": 3}, paper=PAPER, mse_weight=0.5)
    cases = []
    for name in ("config.json", "summary.json", "random_labels.json"):
        content = run.read_json(name)
        cases += [(name, json.dumps(replaced(content, place, value))) for place in fields(content)]
    header, row, *rows = [line.split(",") for line in (run.path / "metrics.csv").read_text().splitlines()]
    for i in range(len(row)):
        table = [header, [*row[:i], str(value), *row[i + 1 :]], *rows]
        cases.append(("metrics.csv", "\n".join(map(",".join, table)) + "\n"))
    for name, text in cases:
        sound = (run.path / name).read_bytes()
        (run.path / name).write_text(text)
        try:
            report._print_tables(read(open_run(run.path)), ("last", "best", "chosen"))
        except ReportError as problem:
            assert len(str(problem)) < 500
            assert str(problem).isprintable()
        (run.path / name).write_bytes(sound)
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())
