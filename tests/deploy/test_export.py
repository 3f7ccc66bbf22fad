"""Exporting students: every format runs without tspipe, and a file that computes something else is not written."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import tspipe as library
from shared import error_message
from tspipe.cache import Cache
from tspipe.data.datasets import open_dataset
from tspipe.deploy import formats
from tspipe.deploy.export import Export, ExportConfig, export
from tspipe.deploy.folder_images import FolderImages
from tspipe.deploy.labelled_images import find_test_images, open_labelled_images
from tspipe.deploy.student import Student
from tspipe.models.feature_net import student_of
from tspipe.models.probe import probe_images
from tspipe.training.run_folder import RunFolder

# Runs each file on images.npy in a process that cannot import tspipe, and writes the outputs and the class names.
PROGRAM = """
import importlib, json, sys
sys.modules["tspipe"] = None
import numpy, torch, onnxruntime
outputs = {}
for file in sys.argv[1:]:
    images = numpy.load("bytes.npy" if "uint8" in file else "floats.npy")
    if file.endswith(".onnx"):
        session = onnxruntime.InferenceSession(file)
        metadata = session.get_modelmeta().custom_metadata_map
        output = session.run(None, {"images": images})[0]
    elif file.endswith(".pt2"):
        files = {"tspipe.json": ""}
        output = torch.export.load(file, extra_files=files).module()(torch.from_numpy(images)).detach().numpy()
        metadata = json.loads(files["tspipe.json"])
    elif file.endswith(".pte"):
        from executorch.runtime import Runtime
        program = Runtime.get().load_program(file)
        metadata = json.loads(program.load_method("metadata").execute([])[0])
        forward = program.load_method("forward")
        output = torch.cat([forward.execute([image])[0].clone() for image in torch.from_numpy(images).split(1)]).numpy()
    else:
        sys.path.insert(0, ".")
        network, metadata = importlib.import_module(file.removesuffix(".safetensors")).load(file)
        output = network(torch.from_numpy(images)).numpy()
    assert json.loads(metadata["classes"]) == [str(i) for i in range(10)]
    outputs[file] = output
numpy.savez("outputs.npz", **outputs)
"""


def test_an_export_has_the_students_accuracy_and_fewer_weights(exports: list[Export], run: Path) -> None:
    accuracy = next(row["test_accuracy"] for row in RunFolder(run, {}, {}).rows()[::-1] if row["arm"] == "taught")
    for exported in exports:
        compared = exported.comparison
        assert compared.images == 797
        assert compared.real
        assert compared.relative < 1e-4
        assert compared.accuracy == compared.student_accuracy == pytest.approx(accuracy)
        assert exported.size == exported.path.stat().st_size
        assert exported.parameters == 5_822  # of 15,626 with g(x)
        assert exported.size < 4 * exported.parameters + 25_000


def test_every_format_runs_without_tspipe(exports: list[Export], student: Student) -> None:
    folder, test = exports[0].path.parent, open_dataset("digits").test
    pixels = np.stack([student.preprocess.apply(test.read(i)) for i in range(5)])
    floats = student.preprocess.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)).contiguous()
    np.save(folder / "bytes.npy", pixels)
    np.save(folder / "floats.npy", floats.numpy())
    names = [exported.path.name for exported in exports]
    subprocess.run([sys.executable, "-c", PROGRAM, *names], cwd=folder, check=True)
    probabilities = student.predict([test.read(i) for i in range(5)]).probabilities
    with torch.no_grad():
        logits = student(floats)
    outputs = np.load(folder / "outputs.npz")
    for name in names:
        expected = probabilities if "uint8" in name else logits
        torch.testing.assert_close(torch.from_numpy(outputs[name]), expected, rtol=1e-4, atol=1e-5)


def test_the_metadata_say_what_is_needed(exports: list[Export], student: Student) -> None:
    model = onnx.load(exports[1].path)
    onnx.checker.check_model(model)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["cache"] == student.facts.cache
    assert metadata["preprocess"].startswith('{"crop": null, "interpolation": "bilinear", "mean": [0.305], "resize": ')
    assert metadata["input"] == "(n, H, W, C) uint8, resized and cropped"
    assert 0.5 < float(metadata["test_accuracy"]) <= 1
    assert [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", "", "", ""]
    for exported in exports:
        assert str(Path(library.__file__).parent).encode() not in exported.path.read_bytes()


@pytest.mark.parametrize("name", ["torch", "safetensors"])
def test_a_file_that_computes_something_else_is_not_written(
    name: str, student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format_ = formats.FORMATS[name]

    def load(files: formats.Files) -> formats.Run:
        run = format_.load(files)
        return lambda images: run(images) * np.float32(1.01)

    monkeypatch.setitem(formats.FORMATS, name, format_._replace(load=load))
    with pytest.raises(
        library.NetworkError, match=r"computes other logits than the student, by up to 0\.01 of the larg"
    ):
        export(student, ExportConfig(name, tmp_path / "x"), None)
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    """A network with a branch on a value, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1) if x.mean() > 0 else -x.flatten(1))


