"""Comparing students and exports with their teacher."""

import itertools
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import tspipe as library
from tspipe.cache import Cache
from tspipe.deploy import latency, memory
from tspipe.deploy.counts import count_module, count_onnx
from tspipe.deploy.evaluate import evaluate, leak_remarks
from tspipe.deploy.export import ExportConfig, export
from tspipe.deploy.labelled_images import open_labelled_images
from tspipe.experiments.evaluation import notes
from tspipe.models.networks import _hub
from tspipe.training.run_folder import RunFolder


def test_the_command(
    tspipe: Callable, run: Path, student_file: Path, digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is found by the first student's id; one that is named is opened. A student may be at a URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    export(library.load_student(student_file), ExportConfig("safetensors", tmp_path / "x.safetensors"), None)
    Path("cache").mkdir()
    Path("cache/digits.h5").symlink_to(digits.path)
    result = tspipe("eval", f"file://{student_file}", "x.safetensors", "--seconds", 0, "--json")
    assert result.code == 0, result.err
    assert result.err.startswith(f"Fetched file://{student_file} to {tmp_path}/home/tspipe/")
    content = json.loads(result.out)
    assert (content["caches"], content["images"]) == ([digits.id], 797)
    teacher, student, exported = content["results"]
    assert [one["name"] for one in content["results"]] == ["teacher lenet5", "lenet5-taught-seed0", "x.safetensors"]
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
    assert student["parameters"] == exported["parameters"] == 5_822
    assert student["multiply_adds"] == exported["multiply_adds"] == 34_320  # 21,600 + 9,600 + 1,920 + 1,200
    assert student["size"] == student_file.stat().st_size
    assert (student["latency"], student["memory"]) == ([], {})
    result = tspipe("eval", student_file, digits.path, "--seconds", 0, "--html", "a/page.html")
    lines = result.out.splitlines()
    assert lines[0].split() == ["top-1", "top-5", "F1", "ECE", "agree", "weights", "MACs", "size"]
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:3]] == ["teacher", "lenet5-taught-seed0"]
    assert lines[-1] == "Page: a/page.html"
    assert "The most confident mistakes" in Path("a/page.html").read_text()


