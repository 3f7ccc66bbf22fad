"""Loading a student: what it computes, and what a file may not do."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tspipe
from shared import error_message
from tspipe.cache import Cache
from tspipe.data.datasets import open_dataset
from tspipe.errors import DatasetError
from tspipe.models import weights
from tspipe.training.run_folder import RunFolder


@pytest.fixture
def altered(student_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a copy of the student's file with other metadata."""

    def alter(**metadata: str | None) -> Path:
        read = weights.read(student_file)
        path = tmp_path / "student-x.safetensors"
        fields = {name: value for name, value in {**read.metadata, **metadata}.items() if value is not None}
        weights.save(path, read.tensors, fields)
        return path

    return alter


def test_a_loaded_student_has_the_accuracy_of_its_run(run: Path, digits: Cache) -> None:
    rows = {(row["arm"], row["epoch"]): row["test_accuracy"] for row in RunFolder(run, {}, {}).rows()}
    test = open_dataset("digits").test
    for arm, last in itertools.product(("alone", "taught"), (False, True)):
        student = tspipe.load_student(run, student=f"lenet5-{arm}-seed0", last=last)
        accuracy = rows[arm, student.facts.epoch]
        assert accuracy == (rows[arm, 3] if last else max(rows[arm, epoch] for epoch in (1, 2, 3)))
        assert (student.facts.test_accuracy, student.facts.selected) == (accuracy, "last" if last else "test")
        labels, probabilities = student.predict([test.read(i) for i in range(len(test))])
        assert (labels.numpy() == test.labels).mean() == pytest.approx(accuracy)
        assert probabilities.shape == (len(test), 10)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(len(test)))
        assert student.classes == digits.classes
        assert student.preprocess.as_dict() == digits.manifest["preprocess"]
    assert max(rows.values()) > 0.5


def test_a_student_changed_since_its_run_is_refused(run: Path, student_file: Path, tmp_path: Path) -> None:
    for name in ("config.json", "metrics.csv", "summary.json"):
        shutil.copy(run / name, tmp_path / name)
    changed = Path(shutil.copy(run / "student-lenet5-alone-seed0.safetensors", tmp_path / student_file.name))
    for path, pattern in ((changed, None), (tmp_path, "*taught*")):
        assert error_message(lambda p=path, s=pattern: tspipe.load_student(p, student=s)) == (
            f"{changed} is not the student that its run wrote: summary.json states another SHA-256. Train it again "
            f"with the run's command: tspipe student --cache CACHE --out {tmp_path}, and the settings in config.json"
        )
    shutil.copy(student_file, changed)
    assert tspipe.load_student(changed).name == "lenet5-taught-seed0"


def test_of_a_run_the_best_student_is_loaded(run: Path) -> None:
    rows = RunFolder(run, {}, {}).rows()
    best, best_at_the_end = (max(part, key=lambda row: row["test_accuracy"]) for part in (rows, rows[-2:]))
    assert tspipe.load_student(run).name == f"lenet5-{best['arm']}-seed0-best-test"
    assert tspipe.load_student(run, last=True).name == f"lenet5-{best_at_the_end['arm']}-seed0"
    for pattern in ("*-taught-*", "lenet5-taught-seed0", "lenet5-taught-seed0-best-test"):
        assert tspipe.load_student(run, student=pattern).name == "lenet5-taught-seed0-best-test"


def test_paths_pictures_and_arrays_give_the_same(student_file: Path, tmp_path: Path) -> None:
    student, pixels = tspipe.load_student(student_file), open_dataset("digits").test.read(0)
    image = Image.fromarray(pixels[:, :, 0])
    image.save(tmp_path / "grey.png")
    image.convert("RGB").save(tmp_path / "colour.png")
    pictures = [tmp_path / "grey.png", str(tmp_path / "colour.png"), image, pixels, pixels[:, :, 0]]
    probabilities = student.predict(pictures, batch_size=2).probabilities
    torch.testing.assert_close(probabilities, probabilities[:1].expand(5, -1))
    assert student.predict(tmp_path / "grey.png").labels.shape == (1,)
    assert student.predict([]).labels.shape == (0,)
    images = student.preprocess(image)[None]
    torch.testing.assert_close(student(images).softmax(1), probabilities[:1])
    with pytest.raises(DatasetError, match=r"float32 of shape \(8, 8, 1\)\. Give paths"):
        student.predict([pixels.astype(np.float32)])
    torch.testing.assert_close(student.predict(pixels).probabilities, probabilities[:1])  # one image, not 8 rows
    assert student.predict(np.stack([pixels, pixels])).labels.shape == (2,)
    with pytest.raises(DatasetError, match=r"uint8 of shape \(0, 8, 1\)\. Give paths"):
        student.predict([pixels[:0]])
    with pytest.raises(DatasetError, match="has 7 channels, and the student takes 1"):
        student.predict(torch.zeros(1, 3, 8, 7, dtype=torch.uint8))


