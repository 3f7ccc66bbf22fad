"""A small run whose students the tests of this folder load, export and compare."""

from pathlib import Path

import pytest

from tspipe.cache import Cache
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
