"""The results of a run: means, deviations, intervals, conclusions, and the comparison with the paper."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from made_runs import ALONE, PAPER, RANDOM, TAUGHT, make_run
from tspipe.errors import ReportError, TspipeError
from tspipe.experiments.results import open_run, read
from tspipe.experiments.statistics import Sample
from tspipe.experiments.tables import (
    accuracies,
    beside_paper,
    differences,
    initial_weights,
    paper_notes,
    teacher_cost,
    verdicts,
)
from tspipe.training.arms import ALONE_RANDOM, OWN


def test_last_best_and_seconds(tmp_path: Path) -> None:
    findings = read(make_run(tmp_path / "run", {ALONE: [[0.5, 0.7, 0.6], [0.4, 0.5, 0.8]]}))
    (result,) = findings.results
    assert result.accuracy == {"last": Sample((0.6, 0.8)), "best": Sample((0.7, 0.8))}
    assert [sample.values for sample in result.curve] == [(0.5, 0.4), (0.7, 0.5), (0.6, 0.8)]
    assert result.seconds == 2.5
    assert findings.duration == "3 epochs, 2 seeds"


def test_held_back_images_select_the_epoch(tmp_path: Path) -> None:
    """The first of the best epochs; the test set is not used."""
    run = make_run(
        tmp_path / "run", {ALONE: [[0.5, 0.7, 0.9], [0.4, 0.6, 0.8]]}, columns={"val_accuracy": [0.1, 0.3, 0.3]}
    )
    (result,) = read(run).results
    assert result.accuracy["chosen"].values == (0.7, 0.6)


def test_each_loss_of_an_arm_is_a_result(tmp_path: Path) -> None:
    made = {
        ALONE: [[0.5], [0.5]],
        TAUGHT: [[0.6], [0.7]],
        (TAUGHT, "kd"): [[0.4], [0.3]],
        (RANDOM, "vid"): [[0.5], [0.6]],
    }
    findings = read(make_run(tmp_path / "run", made))
    assert [(result.name, result.accuracy["last"].values) for result in findings.results] == [
        ("alone", (0.5, 0.5)),
        ("taught", (0.6, 0.7)),
        ("taught, kd", (0.4, 0.3)),
        ("taught + random, vid", (0.5, 0.6)),
    ]
    assert verdicts(findings) == [
        "lenet5, taught: +15.00 (two seeds: too few seeds for an interval)",
        "lenet5, taught, kd: -15.00 (two seeds: too few seeds for an interval)",
        "lenet5, taught + random, vid: +5.00 (two seeds: too few seeds for an interval)",
    ]


def test_a_run_written_before_there_were_several_losses(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {ALONE: [[0.5]], TAUGHT: [[0.6]]})
    rows = [{name: value for name, value in row.items() if name != "loss"} for row in run.rows()]
    run.keep(rows)
    assert [result.name for result in read(run).results] == ["alone", "taught"]


@pytest.mark.parametrize("n", [3, 5, 31, 32, 60])
def test_the_interval_is_that_of_students_t(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(n).normal(size=n)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), values.std(ddof=1) / math.sqrt(n))
    sample = Sample(tuple(values))
    assert sample.margin == pytest.approx((high - low) / 2, rel=2e-3)
    assert sample.mean == pytest.approx((high + low) / 2)


@pytest.mark.parametrize(
    ("taught", "expected"),
    [
        ([0.62, 0.61, 0.63], "lenet5, taught: +2.00 (+2.00 to +2.00), it helps"),
        ([0.58, 0.56, 0.58], "lenet5, taught: -2.67 (-4.10 to -1.23), it hurts"),
        ([0.62, 0.57, 0.62], "lenet5, taught: +0.33 (-4.84 to +5.50), no difference shown"),
    ],
)
def test_verdicts(tmp_path: Path, taught: list[float], expected: str) -> None:
    run = make_run(tmp_path / "run", {ALONE: [[0.60], [0.59], [0.61]], TAUGHT: [[a] for a in taught]})
    assert verdicts(read(run)) == [expected]


def test_two_seeds_have_no_interval(tmp_path: Path) -> None:
    findings = read(make_run(tmp_path / "run", {ALONE: [[0.60], [0.61]], TAUGHT: [[0.61], [0.64]]}))
    assert verdicts(findings) == ["lenet5, taught: +2.00 (two seeds: too few seeds for an interval)"]


def test_the_first_epoch_does_not_count_for_the_pace(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {ALONE: [[0.5] * 3]}, columns={"seconds_training": [60.0, 1.0, 2.0]})
    assert read(run).results[0].seconds == 2.0
    one = make_run(tmp_path / "one", {ALONE: [[0.5]]})
    assert accuracies(read(one)).rows[1][-1] == "≤ 2.50"


def test_weights_in_training_and_deployed(tmp_path: Path) -> None:
    start = {"name": "w.pth", "sha256": "ab" * 32}
    made = {"parameters": {"lenet5": 275_610}, "deployed_parameters": {"lenet5": 98_970}, "initial": {"lenet5": start}}
    findings = read(make_run(tmp_path / "run", {ALONE: [[0.5]]}, **made))
    assert accuracies(findings).rows[1][::4] == ["lenet5 *", "275,610 → 98,970"]
    assert accuracies(findings, narrow=True).rows[1][4] == "276k → 99k"
    assert initial_weights(findings) == ["* lenet5 starts from w.pth (SHA-256 abababababab)."]


def test_one_seed_allows_no_conclusion(tmp_path: Path) -> None:
    findings = read(make_run(tmp_path / "run", {ALONE: [[0.60]], TAUGHT: [[0.61]]}, paper=PAPER))
    assert verdicts(findings) == ["lenet5, taught: +1.00 (one seed: no interval, so no conclusion)"]
    assert findings.comparisons[0].sign == "unclear"


def test_arms_are_compared_with_both_schedules_of_the_student_alone(tmp_path: Path) -> None:
    """On CUB-200-2011, the paper gives the student alone another learning rate."""
    findings = read(make_run(tmp_path / "run", {ALONE: [[0.60]], (OWN, "xent"): [[0.63]], TAUGHT: [[0.61]]}))
    assert [(row[1], row[2], row[3][:5]) for row in differences(findings).rows] == [
        ("alone, own schedule", "alone", "+3.00"),
        ("taught", "alone", "+1.00"),
        ("taught", "alone, own schedule", "-2.00"),
    ]


def test_what_the_teacher_adds_to_mixed_images_is_compared_with_mixed_labels(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        {ALONE: [[0.60]], (ALONE_RANDOM, "xent"): [[0.63]], (TAUGHT, "kd"): [[0.61]], (RANDOM, "kd"): [[0.66]]},
    )
    assert [(row[1], row[2], row[3][:5]) for row in differences(read(run)).rows] == [
        ("alone + random", "alone", "+3.00"),
        ("taught, kd", "alone", "+1.00"),
        ("taught + random, kd", "alone", "+6.00"),
        ("taught + random, kd", "alone + random", "+3.00"),
    ]


@pytest.mark.parametrize(
    ("taught", "expected"),
    [([0.62, 0.61, 0.63], "same"), ([0.58, 0.56, 0.58], "opposite"), ([0.62, 0.57, 0.62], "unclear")],
)
def test_beside_the_paper(tmp_path: Path, taught: list[float], expected: str) -> None:
    made = {ALONE: [[0.60], [0.59], [0.61]], TAUGHT: [[a] for a in taught], (TAUGHT, "kd"): [[0.5]] * 3}
    made[(TAUGHT, "xent")] = [[0.5]] * 3
    findings = read(make_run(tmp_path / "run", made, paper=PAPER))
    ours = f"{100 * (sum(taught) / 3 - 0.6):+.2f}"
    alone, learnt, other = beside_paper(findings).rows  # other losses are not the paper's
    assert alone == ["lenet5", "alone", "60.00 ± 1.00", "78.00", "", "", ""]
    assert learnt[:2] + learnt[3:] == ["lenet5", "taught", "81.36", ours, "+3.36", expected]
    assert other == ["Wu and Gu [26]", "", "", "80.40", "", "", ""]
    assert list(paper_notes(findings)) == [
        "arXiv 2005.00393, Table 1. The paper reports the best test accuracy of all epochs, so this table does too. "
        "The sign of a difference is unclear if our 95 % interval contains zero, or there are fewer than three seeds.",
        "Differences from the paper: 1 epoch, not 200.",
    ]


def test_the_ratio_of_the_losses(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {TAUGHT: [[0.5, 0.5]]}, columns={"mse": [46.0, 1.0], "xent": [2.3, 1.0]})
    assert read(run).ratios == [
        "lenet5, taught, epoch 1: mse 46 / xent 2.3 = 20, so the labels hardly count: try --set mse_weight=auto"
    ]
    auto = make_run(tmp_path / "auto", {TAUGHT: [[0.5]]}, columns={"mse": 46.0, "xent": 2.3}, mse_weight=0.1)
    auto.config["mse_weight"] = "auto"
    assert read(auto).ratios == [
        "lenet5, taught, epoch 1: mse 46 / xent 2.3 = 20, so the labels hardly count: try --set xent_weight=20"
    ]
    kd = make_run(tmp_path / "kd", {(TAUGHT, "kd"): [[0.5]]}, columns={"kl": 10.0, "xent": 0.626})
    assert read(kd).ratios == ["lenet5, taught, kd, epoch 1: kl 10 / xent 0.626 = 16, as expected"]


@pytest.mark.parametrize(
    ("passes", "balanced", "expected"),
    [
        (0, False, "2,000 passes of an image; none in training."),
        (900, False, "2,000 passes of an image; 900 an epoch, which take 3.25 s in training."),
        (900, True, "at least 2,000 passes of an image; at least 900 an epoch, which take 3.25 s in training."),
    ],
)
def test_the_cost_of_the_teacher(tmp_path: Path, passes: int, balanced: bool, expected: str) -> None:
    """The first epoch is slower, because it includes the warm-up."""
    cost = {"cache_bytes": 2**21, "cached_passes": 2000, "epoch_passes": passes}
    seconds = {"seconds_teacher": [9.0, 3.25, 3.25]}
    run = make_run(tmp_path / "run", {ALONE: [[0.6, 0.6, 0.6]]}, columns=seconds, cost=cost)
    run.config["random_balanced"] = balanced
    assert teacher_cost(read(run)) == f"The teacher's cost: a cache of 2.0 MiB, made once with {expected}"
    assert teacher_cost(read(make_run(tmp_path / "old", {ALONE: [[0.6]]}))) == ""


def test_the_table_of_accuracies(tmp_path: Path) -> None:
    table = accuracies(read(make_run(tmp_path / "run", {ALONE: [[0.60], [0.62]]})))
    assert table.title == "cifar10: 1 epoch, 2 seeds"
    assert table.rows == [
        ["resnet56", "teacher", "83.20", "", "853,018", ""],
        ["lenet5", "alone", "61.00 ± 1.41", "61.00 ± 1.41", "62,006", "2.50"],
    ]


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    run = make_run(tmp_path / "run", {ALONE: [[0.6]]})
    (run.path / "summary.json").unlink()
    for path, message in (
        (
            tmp_path / "photos",
            f"{tmp_path}/photos is not a run folder: it has no config.json. Give a folder that tspipe student wrote, "
            "in runs/.",
        ),
        (run.path, f"The run in {run.path} is not finished. Run its command again to resume it."),
    ):
        with pytest.raises(ReportError) as problem:
            open_run(path)
        assert str(problem.value) == message


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("config.json", "[]", "input should be a JSON object"),
        ("config.json", '{"config": {"seeds": 0, "epochs": 1}, "environment": {}}',
         "seeds: input should be greater than or equal to 1"),
        ("config.json", '{"config": {"seeds": 2, "epochs": 1}, "environment": {}}',
         "lenet5, alone, xent has no row for each of 1 epochs of 2 seeds"),
        ("summary.json", "{}", "dataset: field required"),
        ("summary.json", "no JSON", "Expecting value: line 1 column 1 (char 0)"),
        ("metrics.csv", "", "there are no rows"),
        ("metrics.csv", "seed,epoch\n0,1\n", "student: field required"),
        ("config.json", '{"config": {"seeds": 1, "epochs": 1000000000}, "environment": {}}',
         "lenet5, alone, xent has no row for each of 1000000000 epochs of 1 seeds"),
        ("random_labels.json", '{"bird": "many"}',
         "bird: input should be a valid integer, unable to parse string as an integer"),
        ("random_labels.json", f'{{"bird": {10**400}}}', "bird: input should be less than 9223372036854775808"),
        ("random_labels.json", "[" * 100_000,
         "maximum recursion depth exceeded while decoding a JSON array from a unicode string"),
        ("summary.json", '{"dataset": "x", "teacher": {"network": "x", "parameters": 1, "test_accuracy": NaN}}',
         "teacher.test_accuracy: input should be less than or equal to 1"),
        ("random_labels.json", '{"bird": 0}', "bird: input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_files_that_stage_two_did_not_write(tmp_path: Path, file: str, text: str, reason: str) -> None:
    path = make_run(tmp_path / "run", {ALONE: [[0.6]]}).path
    (path / file).write_text(text)
    with pytest.raises(ReportError) as problem:
        read(open_run(path))
    named = path / ("metrics.csv" if "no row" in reason else file)
    assert str(problem.value) == (
        f"{named} is not as tspipe student writes it: {reason}. Train the run again with another --out."
    )


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("seconds_training", "long", "seconds_training: input should be a valid number"),
        ("mse", 10**400, "mse: input should be a valid number"),
    ],
)
def test_columns_are_numbers(tmp_path: Path, column: str, value: object, reason: str) -> None:
    columns = {"mse": 1.0, "xent": 1.0, column: value}
    with pytest.raises(ReportError, match=reason):
        read(make_run(tmp_path / "run", {TAUGHT: [[0.6]]}, columns=columns))


def test_accuracies_are_fractions(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", {ALONE: [[60.0]]}).path
    with pytest.raises(
        ReportError, match=r"metrics.csv is not as tspipe student writes it: test_accuracy: input should be less"
    ):
        read(open_run(path))


def test_metrics_that_changed_after_the_run_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {ALONE: [[0.6]]})
    run.write_json("summary.json", {**run.read_json("summary.json"), "files": run.describe(["metrics.csv"])})
    assert read(run).results[0].accuracy["last"].mean == 0.6
    path = run.path / "metrics.csv"
    path.write_text(path.read_text().replace("0.6", "0.7"))
    with pytest.raises(ReportError, match=f"^{path} has changed since the run was finished"):
        read(run)


@pytest.mark.parametrize("file", ["config.json", "summary.json", "metrics.csv", "random_labels.json"])
def test_a_named_pipe_or_a_folder_in_place_of_a_file_is_refused(tmp_path: Path, file: str) -> None:
    path = make_run(tmp_path / "run", {ALONE: [[0.6]]}, labels={"bird": 1}).path / file
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(TspipeError, match=f"^{path} cannot be read: it is not a regular file"):
        read(open_run(path.parent))
    path.unlink()
    path.mkdir()
    with pytest.raises(TspipeError, match=f"^{path} cannot be read: "):
        read(open_run(path.parent))
