"""Training a teacher: it survives kills, and never overwrites other weights."""

import csv
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Result, Zygote
from shared import TEACHER, make_folder
from tspipe.errors import DatasetError, NetworkError, TrainingError
from tspipe.models import weights
from tspipe.recipes import load
from tspipe.training import checkpoint, teacher_weights
from tspipe.training.train_teacher import TeacherConfig, checkpoint_path, metrics_path, train_teacher


def config(out: Path, *overrides: str) -> TeacherConfig:
    return TeacherConfig(load.load("digits", [*TEACHER, *overrides]), out=out)


def test_the_file_describes_itself(teacher: Path) -> None:
    result = weights.read(teacher)
    assert result.metadata["dataset"] == "digits"
    assert result.metadata["network"] == "lenet5"
    assert result.metadata["preprocess"] == (
        '{"crop": null, "interpolation": "bilinear", "mean": [0.305], "resize": [16, 16], "std": [0.376]}'
    )
    assert 0.5 < float(result.metadata["accuracy"]) < 1  # three epochs: far from chance, far from done


def test_what_a_kill_at_the_very_end_left_is_removed(teacher: Path) -> None:
    for leftover in (".part", ".lock"):
        teacher.with_name(teacher.name + leftover).touch()
    assert train_teacher(config(teacher)).path == teacher
    assert [path.name for path in teacher.parent.glob("digits-*.safetensors*")] == [teacher.name]


@pytest.mark.parametrize("accuracy", ["nan", "1e999", "x", None])
def test_an_accuracy_that_is_no_fraction_is_refused(teacher: Path, tmp_path: Path, accuracy: str | None) -> None:
    path, trained = tmp_path / teacher.name, weights.read(teacher)
    metadata = {**trained.metadata, "accuracy": accuracy}
    weights.save(path, trained.tensors, {name: text for name, text in metadata.items() if text is not None})
    with pytest.raises(TrainingError) as refused:
        train_teacher(config(path))
    assert str(refused.value) == f"{path}: its metadata is damaged. Train the teacher again with --force."


def test_augmentation_changes_the_weights_and_is_reproducible(tmp_path: Path) -> None:
    files = []
    for name, shift in (("a", 2), ("b", 2), ("c", 0)):
        made = train_teacher(config(tmp_path / name, f"teacher.shift={shift}", "teacher.epochs=1"))
        files.append(weights.read(made.path).tensors["features.0.weight"])
    assert files[0].equal(files[1])
    assert not files[0].equal(files[2])


def test_a_killed_training_ends_with_the_same_weights(
    zygote: Zygote, tspipe: Callable[..., Result], teacher: Path, tmp_path: Path
) -> None:
    """The last command runs in this process: the others draw no curve."""
    out = tmp_path / "digits-lenet5.safetensors"
    part = tmp_path / "digits-lenet5.safetensors.part"
    settings = [f"--set={setting}" for setting in [*TEACHER, "checkpoint_seconds=0"]]
    draw, positions = random.Random(0), []
    for _ in range(5):
        zygote.run("teacher", "--dataset", "digits", "--out", out, *settings, seconds=draw.uniform(0.1, 0.6))
        if result := checkpoint.Checkpointer(part, 0, None).load():
            positions.append(result[1])
    assert positions == sorted(positions)
    assert tspipe("teacher", "--dataset", "digits", "--out", out, *settings).code == 0
    assert out.read_bytes() == teacher.read_bytes()
    metrics, uninterrupted = (read_metrics(metrics_path(path)) for path in (out, teacher))
    assert metrics == uninterrupted
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "digits-lenet5.curves.png",
        "digits-lenet5.metrics.csv",
        out.name,
    ]