class Looping(Branching):
    """A network with a loop over the images of a batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.fc(image.flatten()) for image in x])


class Singular(Branching):
    """A network with an operation that ONNX does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1) + torch.linalg.svdvals(x[:, 0]).sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Branching(), "x.mean() > 0"),
        (Looping(), "its operations depend on the number of images in a batch"),
        (Singular(), "ONNX has no aten._linalg_svd. Choose --format torch or --format safetensors"),
    ],
)
def test_what_cannot_be_exported_is_named(student: Student, module: nn.Module, reason: str, tmp_path: Path) -> None:
    network = student_of(module, "mine", 4, 10, probe_images((1, 16, 16)))
    other = Student(network, student.facts, tmp_path / "student-mine.safetensors").eval()
    message = error_message(export, other, ExportConfig("onnx", tmp_path / "x.onnx"), None)
    assert reason in message
    assert list(tmp_path.iterdir()) == []
    for name in re.findall(r"--format (\w+)", message):
        export(other, ExportConfig(name, tmp_path / name), None)


def test_an_int8_export_is_smaller_and_agrees_with_the_student(
    student: Student, exports: list[Export], digits: Cache, tmp_path: Path
) -> None:
    test = open_labelled_images(digits)
    exported = export(student, ExportConfig("onnx", tmp_path / "x.onnx", uint8=True, int8=True), test)
    assert exported.comparison.agreement > 0.95
    assert exported.comparison.relative > 1e-3  # it is quantised
    assert exported.size < 0.7 * exports[1].size
    model = onnx.load(exported.path)
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if len(tensor.dims) in (2, 4)]
    assert {str(weight.dtype) for weight in weights} == {"int8"}
    assert max(abs(weight.astype(int)).max() for weight in weights) <= 64  # so that 16-bit sums do not overflow
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert float(metadata["student_test_accuracy"]) == student.facts.test_accuracy
    assert "test_accuracy" not in metadata  # the file's own is another
    assert error_message(export, student, ExportConfig("torch", tmp_path / "y", int8=True), test) == (
        "The format torch cannot be quantised to int8. Choose --format onnx or --format executorch"
    )
    assert error_message(export, student, ExportConfig("onnx", tmp_path / "y", int8=True), None) == (
        "int8 takes its scales from images. Name some: --cache FILE, or --images FOLDER"
    )


