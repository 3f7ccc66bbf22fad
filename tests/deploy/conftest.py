"""A small run whose students the tests of this folder load, export and compare, and one export to each format."""

import importlib.util
from pathlib import Path

import pytest

from tspipe.cache import Cache
from tspipe.deploy.export import Export, ExportConfig, export
from tspipe.deploy.formats import FORMATS
from tspipe.deploy.labelled_images import open_labelled_images
from tspipe.deploy.student import Student, load_student
from tspipe.recipes import load
from tspipe.training.arms import ALONE, TAUGHT
from tspipe.training.config import StudentConfig
from tspipe.training.trainer import train_students


@pytest.fixture(scope="session")
def run(digits: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train LeNet-5 on the digits for three epochs, alone and taught; return the run folder."""
    recipe = load.load("digits", ["epochs=3", "seeds=1", "lr=0.003"])
    out = tmp_path_factory.mktemp("runs") / "digits"
    return train_students(StudentConfig(recipe, digits, (ALONE, TAUGHT), out=out)).path


@pytest.fixture(scope="session")
def student_file(run: Path) -> Path:
    """Return the file of the run's taught student."""
    return run / "student-lenet5-taught-seed0.safetensors"


@pytest.fixture(scope="session")
def student(student_file: Path) -> Student:
    """Return the run's taught student."""
    return load_student(student_file)


@pytest.fixture(scope="session")
def exports(student: Student, digits: Cache, tmp_path_factory: pytest.TempPathFactory) -> list[Export]:
    """Export the student to every format, in an empty folder: ONNX first, of which the second takes bytes."""
    folder, test = tmp_path_factory.mktemp("exports"), open_labelled_images(digits)
    kinds = [("onnx", False), ("onnx", True), ("torch", False), ("safetensors", True)]
    kinds += [("executorch", True)] if importlib.util.find_spec("executorch") else []
    configs = [
        ExportConfig(name, folder / f"{name}{'_uint8' * uint8}{FORMATS[name].suffix}", uint8) for name, uint8 in kinds
    ]
    return [export(student, config, test) for config in configs]