def test_a_curve_that_a_kill_prevented_is_drawn_by_the_next_command(
    tmp_path: Path, tspipe: Callable[..., Result]
) -> None:
    command = ["teacher", "--dataset", "digits", "--out", "x.safetensors", *(f"--set={setting}" for setting in TEACHER)]
    assert tspipe(*command, "--epochs", 1).code == 0
    curve = (tmp_path / "x.curves.png").read_bytes()
    (tmp_path / "x.curves.png").unlink()
    assert "x.curves.png" in tspipe(*command, "--epochs", 1).out
    assert (tmp_path / "x.curves.png").read_bytes() == curve
    assert "x.curves.png" not in tspipe(*command, "--epochs", 1).out
    (tmp_path / "x.curves.png").unlink()
    (tmp_path / "x.metrics.csv").write_text("epoch,test_accuracy\n1,often\n")
    assert "x.curves.png" not in tspipe(*command, "--epochs", 1).out


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a teacher's metrics without their times."""
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert all(float(row.pop("seconds")) > 0 for row in rows)
    return rows


def test_each_epoch_has_a_line_and_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = train_teacher(config(tmp_path / "x.safetensors", "teacher.epochs=2", "teacher.lr_drop_every=1"))
    first, second = read_metrics(tmp_path / "x.metrics.csv")
    assert [(row["epoch"], float(row["lr"])) for row in (first, second)] == [("1", 0.003), ("2", pytest.approx(0.0003))]
    assert float(second["test_accuracy"]) == trained.accuracy == trained.metrics[-1]["test_accuracy"]
    assert float(second["loss"]) < float(first["loss"])
    assert 0 < float(first["train_accuracy"]) < float(second["train_accuracy"]) <= 1
    origin, *lines = capsys.readouterr().err.splitlines()
    assert origin == "Training lenet5 from random weights."
    assert [re.sub(r"[\d.]+%|loss [\d.]+|[\d.]+ s", "_", line) for line in lines] == [
        "epoch 1/2: _, train _, test _, lr 0.003, _",
        "epoch 2/2: _, train _, test _, lr 0.0003, _",
    ]


