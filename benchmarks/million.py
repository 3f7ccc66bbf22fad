"""Times a dataset of ImageNet's length: python benchmarks/million.py FOLDER [IMAGES]

Makes a folder of 1.28 million PNGs of 1×1 pixel in 1,000 classes, as hard links to one file a class. Times, each once
and in a process of its own: listing and opening the folder; `tspipe cache --images` with a teacher that costs nothing,
which leaves listing, decoding, checksums and writing; opening the cache with its images and targets; and an epoch's
reads. Prints the time and the peak of resident memory, and deletes the folder.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

CLASSES, TEST, BATCH, FEATURES = 1000, 10, 128, 64
TEACHER = f"""
from torch import nn

def build(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3, {FEATURES}), nn.Linear({FEATURES}, num_classes))
"""
MEASURES = {
    "list and open": """
from tspipe.data.datasets import open_dataset
print(f"{len(open_dataset('folder:images').train):,} images")
""",
    "open the cache": """
from tspipe.cache import open_cache
print(f"{len(open_cache('million.h5').train):,} rows")
""",
    "an epoch's reads": f"""
import torch
from tspipe.cache import open_cache
from tspipe.data.image_loader import ImageLoader, open_images
from tspipe.training.batches import shuffled_batches
from tspipe.training.targets import TargetLoader

cache, cpu, memory = open_cache("million.h5"), torch.device("cpu"), 2**32
dataset, steps = open_images(cache, lambda: None)
images = ImageLoader(dataset.train, steps, "train", memory, cpu)
columns, labels = {{"features": cache.train.features}}, torch.from_numpy(cache.train.labels)
targets = TargetLoader(columns, labels, frozenset({{"features", "labels"}}), memory, cpu)
order = shuffled_batches(0, 0, len(images), {BATCH})
batches = zip(images.normalised(order), targets.batches(order), strict=True)
print(f"{{sum(len(target.labels) for _, target in batches):,}} rows")
""",
}


def make(folder: Path, images: int) -> None:
    """Write the images, the teacher's code and its weights."""
    draw = np.random.default_rng(0)
    for split, count in (("train", images // CLASSES), ("test", TEST)):
        for label in range(CLASSES):
            of_class = folder / "images" / split / f"class{label:04}"
            of_class.mkdir(parents=True)
            first = of_class / "0000000.png"
            Image.fromarray(draw.integers(0, 256, (1, 1, 3), np.uint8)).save(first)
            for number in range(1, count):
                os.link(first, of_class / f"{number:07}.png")
    (folder / "tiny.py").write_text(TEACHER)
    layers = {"1": (FEATURES, 3), "2": (CLASSES, FEATURES)}
    state = {f"{name}.weight": draw.standard_normal(shape, np.float32) for name, shape in layers.items()}
    state |= {f"{name}.bias": np.zeros(shape[0], np.float32) for name, shape in layers.items()}
    save_file(state, folder / "tiny.safetensors")


def measure(what: str, folder: Path, *arguments: str) -> None:
    """Run Python with these arguments; print its last line, its time and its peak of resident memory."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    last = (output.strip().splitlines() or [""])[-1]
    print(f"{what:18}{seconds:7.1f} s {cpu:7.1f} s of processor {usage.ru_maxrss / 1024:7.0f} MiB  {last}", flush=True)
    if status:
        raise SystemExit(f"{what} failed.")


def main() -> None:
    folder, images = Path(sys.argv[1]) / "million", int(sys.argv[2]) if len(sys.argv) > 2 else 1_280_000
    folder.mkdir()
    try:
        start = time.perf_counter()
        make(folder, images)
        print(f"{images:,} images made in {time.perf_counter() - start:.0f} s", flush=True)
        measure("list and open", folder, "-c", MEASURES["list and open"])
        source = [
            "--dataset",
            "folder:images",
            "--recipe",
            "cifar10",
            "--teacher",
            "./tiny.py",
            "--weights",
            "tiny.safetensors",
        ]
        measure("stage one", folder, "-m", "tspipe", "cache", *source, "--images", "--out", "million.h5")
        for what in ("open the cache", "an epoch's reads"):
            measure(what, folder, "-c", MEASURES[what])
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
