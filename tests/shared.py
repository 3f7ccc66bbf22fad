"""What several test files use."""

from pathlib import Path

import numpy as np
from PIL import Image

# LeNet-5 teaches LeNet-5: the digits in a tenth of a second an epoch.
TEACHER = [
    "teacher.network=lenet5",
    "teacher.epochs=3",
    "teacher.optimizer=adam",
    "teacher.lr=0.003",
    "teacher.shift=0",
]


def make_folder(root: Path, train: int = 8, test: int = 4) -> Path:
    """Two classes, a and b, of random colour images of 16×16 in the layout of `folder`."""
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in ("a", "b"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return root


def untouched(path: Path) -> tuple[int, int, int]:
    """What stays while nobody writes to a file; that it was read changes other times."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