def test_the_layers_that_are_reinitialised_are_named(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = weights.read(teacher)
    other = {key: tensor[:4] if key.startswith("classifier.4") else tensor for key, tensor in start.tensors.items()}
    for tensors, expected in (
        (start.tensors, "every layer is loaded"),
        (other, "classifier.4 is reinitialised, every other layer is loaded"),
    ):
        fine_tuned = config(tmp_path / expected[:5], "teacher.epochs=1")
        train_teacher(replace(fine_tuned, start=start._replace(tensors=tensors)))
        origin = capsys.readouterr().err.splitlines()[0]
        assert origin == f"Fine-tuning lenet5 from {teacher} (SHA-256 {start.sha256[:12]}): {expected}."


def test_a_non_finite_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as refused:
        train_teacher(config(tmp_path / "x.safetensors", "teacher.lr=1e30", "checkpoint_seconds=0"))
    assert str(refused.value) == (
        "The teacher's loss is not finite in epoch 1. The last checkpoint is kept. "
        "Try a smaller learning rate: --set teacher.lr=1e+29"
    )
    # Other settings do not discard the checkpoint.
    with pytest.raises(TrainingError) as refused:
        train_teacher(config(tmp_path / "x.safetensors", "teacher.epochs=1"))
    assert str(refused.value) == (
        f"{tmp_path}/x.safetensors.part is a checkpoint of other settings or data. Use those to resume it, or delete "
        "it to start again."
    )
    made = train_teacher(replace(config(tmp_path / "x.safetensors", "teacher.epochs=1"), force=True))
    assert made.path.exists()


def test_too_few_images_for_a_batch(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as refused:
        train_teacher(config(tmp_path / "x", "teacher.batch_size=1001"))
    assert str(refused.value) == (
        "digits has 1,000 training images, too few for a batch of 1001. Use smaller batches: "
        "--set teacher.batch_size=250"
    )


def test_checkpoint_names() -> None:
    assert checkpoint_path("folder:birds", "torchvision:resnet18").name == "birds-torchvision-resnet18.safetensors"
    assert checkpoint_path("cifar10", "./mine.py").name == "cifar10-mine.safetensors"


def trained_on(folder: Path, out: Path, *overrides: str) -> TeacherConfig:
    """A LeNet-5 for one epoch on a folder of 16 images."""
    settings = [f"dataset=folder:{folder}", *TEACHER, "teacher.epochs=1", "teacher.batch_size=8", *overrides]
    return TeacherConfig(load.load("folder", settings), out=out)


def test_a_teacher_is_reused_only_for_its_data(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "photos"), tmp_path / "x.safetensors"
    before = train_teacher(trained_on(folder, out))._replace(metrics=())
    assert train_teacher(trained_on(folder, out)) == before

    def refusal() -> str:
        with pytest.raises(TrainingError) as refused:
            train_teacher(trained_on(folder, out))
        return str(refused.value)

    remedy = (
        "Train the teacher anew (tspipe teacher --force, with the same flags), or use it as it is: "
        f"add --weights {out}{{}} to the flags of tspipe cache."
    )
    same_classes, other_classes = remedy.format(""), remedy.format(" --set teacher.any_classes=true")
    first = folder / "train/a/00.png"
    pixels = first.read_bytes()
    first.write_bytes((folder / "train/a/01.png").read_bytes())
    assert refusal() == f"{out} was trained on other data: the pixels differ. {same_classes}"
    first.write_bytes(pixels)
    assert train_teacher(trained_on(folder, out)) == before
    (folder / "test/b/00.png").rename(folder / "test/a/77.png")
    changed = train_teacher(trained_on(folder, out))  # the weights remain, and are tested again
    assert changed.accuracy == train_teacher(trained_on(folder, tmp_path / "again.safetensors")).accuracy
    assert changed.accuracy != before.accuracy
    first.rename(folder / "train/b/77.png")  # a label is corrected
    assert refusal() == f"{out} was trained on other data: the images or labels differ. {same_classes}"
    for split in ("train", "test"):
        (folder / split / "a").rename(folder / split / "ant")
    difference = "class 0 is 'a' in place of 'ant' of this dataset"
    assert refusal() == f"{out} was trained on other data: {difference}. {other_classes}"
    trained = weights.read(out)
    weights.save(out, trained.tensors, {**trained.metadata, "classes": "["})
    difference = "the class names in its metadata cannot be read"
    assert refusal() == f"{out} was trained on other data: {difference}. {other_classes}"
    assert train_teacher(replace(trained_on(folder, out), force=True)).path == out


def test_a_checkpoint_found_by_its_name_is_used_only_for_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "photos")
    config = trained_on(folder, checkpoint_path("folder:photos", "lenet5"))
    path = train_teacher(config).path
    assert teacher_weights.read_weights(config, "folder:photos", None).source == str(path)
    (folder / "train/a/00.png").unlink()
    with pytest.raises(TrainingError, match="was trained on other data: the images or labels differ"):
        teacher_weights.read_weights(config, "folder:photos", None)
    assert teacher_weights.read_weights(config, "folder:photos", path).source == str(path)  # the user's decision
    weights.save(path, weights.read(path).tensors, {})
    unrecorded = teacher_weights.read_weights(config, "folder:photos", None)
    capsys.readouterr()
    for file in (path, None):
        teacher_weights.print_teacher(unrecorded, "lenet5", "folder:photos", file)
    assert capsys.readouterr().err == (
        f"{path} does not record on which data it was trained, so they are not compared with folder:photos.\n"
    )


def test_a_teacher_that_has_learned_nothing_is_remarked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = trained_on(make_folder(tmp_path / "photos"), tmp_path / "x.safetensors")
    for _ in range(2):  # a finished teacher, too
        teacher_weights.train_and_report(config)
        remark = capsys.readouterr().err.splitlines()[-1]
        assert remark.startswith("The teacher ") and "50.00%" in remark
        assert remark.endswith(
            "Likely reasons: labels of other images, a learning rate (0.003) that is too high or too low, or too few "
            "epochs (1)."
        )


@pytest.mark.parametrize(
    "text", ["[" * 10_000, "3", '{"mean":[0],"std":[1],"resize":[1000000,1000000]}', '{"mean":[NaN]}']
)
def test_hostile_metadata_are_refused(text: str) -> None:
    hostile = weights.Weights({}, {"preprocess": text}, "", "w.pt")
    with pytest.raises(NetworkError) as error:
        teacher_weights.recorded_settings(hostile, "resnet20")
    assert str(error.value) == "w.pt: its metadata is damaged. Train the teacher again with `tspipe teacher`."
