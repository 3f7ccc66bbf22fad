"""What lies in a run folder is checked before it is used; what is missing or damaged is computed again."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared import interrupted_at, untouched
from tspipe.cache import Cache
from tspipe.errors import RecipeError, ReportError
from tspipe.experiments import results
from tspipe.recipes import load
from tspipe.training import run_folder
from tspipe.training.checkpoint import Checkpointer
from tspipe.training.config import StudentConfig
from tspipe.training.evaluation import Evaluator
from tspipe.training.run_folder import RunFolder
from tspipe.training.trainer import train_students

STEPS = 4  # of a seed: two epochs of two batches
STUDENT = "student-lenet5-taught-random-seed{}.safetensors"


def config(cache: Cache, out: Path, *overrides: str) -> StudentConfig:
    settings = ["epochs=2", "seeds=2", "batch_size=500", "random_images=7", *overrides]
    return StudentConfig(
        load.load("digits", settings, facts={"preprocess": cache.manifest["preprocess"]}), cache, out=out
    )


@pytest.fixture(scope="module")
def finished(digits: Cache, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train_students(config(digits, tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture
def copy(finished: RunFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.path, tmp_path / "run"))


def students(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("student-*"))}


def metrics(path: Path) -> list[dict[str, object]]:
    rows = RunFolder(path, {}, {}).rows()
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def test_a_finished_run_states_its_files(finished: RunFolder) -> None:
    files = finished.read_json("summary.json")["files"]
    students = {STUDENT.format(f"{seed}{best}") for seed in (0, 1) for best in ("", "-best-test")}
    assert set(files) == {"metrics.csv", "random_labels.json", *students}
    assert finished.damaged_files() == []


@pytest.mark.parametrize(
    ("name", "damage", "steps"),
    [
        (STUDENT.format(0), Path.unlink, 2 * STEPS),
        (STUDENT.format(1), cut, STEPS),
        (STUDENT.format("1-best-test"), flip, STEPS),
        ("metrics.csv", cut, STEPS),
        ("metrics.csv", Path.unlink, 2 * STEPS),
        ("random_labels.json", cut, 0),
        ("random_labels.json", lambda path: path.write_text('{"8": 1' + "0" * 400 + "}"), 0),
        ("summary.json", cut, 0),
        ("summary.json", lambda path: path.write_text('{"files": {"../x": 3}}'), 0),
        ("summary.json", lambda path: path.write_text("[" * 100_000), 0),
    ],
)
def test_what_a_finished_run_has_lost_is_made_again(
    digits: Cache, finished: RunFolder, copy: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    damage: Callable[[Path], object], steps: int, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage(copy / name)
    taken = interrupted_at(monkeypatch)
    train_students(config(digits, copy))
    assert len(taken) == steps
    message = f"{copy} is a finished run, but missing or damaged: {name}."
    assert message in capsys.readouterr().err
    assert students(copy) == students(finished.path)
    assert metrics(copy) == metrics(finished.path)
    assert (copy / "random_labels.json").read_bytes() == (finished.path / "random_labels.json").read_bytes()
    before = {path: untouched(path) for path in copy.iterdir()}
    train_students(config(digits, copy))
    assert {path: untouched(path) for path in copy.iterdir()} == before


@pytest.mark.parametrize("change", [lambda rows: rows.replace("0.", "0.1", 1), lambda rows: f"{rows}\0\0\n1,2\n"])
def test_changed_metrics_of_a_finished_run_are_refused(digits: Cache, copy: Path, change: Callable[[str], str]) -> None:
    (copy / "metrics.csv").write_text(change((copy / "metrics.csv").read_text()))
    with pytest.raises(RecipeError) as refused:
        train_students(config(digits, copy))
    assert str(refused.value) == (
        f"{copy}/metrics.csv has changed since the run was finished. Restore it, or choose another --out."
    )


@pytest.fixture(scope="module")
def other(digits: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another config, whose files have the same names."""
    return train_students(config(digits, tmp_path_factory.mktemp("other") / "run", "lr=0.00001")).path


@pytest.mark.parametrize(
    ("names", "removed"),
    [
        (["metrics.csv", "summary.json", STUDENT.format(0), STUDENT.format(1)], []),
        (["metrics.csv", STUDENT.format(0), STUDENT.format(1)], ["summary.json"]),
        (["metrics.csv"], ["summary.json"]),
        (["metrics.csv", "summary.json"], []),
    ],
)
def test_the_files_of_another_run_are_not_used(
    digits: Cache, finished: RunFolder, copy: Path, other: Path, names: list[str], removed: list[str]
) -> None:
    for name in names:
        shutil.copy(other / name, copy / name)
    for name in removed:
        (copy / name).unlink()
    if "summary.json" in names:
        with pytest.raises(ReportError, match=r"summary\.json is of another run"):
            results.read(results.open_run(copy))
    train_students(config(digits, copy))
    assert students(copy) == students(finished.path)
    assert metrics(copy) == metrics(finished.path)


@pytest.mark.parametrize("source", [0, "1-best-test"])
def test_a_student_under_the_name_of_another_is_not_used(
    digits: Cache, finished: RunFolder, copy: Path, monkeypatch: pytest.MonkeyPatch, source: object
) -> None:
    (copy / "summary.json").unlink()
    shutil.copy(copy / STUDENT.format(source), copy / STUDENT.format(1))
    trained = interrupted_at(monkeypatch)
    train_students(config(digits, copy))
    assert len(trained) == STEPS
    assert students(copy) == students(finished.path)


