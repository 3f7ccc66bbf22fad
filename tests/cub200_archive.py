"""A stand-in for CUB-200-2011, in its published layout and of its size, with synthetic images:

    python tests/cub200_archive.py FOLDER [IMAGES]

writes 11,788 JPEGs (5,994 for training) of 200 classes into FOLDER/CUB_200_2011, with as many pixels and bytes as the
real ones (1.1 GB). It serves to measure costs; its accuracies are meaningless. The same arguments give the same files.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGES, TRAIN, CLASSES = 11788, 5994, 200
_LONG, _SHORT = 500, (250, 500)  # pixels
_GREY, _TURNED = 1500, 700  # each 1,500th image is grey, each 700th has an EXIF rotation
_ORIENTATION, _ROTATED = 0x0112, 6  # EXIF's tag, and its value for a rotation by 90°


def make(
    root: Path, images: int = IMAGES, classes: int = CLASSES, scale: float = 1, each: Callable[..., Any] = map
) -> Path:
    """Write the archive into `root`, with images `scale` times as large, and return its folder. `each` is a map."""
    folder, train = root / "CUB_200_2011", round(images * TRAIN / IMAGES)
    labels = np.arange(images) * classes // images
    names = [f"{label + 1:03}.Bird_{label + 1:03}/Bird_{i + 1:05}.jpg" for i, label in enumerate(labels)]
    training = np.random.default_rng(0).permutation(images) < train
    for name in {Path(name).parent for name in names}:
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
    paths = [folder / "images" / name for name in names]
    for _ in each(partial(_write, scale=scale), paths, range(images), labels.tolist()):
        pass
    text = {
        "classes.txt": [f"{label + 1:03}.Bird_{label + 1:03}" for label in range(classes)],
        "images.txt": names,
        "image_class_labels.txt": labels + 1,
        "train_test_split.txt": training.astype(int),
    }
    for name, values in text.items():
        (folder / name).write_text("".join(f"{i} {value}\n" for i, value in enumerate(values, 1)))
    return folder


def _write(path: Path, number: int, label: int, scale: float) -> None:
    """Save a blurred pattern in its class's colours, with enough grain that the JPEG is as large as a photograph's."""
    draw = np.random.default_rng([1, number])
    shape = [round(scale * side) for side in draw.permutation([_LONG, draw.integers(*_SHORT)])]
    pattern = np.random.default_rng([2, label]).uniform(0, 255, (4, 4, 3)) + draw.normal(0, 40, (4, 4, 3))
    small = Image.fromarray(pattern.clip(0, 255).astype(np.uint8))
    pixels = np.asarray(small.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)).astype(np.float32)
    grain = draw.normal(0, 14, (*shape, 1)).astype(np.float32)
    image = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    if number % _TURNED == 1:
        exif[_ORIENTATION] = _ROTATED
    (image.convert("L") if number % _GREY == 0 else image).save(path, quality=90, exif=exif)


if __name__ == "__main__":
    with ProcessPoolExecutor() as pool:
        print(make(Path(sys.argv[1]), *map(int, sys.argv[2:]), each=pool.map))