def test_what_is_measured(
    student_file: Path, digits: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second cache is a second teacher. One that cannot be built is not measured."""
    monkeypatch.setitem(digits.manifest["teacher"], "network", "mine")
    monkeypatch.setattr("tspipe.deploy.latency.BATCH_SIZES", (2,))
    monkeypatch.setattr("tspipe.deploy.latency.available_cores", lambda: 2)
    test = open_labelled_images(digits)
    with monkeypatch.context() as patch:
        measured = []
        patch.setattr(memory, "measure", lambda sources: measured.extend(sources) or [{32: 2**20}])
        first, second, student = evaluate([test, test], [library.load_student(student_file)], 1e-6, ["./other.py"])
    assert measured == [(student_file, ["./other.py"])]
    assert "digits.h5 is not measured without its network's file: --network ./mine.py" in capsys.readouterr().err
    assert first.name == "teacher mine (digits)"
    assert (first.latency, first.counts.parameters, first.memory) == ([], None, {})
    assert second.scores == first.scores
    assert student.memory == {32: 2**20}
    assert [(each.batch_size, each.threads) for each in student.latency] == [(2, 1), (2, 2)]


def test_a_student_that_has_seen_the_test_images_is_remarked_on(
    student_file: Path, digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    student, test = library.load_student(student_file), open_labelled_images(digits)
    assert leak_remarks([student], [test]) == []
    other = [test._replace(cache=replace(digits, id="0" * 64, test=digits.train))]
    assert leak_remarks([student], other) == [
        f"lenet5-taught-seed0 was trained from another cache than digits.h5, {digits.id[:12]}, which is not in cache/. "
        "If its training images are among these test images, its scores are too high."
    ]
    Path("cache").mkdir()
    Path("cache/digits.h5").symlink_to(digits.path)
    remarks = leak_remarks([student], other)
    expected = "1,000 of the test images are training images of lenet5-taught-seed0: its scores are too high."
    assert remarks == [expected]
    assert expected in notes([], test, remarks)
    assert leak_remarks([student], [test._replace(cache=replace(digits, id="0" * 64))]) == []


def test_caches_of_other_test_images_are_not_compared(digits: Cache, pool: Cache) -> None:
    tests = [open_labelled_images(digits), open_labelled_images(pool)]
    changed = replace(pool, test=replace(pool.test, labels=pool.test.labels[::-1].copy()))
    tests[1] = tests[1]._replace(cache=changed)
    with pytest.raises(library.CacheMismatch, match=f"^{pool.name} has other test images than {digits.name}"):
        evaluate(tests, [], 0)


def test_a_student_of_other_classes_is_refused(
    student_file: Path, digits: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, test = library.load_student(student_file), open_labelled_images(digits)
    monkeypatch.setitem(digits.manifest["preprocess"], "mean", [0.5])
    with pytest.raises(library.CacheMismatch, match=r"has another preprocessing than digits\.h5"):
        evaluate([test], [student])
    student.classes[0] = "nought"
    with pytest.raises(library.CacheMismatch, match=r"than digits\.h5: class 0 is 'nought' in place of '0'\. Evaluate"):
        evaluate([test], [student])


def test_latencies_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of each turn is left out if there are more."""
    order = []
    monkeypatch.setattr(latency, "available_cores", lambda: 2)
    monkeypatch.setattr(latency, "_TURN", 1)
    monkeypatch.setattr(latency.time, "perf_counter", itertools.count(0.0).__next__)

    def load(number: int, threads: int) -> latency.Run:
        return lambda pixels: order.append((number, threads, torch.get_num_threads(), tuple(pixels.shape)))

    subjects = [latency.Subject(partial(load, number), (1, 4, 4 + number)) for number in range(2)]
    before = torch.get_num_threads()
    results = latency.measure(subjects, 0)
    assert torch.get_num_threads() == before
    settings = [(each.batch_size, each.threads, each.n) for each in results[1]]
    assert settings == [(1, 1, 3), (32, 1, 3), (1, 2, 3), (32, 2, 3)]
    assert [number for number, *_ in order[:8]] == [0, 1] * 4
    assert {shape for number, *_, shape in order if number} == {(1, 1, 4, 5), (32, 1, 4, 5)}
    assert all(threads == set_threads for _, threads, set_threads, _ in order)
    assert {each.median for each in results[0]} == {1000}


def test_multiply_adds_are_those_of_convolutions_and_products(student_file: Path, tmp_path: Path) -> None:
    """By hand: a convolution in groups, 6·6·8·(4/2·3·3); a Linear, 288·5. ONNX files have the same counts."""
    module = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    image = torch.zeros(1, 4, 8, 8)
    expected = (8 * 18 + 8 + 288 * 5 + 5, 6 * 6 * 8 * 18 + 288 * 5)
    assert count_module(module, image) == expected
    torch.onnx.export(module, (image,), tmp_path / "x.onnx", dynamo=False)
    assert count_onnx(tmp_path / "x.onnx") == expected


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells peaks")
def test_memory_grows_with_the_batch(student_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(threads: int) -> latency.Run:
        return lambda pixels: torch.ones(len(pixels), 2**18, dtype=torch.int32)

    monkeypatch.setattr("tspipe.deploy.evaluate.open_subject", lambda path, network: latency.Subject(load, (1, 8, 8)))
    monkeypatch.setattr(_hub, "_trusted", False)
    peaks = memory._worker(student_file, None, trusted=True)
    assert _hub.trusts_remote_code()
    assert 28 < (peaks[32] - peaks[1]) / 2**20 < 36


def test_memory_that_cannot_be_measured_is_remarked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_hub, "_trusted", True)
    commands: list[list[str]] = []
    made = [
        subprocess.CompletedProcess((), 0, '{"1": 5, "32": 7}\n', ""),
        subprocess.CompletedProcess((), 1, "", "a\nb"),
    ]
    monkeypatch.setattr(memory.subprocess, "run", lambda command, **_: commands.append(command) or made.pop(0))
    monkeypatch.setattr(memory, "available_cores", lambda: 1)
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path)
    assert memory.measure([(Path("x"), None), (Path("y"), None)]) == [{1: 5, 32: 7}, {}]
    assert [json.loads(command[-1]) for command in commands] == [["x", None, True], ["y", None, True]]
    assert capsys.readouterr().err == "The memory of y cannot be measured: b\n"