def test_an_int8_program_for_phones_agrees_with_the_student(student: Student, digits: Cache, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install 'tspipe[executorch]'")
    test = open_labelled_images(digits)
    sizes = {}
    for int8 in (False, True):
        exported = export(student, ExportConfig("executorch", tmp_path / "x.pte", int8=int8), test)
        assert exported.comparison.agreement > 0.95
        assert (exported.comparison.relative > 1e-3) is int8
        sizes[int8] = exported.size
    assert sizes[True] < 0.7 * sizes[False]


def test_images_of_a_folder_stand_in_for_the_cache(student: Student, tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (20 + i, 30), (50 * i, 0, 99)).save(tmp_path / f"{i}.png")
    images = FolderImages(tmp_path, student.facts)
    exported = export(student, ExportConfig("safetensors", tmp_path / "x.safetensors"), images)
    assert exported.comparison.images == 5
    assert exported.comparison.real
    assert exported.comparison.accuracy is None
    assert images.training_sample(2).shape == (2, 1, 16, 16)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert error_message(formats.check_installed, "onnx") == (
        "The format onnx needs onnxscript: pip install 'tspipe[export]'"
    )
    monkeypatch.setitem(sys.modules, "executorch", None)
    assert error_message(formats.check_installed, "executorch") == (
        "The format executorch needs executorch: pip install 'tspipe[executorch]'"
    )


def test_a_package_for_another_pytorch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str) -> None:
        raise ImportError(f"{module}.so: undefined symbol")

    monkeypatch.setattr(formats.importlib, "import_module", fail)
    message = error_message(formats.check_installed, "onnx")
    assert message.startswith("onnx is installed and cannot be loaded: onnx.so: undefined symbol. A release of it may ")
    assert message.endswith("; install them together: pip install --upgrade torch 'tspipe[export]'")


def test_the_command(tspipe: Callable, run: Path, digits: Cache, tmp_path: Path) -> None:
    options = ["--student", "*-taught-*", "--format", "safetensors"]
    made = tspipe("export", run, *options, "--cache", digits.path, "--out", "a/x.safetensors")
    assert made.code == 0, made.err
    lines = made.out.splitlines()
    assert lines[0].startswith("a/x.safetensors: 2")
    assert lines[1].startswith("Its logits for 797 test images differ from the student's by up to ")
    assert lines[2].startswith("Its test accuracy is ")
    again = tspipe("export", run, *options, "--out", "a/x.safetensors")
    assert again.error == "a/x.safetensors exists already. Replace it with --force, or choose another --out."
    Path("mine.py").write_text("a network of the user's")
    again = tspipe("export", run, *options, "--out", "mine.safetensors")
    assert again.error == "mine.py exists already. Replace it with --force, or choose another --out."
    made = tspipe("export", run, *options, "--out", "a/x.safetensors", "--force")
    assert "Its logits for 17 random images differ" in made.out
    assert f"It was not run on real images: The student's cache, id {digits.id[:12]}, is not in cache/." in made.out
    with pytest.MonkeyPatch.context() as patch:  # before any work
        patch.setattr("tspipe.deploy.export.export", None)
        failed = tspipe("export", run, "--out", "mine.py/x.onnx")
    assert failed.error.startswith("mine.py/x.onnx cannot be written: ")
    assert tspipe("export", run, "--format", "tflite").code == 2
    assert tspipe("export", run, "--format", "safetensors", "--out", "x.py").code == 2
    made = tspipe("export", run, "--format", "safetensors", "--out", "best.safetensors")
    (name,) = re.findall(r"(\S+), the best of 2 students .*: epoch . of 3, the best by test accuracy, \d", made.err)
    assert name == library.load_student(run).name


def test_a_cache_is_found_by_its_id(
    digits: Cache, pool: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cache").mkdir()
    Path("cache/a.h5").write_text("no cache")
    Path("cache/b.h5").symlink_to(pool.path)
    assert "is not in cache/. Name it: --cache FILE" in str(find_test_images(digits.id, None, None))
    Path("cache/c.h5").symlink_to(digits.path)
    test = find_test_images(digits.id, None, None)
    assert not isinstance(test, str)
    assert test.cache.id == digits.id
    with pytest.raises(library.CacheMismatch, match=f"the student was trained from {digits.id[:12]}"):
        find_test_images(digits.id, pool.path, None)