@pytest.mark.parametrize(("step", "steps"), [(4, 8), (STEPS + 4, 8)])
def test_the_metrics_of_another_run_are_not_continued(
    digits: Cache, finished: RunFolder, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    step: int, steps: int,
) -> None:  # fmt: skip
    interrupted(digits, tmp_path / "run", step)
    count = len((tmp_path / "run/metrics.csv").read_text().splitlines())
    lines = (other / "metrics.csv").read_text().splitlines(keepends=True)[:count]
    (tmp_path / "run/metrics.csv").write_text("".join(lines))
    trained = interrupted_at(monkeypatch)
    train_students(config(digits, tmp_path / "run"))
    assert len(trained) == steps
    assert metrics(tmp_path / "run") == metrics(finished.path)


def interrupted(digits: Cache, out: Path, step: int) -> None:
    """Interrupt a run in place of a step, counted from 1, with a checkpoint after every step before."""
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train_students(config(digits, out, "checkpoint_seconds=0"))


@pytest.mark.parametrize(
    ("damaged", "steps"),
    [
        ([], 1),
        (["checkpoint.safetensors"], 2),
        (["checkpoint.safetensors", "checkpoint.previous.safetensors"], 4),
        ([STUDENT.format(0)], 8),
        (["metrics.csv"], 4),
        ([STUDENT.format(0), "checkpoint.safetensors", "checkpoint.previous.safetensors"], 8),
    ],
)
def test_a_run_resumes_from_what_is_sound(
    digits: Cache, finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: list[str], steps: int
) -> None:
    interrupted(digits, tmp_path / "run", STEPS + 4)  # in the second epoch of the second seed
    for name in damaged:
        cut(tmp_path / "run" / name)
    taken = interrupted_at(monkeypatch)
    train_students(config(digits, tmp_path / "run"))
    assert len(taken) == steps
    assert students(tmp_path / "run") == students(finished.path)
    assert metrics(tmp_path / "run") == metrics(finished.path)


def test_the_checkpoint_of_another_run_is_not_used(
    digits: Cache, finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    interrupted(digits, out, 3)
    checkpointer = Checkpointer(out / "checkpoint.safetensors", 0, None)
    checkpoint = checkpointer.load()
    assert checkpoint is not None
    Checkpointer(checkpointer.path, 0, "another").save(checkpoint.tensors, checkpoint.position)
    (out / "checkpoint.previous.safetensors").unlink()
    train_students(config(digits, out))
    assert f"{checkpointer.path} is a checkpoint of other settings or data." in capsys.readouterr().err
    assert students(out) == students(finished.path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"config": {"a', "Unterminated string starting at: line 1 column 13 (char 12)"),
        ("[]", ": Input should be a valid dictionary or instance of _ConfigFile"),
        ('{"config": {}}', "environment: Field required"),
        ('{"config": {}, "environment": {"device": "cpu", "threads": 1000000}}',
         "environment.threads: Input should be less than or equal to 1024"),
    ],
)  # fmt: skip
def test_a_damaged_config_is_refused(digits: Cache, tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RecipeError) as refused:
        train_students(config(digits, tmp_path))
    file = tmp_path / "config.json"
    assert str(refused.value) == (
        f"{file} is not as tspipe student writes it: {reason}. Restore it, or choose another --out."
    )


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "summary.json", "random_labels.json",
                                  "checkpoint.safetensors", STUDENT.format(0)])  # fmt: skip
def test_named_pipes_are_not_waited_for(digits: Cache, copy: Path, finished: RunFolder, name: str) -> None:
    if name not in ("config.json", "summary.json"):
        (copy / "summary.json").unlink()
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    if name in ("config.json", "metrics.csv"):
        with pytest.raises(RecipeError) as refused:
            train_students(config(digits, copy))
        assert str(refused.value) == f"{copy / name} cannot be read: it is not a regular file."
    else:
        train_students(config(digits, copy))
        assert students(copy) == students(finished.path)


def test_a_file_without_permission_is_one_sentence(digits: Cache, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(run_folder, "read_file", refuse)
    with pytest.raises(RecipeError) as refused:
        train_students(config(digits, copy))
    assert str(refused.value) == f"{copy}/config.json cannot be read: Permission denied."


def test_a_run_does_not_write_into_a_folder_that_was_replaced(
    digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = tmp_path / "run", Evaluator.rows

    def replace_folder(*arguments: Any) -> Any:
        shutil.rmtree(out)
        out.mkdir()
        (out / "run.lock").write_text("process 1 on another-host")
        return rows(*arguments)

    monkeypatch.setattr(Evaluator, "rows", replace_folder)
    with pytest.raises(RecipeError, match=f"^{out} was deleted or replaced while this process was writing it"):
        train_students(config(digits, out))
    assert [path.name for path in out.iterdir()] == ["run.lock"]


def test_what_a_kill_at_the_very_end_leaves_is_removed(digits: Cache, copy: Path) -> None:
    dead = 2**22 + 1  # no process has this number
    left = [f".summary.json.{dead}@{os.uname().nodename}.{'0' * 16}.tmp", "run.lock", *run_folder.CHECKPOINTS]
    for name in left:
        (copy / name).write_bytes(b"")
    train_students(config(digits, copy))
    assert not any((copy / name).exists() for name in left)


def test_escape_sequences_of_a_foreign_run_are_not_printed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tspipe.training.metrics_log import loss_ratios

    row = {"student": "\x1b[31ma", "arm": "\x1b]0;x\x07", "epoch": 1, "mse": 1.0, "xent": 2.0}
    (sentence,) = loss_ratios([row], hint=False)
    assert sentence == r"\x1b[31ma, \x1b]0;x\x07, epoch 1: mse 1 / xent 2 = 0.5, as expected"
