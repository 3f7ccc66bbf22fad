"""Comparing students and exports with their teacher."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tspipe as library
from tspipe.cache import Cache
from tspipe.deploy import latency
from tspipe.deploy.evaluate import evaluate
from tspipe.deploy.export import ExportConfig, export
from tspipe.deploy.labelled_images import open_labelled_images
from tspipe.training.run_folder import RunFolder


def test_the_command(tspipe: Callable, run: Path, student_file: Path, digits: Cache, tmp_path: Path) -> None:
    export(library.load_student(student_file), ExportConfig("onnx", tmp_path / "x.onnx"), None)
    Path("cache").mkdir()
    Path("cache/digits.h5").symlink_to(digits.path)
    arguments = ["eval", student_file, "x.onnx", "--seconds", 0]
    result = tspipe(*arguments, "--json")
    assert result.code == 0, result.err
    content = json.loads(result.out)
    assert (content["cache"], content["images"]) == (digits.id, 797)
    teacher, student, exported = content["results"]
    assert [one["name"] for one in content["results"]] == ["teacher lenet5", "lenet5-taught-seed0", "x.onnx"]
    assert teacher["scores"]["agreement"] == 1
    assert teacher["scores"]["top1"] == pytest.approx(digits.manifest["teacher"]["correct"]["test"] / 797)
    rows = RunFolder(run, {}, {}).rows()
    accuracy = next(row["test_accuracy"] for row in rows[::-1] if row["arm"] == "taught")
    assert student["scores"]["top1"] == pytest.approx(accuracy)
    worst = student["scores"].pop("worst_classes")
    assert exported["scores"].pop("worst_classes") == worst
    assert len(worst) == 3
    assert list(worst.values()) == sorted(worst.values())
    assert exported["scores"] == pytest.approx(student["scores"], abs=1e-6)
    assert (student["parameters"], exported["parameters"]) == (5_822, None)
    assert student["size"] == student_file.stat().st_size
    assert all(one["latency"]["32"]["p95"] >= one["latency"]["1"]["median"] / 2 for one in content["results"])
    result = tspipe(*arguments)
    lines = result.out.splitlines()
    assert lines[0].split() == ["top-1", "top-5", "F1", "ECE", "agree", "weights", "size", "ms", "ms/32"]
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:3]] == ["teacher", "lenet5-taught-seed0"]


def test_a_teacher_that_cannot_be_built_has_no_latency(
    student_file: Path, digits: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(digits.manifest["teacher"], "network", "mine")
    teacher, student = evaluate([library.load_student(student_file)], open_labelled_images(digits), 0)
    assert (teacher.latency, teacher.parameters) == ({}, None)
    assert student.latency.keys() == {1, 32}


def test_a_student_of_other_classes_is_refused(
    student_file: Path, digits: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, test = library.load_student(student_file), open_labelled_images(digits)
    monkeypatch.setitem(digits.manifest["preprocess"], "mean", [0.5])
    with pytest.raises(library.CacheMismatch, match=r"has another preprocessing than digits\.h5"):
        evaluate([student], test)
    student.classes[0] = "nought"
    with pytest.raises(library.CacheMismatch, match=r"has other classes than digits\.h5"):
        evaluate([student], test)


def test_latencies_are_measured_in_turns() -> None:
    order = []
    runs = [lambda pixels, i=i: order.append((i, tuple(pixels.shape))) or torch.empty(0) for i in range(2)]
    measured = latency.measure(runs, (1, 4, 4), 3, 0)
    assert [one.n for one in measured] == [5, 5]
    assert [i for i, _ in order] == [0] * 3 + [1] * 3 + [0, 1] * 5
    assert {shape for _, shape in order} == {(3, 1, 4, 4)}
    assert all(0 <= one.median <= one.p95 for one in measured)
