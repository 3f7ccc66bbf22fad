"""What a run comes to: means, deviations, intervals, and the sentence they allow."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from tspipe import report
from tspipe.report import Sample
from tspipe.run_folder import RunFolder


def make_run(path: Path, accuracies: dict[str, list[list[float]]]) -> RunFolder:
    """A finished run of one student: by arm, by seed, the test accuracy of each epoch."""
    seeds, epochs = len(next(iter(accuracies.values()))), len(next(iter(accuracies.values()))[0])
    config = {"students": {"lenet5": {}}, "arms": list(accuracies), "seeds": seeds, "epochs": epochs}
    run = RunFolder(path, config, {})
    path.mkdir()
    rows = [
        {
            "seed": seed, "epoch": epoch + 1, "student": "lenet5", "arm": arm, "test_accuracy": accuracy,
            "seconds_training": 2.0, "seconds_testing": 0.5,
        }
        for arm, by_seed in accuracies.items()
        for seed, by_epoch in enumerate(by_seed)
        for epoch, accuracy in enumerate(by_epoch)
    ]  # fmt: skip
    run.append(rows, list(rows[0]))
    teacher = {"network": "resnet56", "test_accuracy": 0.832, "parameters": 853018}
    run.write_json("summary.json", {"dataset": "cifar10", "teacher": teacher, "parameters": {"lenet5": 62006}})
    return run


def test_last_best_and_seconds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"alone": [[0.5, 0.7, 0.6], [0.4, 0.5, 0.8]]})
    (found,) = report.results(run)
    assert found.last.values == (0.6, 0.8)
    assert found.best.values == (0.7, 0.8)
    assert found.seconds == 2.5


@pytest.mark.parametrize("n", [2, 3, 5, 31, 32, 60])
def test_the_interval_is_students(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(n).normal(size=n)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), values.std(ddof=1) / math.sqrt(n))
    sample = Sample(tuple(values))
    assert sample.margin == pytest.approx((high - low) / 2, rel=2e-3)
    assert sample.mean == pytest.approx((high + low) / 2)


@pytest.mark.parametrize(
    ("taught", "said"),
    [
        (
            [0.62, 0.61, 0.63],
            "lenet5, taught: +2.00 (+2.00 to +2.00), it helps",
        ),
        (
            [0.58, 0.56, 0.58],
            "lenet5, taught: -2.67 (-4.10 to -1.23), it hurts",
        ),
        (
            [0.62, 0.57, 0.62],
            "lenet5, taught: +0.33 (-4.84 to +5.50), no difference shown",
        ),
    ],
)
def test_verdicts(tmp_path: Path, taught: list[float], said: str) -> None:
    run = make_run(tmp_path / "run", {"alone": [[0.60], [0.59], [0.61]], "taught": [[a] for a in taught]})
    assert report.verdicts(run) == [said]


def test_one_seed_allows_no_conclusion(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"alone": [[0.60]], "taught": [[0.61]]})
    assert report.verdicts(run) == ["lenet5, taught: +1.00 (one seed: no interval, so no conclusion)"]


def test_the_table_fits_eighty_columns_and_says_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", {"alone": [[0.60], [0.62]], "taught": [[0.61], [0.63]]})
    report.show(run)
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    for part in ("83.20", "61.00 ± 1.41", "62.00 ± 1.41", "853,018", "62,006", "2.50"):
        assert part in text
    assert (run.path / "curves.png").exists()


def test_without_matplotlib_it_says_how_to_get_the_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = make_run(tmp_path / "run", {"alone": [[0.60]]})
    report.show(run)
    assert "no curves: pip install 'tspipe[plots]'" in " ".join(capsys.readouterr().out.split())
