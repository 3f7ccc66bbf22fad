"""Rehearses Table 3 at its real size on synthetic images; docs/cub200.md has the results.

    python benchmarks/rehearse_cub200.py FOLDER prepare       # the archive, and an NTS-Net with random weights
    python benchmarks/rehearse_cub200.py FOLDER stage-one 60  # for 60 minutes, killed once on the way
    python benchmarks/rehearse_cub200.py FOLDER few           # both stages on 48 images, with NTS-Net live on noise
    python benchmarks/rehearse_cub200.py FOLDER complete      # a file of the real size, by a teacher that costs nothing
    python benchmarks/rehearse_cub200.py FOLDER stage-two 10  # 10 minutes of an epoch, with the pixels and without

Each step runs `tspipe` in a process of its own, and prints its rate, peak memory and exit code. Finished work is not
repeated.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cub200_archive
from tspipe.cache import open_cache
from tspipe.data import datasets
from tspipe.data.image_loader import read
from tspipe.models import networks, weights
from tspipe.models.networks import ntsnet
from tspipe.recipes.load import load

WIDE = '''
"""A fast teacher of NTS-Net's width, so that the file, the decoding and the student are measured."""

from torch import nn


def build(num_classes):
    return nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(3 * 14 * 14, 10240), nn.Linear(10240, num_classes))
'''


SHAPE = (3, 448, 448)


class Outcome(NamedTuple):
    """The outcome of a command."""

    code: int  # negative: the signal that ended it
    seconds: float
    peak: int  # bytes of resident memory
    lines: list[tuple[str, float, int]]  # of progress: the task, the seconds since the start, the images done


def run(folder: Path, *arguments: str, minutes: float = 1e9) -> Outcome:
    """Run `tspipe` with these arguments in a folder, and kill it after `minutes`."""
    command = [sys.executable, "-m", "tspipe", *arguments]
    print(f"{time.strftime('%H:%M:%S')} $ tspipe {' '.join(arguments)}", flush=True)
    start, lines = time.monotonic(), []
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    os.set_blocking(process.stderr.fileno(), False)
    done, status, usage = 0, 0, None
    while not done:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        for line in process.stderr:
            print("   ", line, end="", flush=True)
            if result := re.match(r"(.*): ([\d,]+)/[\d,]+ images", line):
                lines.append((result[1], time.monotonic() - start, int(result[2].replace(",", ""))))
        if time.monotonic() - start > 60 * minutes:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.2)
    assert usage
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    outcome = Outcome(os.waitstatus_to_exitcode(status), time.monotonic() - start, peak, lines)
    last = [(when, count) for what, when, count in lines if what == lines[-1][0]]
    (t0, first), (t1, final) = last[:1] + last[-1:] if last else [(0, 0), (0, 0)]
    rate = f", {(final - first) / (t1 - t0):.3g} images/s ({lines[-1][0]})" if t1 > t0 else ""
    print(
        f"    exit code {outcome.code}, {outcome.seconds:.0f} s{rate}, peak memory {outcome.peak / 1e9:.2f} GB",
        flush=True,
    )
    return outcome


def prepare(folder: Path) -> None:
    """Write the archive and the teacher's weights: random, with batch-norm statistics of a few images."""
    if not (folder / "data/CUB_200_2011/train_test_split.txt").exists():  # written last
        subprocess.run([sys.executable, cub200_archive.__file__, folder / "data"], check=True)
    recipe = load("cub200")
    train = datasets.open_dataset("cub200", folder / "data").train
    pixels = torch.stack([torch.from_numpy(read(train, recipe.preprocess, i)[1]) for i in range(0, len(train), 500)])
    torch.manual_seed(0)
    network = ntsnet.build(len(train.classes))
    for norm in (layer for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)):
        norm.momentum = None  # the plain average over the batches seen
    with torch.no_grad():
        network(recipe.preprocess.normalise(pixels.permute(0, 3, 1, 2)))
    weights.save(folder / "ntsnet.safetensors", network, {})
    (folder / "wide.py").write_text(WIDE)
    weights.save(folder / "wide.safetensors", networks.build(str(folder / "wide.py"), len(train.classes), SHAPE), {})


def stage_one(folder: Path, minutes: float = 60) -> None:
    """Run NTS-Net over the archive, killed after a quarter of the time and resumed, and killed again at the end."""
    arguments = ["cache", "--dataset", "cub200", "--data", "data", "--weights", "ntsnet.safetensors", "--images"]
    run(folder, *arguments, minutes=minutes / 4)
    run(folder, *arguments, minutes=3 * minutes / 4)


def few(folder: Path) -> None:
    """Run both stages at full resolution and width on few images; NTS-Net labels random images live."""
    cub200_archive.make(folder / "few", images=48, classes=200)
    data = ["--data", "few"]
    run(folder, "cache", "--dataset", "cub200", *data, "--weights", "ntsnet.safetensors", "--out", "few.h5")
    for count in ("0", "2"):
        student = ["--cache", "few.h5", "--epochs", "1", "--random-images", count, "--out", f"run-few-{count}"]
        run(folder, "student", *student, *data)


def complete(folder: Path) -> None:
    """Write complete files of the real size, with the pixels and without, and open and verify them."""
    arguments = ["cache", "--dataset", "cub200", "--data", "data", "--teacher", "./wide.py"]
    arguments += ["--weights", "wide.safetensors"]
    run(folder, *arguments, "--images", "--out", "images.h5")
    run(folder, *arguments, "--out", "plain.h5")
    for name in ("images.h5", "plain.h5"):
        start = time.perf_counter()
        cache = open_cache(folder / name)
        opened = time.perf_counter() - start
        print(f"    {name}: {cache.path.stat().st_size:,} bytes, opened in {1000 * opened:.1f} ms")
        run(folder, "verify", name)


def stage_two(folder: Path, minutes: float = 10) -> None:
    """Train MobileNetV2 for an epoch or `minutes`: pixels from the file, decoded once, or decoded as needed."""
    common = ["--epochs", "1", "--data", "data"]
    ways = {"images": [], "plain": [], "small": ["--set", "memory=1GB"]}
    for name, settings in ways.items():
        cache = "images.h5" if name == "images" else "plain.h5"
        run(folder, "student", "--cache", cache, "--out", f"run-{name}", *common, *settings, minutes=minutes)


if __name__ == "__main__":
    folder, step, *numbers = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    steps = {"prepare": prepare, "stage-one": stage_one, "few": few, "complete": complete, "stage-two": stage_two}
    steps[step](Path(folder), *map(float, numbers))
