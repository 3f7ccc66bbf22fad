"""The command that `tspipe cache` prints last has all that stage two needs, whatever the dataset and the teacher."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared import make_folder
from tspipe.experiments import report
from tspipe.models import networks, weights
from tspipe.models.teacher import load_teacher
from tspipe.training import trainer
from tspipe.training.config import StudentConfig
from tspipe.training.run_data import open_run_data

DATASET = """
import numpy as np
from tspipe.data.datasets import from_array
def load(root, split):
    return from_array(np.arange(16 * 16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 16, 3), np.arange(16) % 2, ["a", "b"])
"""
NETWORK = """
from tspipe.models.networks import lenet5
def build(num_classes, input_shape):
    return lenet5.build(num_classes, input_shape)
"""
RECIPE = 'base = "folder"\nbatch_size = 8\n[preprocess]\nmean = [0.5, 0.5, 0.5]\nstd = [0.2, 0.2, 0.2]\n'
OWN = ["--teacher", "./my nets/net.py"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--dataset folder:photos/pets", "--data photos/pets"),
        ("--dataset folder --data photos/pets", "--data photos/pets"),
        ("--dataset folder:unsplit --split 0.25", "--data unsplit"),
        ("--dataset folder:photos/pets --images", ""),
        ("--dataset folder:photos/pets --random-pool 8", "--data photos/pets --set random_source=pool"),
        ("--dataset folder:photos/pets --recipe './my recipe.toml'", "--data photos/pets --recipe './my recipe.toml'"),
        ("--dataset ./data.py --recipe folder", "--recipe folder --set dataset=./data.py"),
        ("--dataset ./data.py --recipe folder --images", "--recipe folder"),
        ("--dataset folder:photos/pets --images --portable-teacher --teacher './my nets/net.py'", ""),
        (
            "--dataset folder:photos/pets --teacher './my nets/net.py'",
            "--data photos/pets --teacher './my nets/net.py'",
        ),
    ],
)
def test_the_next_command(
    flags: str, expected: str, tspipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "photos" / "pets")
    shutil.copytree(tmp_path / "photos" / "pets" / "train", tmp_path / "unsplit")
    for name, text in {"data.py": DATASET, "my nets/net.py": NETWORK, "my recipe.toml": RECIPE}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    torch.manual_seed(0)
    weights.save(tmp_path / "w.safetensors", networks.build("lenet5", 2, (3, 16, 16)), {})
    teacher = [] if "--teacher" in flags else ["--teacher", "lenet5"]
    sizes = ["--set=preprocess.resize=[16,16]", "--set=preprocess.crop=none"]
    made = tspipe("cache", *shlex.split(flags), *teacher, *sizes, "--weights", "w.safetensors", "--out", "my cache.h5")
    assert made.code == 0, made.err
    command = made.out.splitlines()[-1].removeprefix("Next: ")
    assert command.split("'my cache.h5'") == ["tspipe student --cache ", f" {expected}" if expected else ""]

    configs = list[StudentConfig]()
    monkeypatch.setattr(trainer, "train_students", lambda config, group: configs.append(config))
    monkeypatch.setattr(report, "show", lambda run: None)
    planned = tspipe(*shlex.split(command)[1:], "--set=batch_size=4", "--random-images=2", "--student=lenet5")
    assert planned.code == 0, planned.err
    data = open_run_data(configs[0], torch.device("cpu"))
    assert data.train_count == len(configs[0].cache.train)
    load_teacher(configs[0].cache, configs[0].recipe, data.train.shape, torch.device("cpu"))