def test_an_image_of_another_size_is_refused(altered: Callable[..., Path], student_file: Path) -> None:
    preprocess = json.loads(weights.read(student_file).metadata["preprocess"])
    student = tspipe.load_student(altered(preprocess=json.dumps({**preprocess, "resize": None})))
    with pytest.raises(DatasetError, match=r"has 20×16 pixels .* takes 16×16 without resizing"):
        student.predict([np.zeros((20, 16, 1), np.uint8)])


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("classes", None, "its metadata, classes: field required"),
        ("classes", '["a", "a"]', "a class name occurs twice"),
        ("cache", "x", "its metadata, cache: "),
        ("input_shape", "[1, 16]", "its metadata, input_shape: "),
        ("input_shape", "[1, 16, 1000000]", "its metadata, input_shape: "),
        ("input_shape", "[1, 32, 32]", "preprocess does not yield images of 1×32×32"),
        ("network", "./mine.py", "its metadata, network: "),
        ("network", "mine\x1b[31m", "its metadata, network: "),
        ("options", "[]", "its metadata, options: "),
        ("preprocess", '{"mean": [0.5], "std": [0]}', "std must be positive"),
        ("preprocess", '{"mean": [0.5], "std": [1], "resize": [16, 16], "more": 1}', "its metadata, preprocess: "),
        ("width", "many", "its metadata, width: "),
        ("test_accuracy", "nan", "its metadata, test_accuracy: "),
        ("selected", "guess", "its metadata, selected: "),
    ],
)
def test_false_metadata_are_refused(altered: Callable[..., Path], field: str, value: str | None, reason: str) -> None:
    message = error_message(tspipe.load_student, altered(**{field: value}))
    assert "student-x.safetensors is not a student of tspipe's: " in message
    assert reason in message


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"width": "65"}, "is damaged: its head is not of 65 features and 10 classes."),
        ({"network": "resnet18"}, "does not fit resnet18: "),
        ({"network": "alexnet"}, "far too few for its network alexnet."),
        ({"options": '{"deep": 1}'}, "lenet5 has no option 'deep'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    altered: Callable[..., Path], metadata: dict[str, str], reason: str
) -> None:
    assert reason in error_message(tspipe.load_student, altered(**metadata))


def test_a_network_of_the_users_is_named_and_never_imported_by_itself(
    altered: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "from tspipe.models.networks.lenet5 import build\nopen('imported', 'w').close()\n"
    Path("mine.py").write_text(source)
    assert error_message(tspipe.load_student, altered(network="mine")) == (
        f"{tmp_path}/student-x.safetensors is a student of 'mine', which is not one of tspipe's networks. Name the "
        "network's file: --network ./mine.py (in Python: load_student(…, network='./mine.py'))"
    )
    assert "which is not one of" in error_message(tspipe.load_student, altered(network="mine.py"))
    assert not Path("imported").exists()
    student = tspipe.load_student(altered(network="mine"), network="./mine.py")
    assert student.predict([np.zeros((8, 8), np.uint8)]).labels.shape == (1,)
    assert Path("imported").exists()
    with pytest.raises(tspipe.NetworkError, match=r"is a student of the network 'lenet5', not of ./mine.py"):
        tspipe.load_student(altered(), network="./mine.py")
    assert tspipe.load_student(altered(), network=["./mine.py"]).facts.network == "lenet5"
    assert tspipe.load_student(altered(network="mine"), network=["./x.py", "./mine.py"]).facts.network == "mine"


def test_what_is_no_student_is_refused(run: Path, teacher: Path, tmp_path: Path) -> None:
    def message(*arguments: Any, **options: Any) -> str:
        with pytest.raises(tspipe.NetworkError) as error:
            tspipe.load_student(*arguments, **options)
        return str(error.value)

    assert "There is no student" in message(tmp_path / "absent.safetensors")
    assert "has no students" in message(tmp_path)
    assert "is not a student of tspipe's" in message(teacher)
    read = weights.read(run / "student-lenet5-taught-seed0.safetensors")
    broken = {**read.tensors, "head.bias": read.tensors["head.bias"] * torch.nan}
    weights.save(tmp_path / "x.safetensors", broken, read.metadata)
    assert "has weights that are not finite" in message(tmp_path / "x.safetensors")
    (tmp_path / "photo.jpg").write_bytes(b"")
    assert "photo.jpg is not a student" in message(tmp_path / "photo.jpg")
    assert message(run, student="resnet*").endswith(
        "has no student resnet*. There are: lenet5-alone-seed0, lenet5-taught-seed0."
    )


def test_loading_leaves_torchs_generator_alone(student_file: Path) -> None:
    before = torch.get_rng_state()
    tspipe.load_student(student_file).predict([np.zeros((8, 8), np.uint8)])
    assert torch.equal(torch.get_rng_state(), before)
