"""Helpers that several test files use."""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from tspipe.cache.inspect import inspect
from tspipe.errors import NetworkError
from tspipe.extraction.extract import Contents, ExtractConfig
from tspipe.models import networks, weights
from tspipe.recipes import load
from tspipe.training import batches, learner
from tspipe.training.run_folder import RunFolder

HOSTILE = "<script>alert('it\"s')</script>\x1b[31m"  # in a page and on a terminal

# LeNet-5 teaches LeNet-5: the digits in a tenth of a second an epoch.
TEACHER = [
    "teacher.network=lenet5",
    "teacher.epochs=3",
    "teacher.optimizer=adam",
    "teacher.lr=0.003",
    "teacher.shift=0",
]


def make_folder(root: Path, train: int = 8, test: int = 4) -> Path:
    """Write random 16×16 colour images of two classes, a and b, in the layout of the dataset `folder`."""
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in ("a", "b"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return root


def small(folder: Path, *settings: str) -> ExtractConfig:
    """Return the configuration of stage one for 16 and 8 images in blocks of 4, and an untrained LeNet-5."""
    if not folder.exists():
        make_folder(folder)
        torch.manual_seed(0)
        weights.save(folder / "w.safetensors", networks.build("lenet5", 2, (3, 16, 16)), {})
    settings = (f"dataset=folder:{folder}", "teacher.network=lenet5", "compute.block_rows=4", *settings)
    return ExtractConfig(
        load.load("folder", settings), weights.read(folder / "w.safetensors"), folder.with_suffix(".h5")
    )


def interrupted_at(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> list[int]:
    """Raise KeyboardInterrupt in place of these steps of the learners, counted from 1; return the list of steps."""
    step, steps = learner.Learner.step, list[int]()

    def interrupted_step(this: learner.Learner, batch: batches.Batch, number: int) -> None:
        steps.append(number)
        if len(steps) in numbers:
            raise KeyboardInterrupt
        step(this, batch, number)

    monkeypatch.setattr(learner.Learner, "step", interrupted_step)
    return steps


def untouched(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is written to or replaced, but not when it is read."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def weights_of(run: RunFolder) -> dict[str, bytes]:
    """Return the tensors of each student's file as bytes, by the file's name."""
    return {
        path.name: safetensors.torch.save(safetensors.torch.load_file(path))
        for path in sorted(run.path.glob("student-*.safetensors"))
    }


def metrics_of(run: RunFolder) -> list[dict[str, object]]:
    """Return all metrics except the seconds."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in run.rows()]


POOL_ROWS = 40  # in blocks of 16, 16 and 8


def pool_config(teacher: Path, out: Path, *overrides: str, rows: int = POOL_ROWS) -> ExtractConfig:
    """Return the configuration of stage one for the digits with a random pool."""
    settings = [*TEACHER, "compute.block_rows=16", *overrides]
    return ExtractConfig(load.load("digits", settings), weights.read(teacher), out, contents=Contents(random_pool=rows))


def pool_image(seed: int, row: int, block_rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return an image of a pool from the words of the Mersenne Twister, as cache/README.md specifies."""
    block, before = divmod(row, block_rows)
    twister = np.random.MT19937(np.random.SeedSequence([seed, zlib.crc32(b"random pool"), 0, block]))
    size = int(np.prod(shape))
    words = twister.random_raw((before + 1) * size)[before * size :]
    return ((words >> 8).astype(np.float32) / np.float32(2**24)).reshape(shape)


def spoil(path: Path, *places: tuple[str, int]) -> None:
    """Flip a bit in each of these rows, given as (dataset, row)."""
    columns = inspect(path, identified=False).columns
    with path.open("r+b") as file:
        for name, row in places:
            where = columns[name].offset + row * columns[name].row_bytes
            file.seek(where)
            byte = file.read(1)[0]
            file.seek(where)
            file.write(bytes([byte ^ 1]))


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def error_message(function: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(NetworkError) as error:
        function(*arguments)
    return str(error.value)


def write_picture(path: Path, size: tuple[int, int] = (12, 8), mode: str = "RGB", orientation: int = 1) -> None:
    """An image of (width, height), dark on the left and bright on the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.tile(np.linspace(0, 255, size[0]).astype(np.uint8), (size[1], 1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(ramp).convert(mode).save(path, exif=exif)
