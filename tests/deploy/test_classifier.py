"""Classifying files and folders on the command line, with students and exports."""

import csv
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image

import tspipe as library
from shared import error_message
from tspipe.data.datasets import open_dataset
from tspipe.deploy.classifier import find_images
from tspipe.deploy.export import Export, ExportConfig, export
from tspipe.deploy.exported import OnnxExport, load_classifier
from tspipe.deploy.rebuilt import RebuiltExport
from tspipe.deploy.student import Student
from tspipe.errors import DatasetError
from tspipe.models import networks
from tspipe.models.feature_net import student_of
from tspipe.models.probe import probe_images

MINE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(256, classes)
        self.register_buffer("shift", torch.ones(1), persistent=False)

    def forward(self, images):
        with torch.autocast("cpu", enabled=False):  # a region, which is a module of its own in the program
            images = images * torch.tensor(2.0)
        return self.fc(images.flatten(1) + self.shift)

def build(num_classes):
    return Net(num_classes)
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write five digits in two folders, a broken image, a text file and a hidden image."""
    test, folder = open_dataset("digits").test, tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    (folder / "b" / ".hidden").mkdir(parents=True)
    for i in range(5):
        Image.fromarray(test.read(i)[:, :, 0]).save(folder / "ab"[i % 2] / f"{i}.png")
    (folder / "a" / "broken.png").write_bytes(b"broken")
    (folder / "a" / "notes.txt").write_text("notes")
    Image.new("L", (8, 8)).save(folder / "b" / ".hidden" / "x.png")
    return folder


def test_a_folder_is_classified(tspipe: Callable, student_file: Path, photos: Path) -> None:
    result = tspipe("predict", student_file, photos, "--top", 2, "--batch-size", 2)
    assert result.code == 1  # because of the broken image
    assert "broken.png is not an image that Pillow knows." in result.err
    names = [f"{photos}/{name}.png" for name in ("a/0", "a/2", "a/4", "b/1", "b/3")]
    probabilities = library.load_student(student_file).predict(names).probabilities
    for line, name, row in zip(result.out.splitlines(), names, probabilities, strict=True):
        (first, second), best = row.topk(2)
        assert line == f"{name}: {best[0]} {first:.1%}, {best[1]} {second:.1%}"


def test_json_and_csv_have_the_same_predictions(tspipe: Callable, student_file: Path, photos: Path) -> None:
    result = tspipe("predict", student_file, photos / "b", photos / "a" / "0.png", "--json")
    assert result.code == 0, result.err
    records = json.loads(result.out)
    assert [Path(record["image"]).name for record in records] == ["1.png", "3.png", "0.png"]
    assert all(len(record["predictions"]) == 3 for record in records)
    result = tspipe("predict", student_file, photos / "b", photos / "a" / "0.png", "--csv")
    rows = list(csv.reader(io.StringIO(result.out)))
    assert rows[0][:3] == ["image", "class_1", "probability_1"]
    for row, record in zip(rows[1:], records, strict=True):
        assert row[:2] == [record["image"], record["predictions"][0]["class"]]
        assert float(row[2]) == pytest.approx(record["predictions"][0]["probability"], abs=1e-6)
    (broken,) = json.loads(tspipe("predict", student_file, photos / "a" / "broken.png", "--json").out)
    assert broken["error"].endswith("is not an image that Pillow knows.")
    assert tspipe("predict", student_file, photos, "--json", "--csv").code == 2


def test_exports_predict_as_their_student(
    tspipe: Callable,
    student_file: Path,
    exports: list[Export],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a `.pt2` archive and a `.safetensors` export only tensors are read; no code in or beside them is run."""
    monkeypatch.setattr("torch.export.load", None)
    (tmp_path / "x.py").write_text("raise SystemExit")
    by_student = tspipe("predict", student_file, photos / "b", "--top", 1)
    for exported in exports:
        file = Path(shutil.copy(exported.path, tmp_path / f"x{exported.path.suffix}"))
        assert tspipe("predict", file, photos / "b", "--top", 1) == by_student
    with zipfile.ZipFile(tmp_path / "x.pt2") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for old, new, reason in (
        (b'"use_pickle": false', b'"use_pickle": true', "0.features.0.weight.use_pickle: Input should be False"),
        (b'"as_int": 25', b'"as_int": 250', "out of bounds for storage"),
        (b"0.features.0.weight", b"0.features.9.weight", "its tensors are not those of lenet5"),
    ):
        with zipfile.ZipFile(tmp_path / "y.pt2", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data.replace(old, new) if name.endswith("weights_config.json") else data)
        assert reason in error_message(RebuiltExport, tmp_path / "y.pt2")


def test_an_export_that_has_changed_is_refused(exports: list[Export], tmp_path: Path) -> None:
    """A bit of a weight, which the formats themselves do not check, and a class name."""
    for exported in exports:
        data, file = exported.path.read_bytes(), tmp_path / f"x{exported.path.suffix}"
        file.write_bytes(data[:-99] + bytes([data[-99] ^ 1]) + data[-98:])
        if file.suffix == ".safetensors":
            assert error_message(load_classifier, file).startswith(f"{file} has changed since tspipe wrote it")
        if file.suffix != ".pt2":  # which has a CRC of each member
            file.write_bytes(data.replace(b'"7"', b'"x"', 1).replace(b'\\"7\\"', b'\\"x\\"', 1))
            assert error_message(load_classifier, file).startswith(f"{file} has changed since tspipe wrote it")


def test_constants_of_a_program_are_not_weights(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the forward makes, and buffers that are not in the state dict."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    network = student_of(networks.build("./mine.py", 10, (1, 16, 16)), "mine", 4, 10, probe_images((1, 16, 16)))
    facts = student.facts.model_copy(update={"network": "mine"})
    other = Student(network, facts, tmp_path / "student-mine.safetensors").eval()
    for name, file in (("safetensors", Path("x.safetensors")), ("torch", Path("x.pt2"))):
        export(other, ExportConfig(name, file), None)
        pixels = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
        rebuilt = RebuiltExport(file, "./mine.py").probabilities(pixels)
        torch.testing.assert_close(rebuilt, other.probabilities(pixels))


def test_only_an_export_of_tspipes_is_run(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    assert error_message(OnnxExport, path) == f"There is no file {path}."
    path.write_bytes(b"damaged")
    assert error_message(OnnxExport, path) == f"{path} is damaged, or not an ONNX file."
    value = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1])
    output = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["images"], ["logits"])], "x", [value], [output])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    assert error_message(OnnxExport, path).startswith(f"{path} is not an export of tspipe's: its metadata, cache: ")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(DatasetError, match="has no images that Pillow decodes"):
        find_images([tmp_path])
