"""Kills real commands at random moments: python benchmarks/kills.py [ROUNDS [SCENARIO ...]]

A scenario first runs its command undisturbed. Each round then starts the command in a folder of its own, sends SIGKILL
at a random moment between its first write and its end, runs the same command again to its end, and compares the SHA-256
of every file with that of the undisturbed run. Measured times are left out. Prints for each scenario the number of
kills, how many second runs finished with exit code 0 and with equal files, the files that are missing, and the files
that the undisturbed run does not leave.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tspipe.cache.inspect import inspect

TSPIPE = [sys.executable, "-m", "tspipe"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tspipe"]
BLOCK_ROWS = 64
TEACHER = ["--set=teacher.network=lenet5", "--set=teacher.epochs=2", f"--set=compute.block_rows={BLOCK_ROWS}"]
DRAW = random.Random(0)


class Scenario(NamedTuple):
    """A command, and the function that prepares the folder that it runs in."""

    command: list[str]
    prepare: Callable[[Path], object]


def student(caches: Path) -> Scenario:
    """Stage two with two seeds of three arms and a checkpoint after every batch."""
    small = ["--epochs", "3", "--seeds", "2", "--set=checkpoint_seconds=0", "--set=random_images=8"]
    command = ["student", "--cache", f"{caches}/digits.h5", "--compare", "--out", "run", *small]
    return Scenario([*TSPIPE, *command], nothing)


def torchrun_student(caches: Path) -> Scenario:
    """The same in two processes, of which one or both are killed."""
    return Scenario([*TORCHRUN, *student(caches).command[len(TSPIPE) :]], nothing)


def reproduce(caches: Path) -> Scenario:
    """A table of the paper: a teacher is trained, its cache is made, students are trained and reported."""
    small = ["--epochs", "2", "--set=students.lenet5_wide.options.maps=[4,4]", "--set=random_images=8"]
    small += [
        "--set=students.lenet5_wide.options.hidden=8",
        "--set=checkpoint_seconds=0",
        "--set=preprocess.resize=[16,16]",
    ]
    return Scenario([*TSPIPE, "reproduce", "table1", "--dataset", "digits", *TEACHER, *small], nothing)


def push(caches: Path) -> Scenario:
    """A cache is published in a folder."""
    return Scenario([*TSPIPE, "push", f"{caches}/pool.h5", "shelf"], lambda folder: (folder / "shelf").mkdir())


def repair(caches: Path) -> Scenario:
    """A cache with damage in every tenth block of its random pool is repaired in its place."""

    def damage(folder: Path) -> None:
        path = Path(shutil.copy(caches / "pool.h5", folder))
        features = inspect(path).columns["random_features"]
        ten_blocks = 10 * BLOCK_ROWS * features.row_bytes
        with path.open("r+b") as file:
            for offset in range(features.offset, features.offset + features.nbytes, ten_blocks):
                os.pwrite(file.fileno(), b"damage", offset)

    return Scenario([*TSPIPE, "verify", "pool.h5", "--repair"], damage)


def nothing(folder: Path) -> None:
    """Leave the folder empty."""


SCENARIOS = [student, torchrun_student, reproduce, push, repair]


def main(rounds: str = "30", *names: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        caches = make_caches(Path(root) / "caches")
        print(f"{'':18}{'kills':>6}{'finished':>10}{'equal':>7}{'missing':>9}{'left over':>11}")
        for make in SCENARIOS:
            if not names or make.__name__ in names:
                counts = run_scenario(make(caches), Path(root) / make.__name__, int(rounds))
                print("{:18}{:6}{:10}{:7}{:9}{:11}".format(make.__name__, *counts), flush=True)


def make_caches(folder: Path) -> Path:
    """Make digits.h5, and pool.h5 with a large random pool."""
    folder.mkdir()
    cache = [*TSPIPE, "cache", "--dataset", "digits", "--train-teacher", *TEACHER]
    for arguments in (["--out", "digits.h5"], ["--out", "pool.h5", "--random-pool", "100000"]):
        subprocess.run([*cache, *arguments], cwd=folder, check=True, capture_output=True)
    return folder


def run_scenario(scenario: Scenario, folder: Path, rounds: int) -> tuple[int, ...]:
    """Return the numbers of kills, finished runs, equal runs, missing files and files left over."""
    undisturbed = prepare(scenario, folder / "undisturbed")
    first_write, end = run(scenario, undisturbed)
    expected = digests(undisturbed)
    kills = finished = equal = missing = left_over = 0
    for attempt in range(3 * rounds):
        if kills == rounds:
            break
        killed = prepare(scenario, folder / str(attempt))
        if run_and_kill(scenario, killed, DRAW.uniform(0, end - first_write)):
            kills += 1
            second = subprocess.run(scenario.command, cwd=killed, capture_output=True, text=True)
            result = digests(killed)
            finished += second.returncode == 0
            equal += result == expected
            missing += len(expected.keys() - result.keys())
            left_over += len(result.keys() - expected.keys())
            if second.returncode or result != expected:
                different = {name for name, _ in expected.items() ^ result.items()}
                print(f"{killed}: {sorted(different)}\n{second.stdout}{second.stderr}", file=sys.stderr, flush=True)
        shutil.rmtree(killed)
    return kills, finished, equal, missing, left_over


def prepare(scenario: Scenario, folder: Path) -> Path:
    folder.mkdir(parents=True)
    scenario.prepare(folder)
    return folder


def run(scenario: Scenario, folder: Path) -> tuple[float, float]:
    """Run a command; return the seconds from its start to its first write and to its end."""
    before, start, first_write = state(folder), time.monotonic(), 0.0
    with (folder.parent / "output.txt").open("w") as output:
        process = subprocess.Popen(scenario.command, cwd=folder, stdout=output, stderr=output)
    while process.poll() is None:
        if not first_write and state(folder) != before:
            first_write = time.monotonic() - start
        time.sleep(0.001)
    assert process.returncode == 0, (folder.parent / "output.txt").read_text()
    return first_write, time.monotonic() - start


def run_and_kill(scenario: Scenario, folder: Path, delay: float) -> bool:
    """Run a command and kill it this many seconds after its first write; return False if it ends before."""
    before, silent = state(folder), subprocess.DEVNULL
    process = subprocess.Popen(scenario.command, cwd=folder, stdout=silent, stderr=silent, start_new_session=True)
    while state(folder) == before and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    if process.poll() is not None:
        return False
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if ranks and DRAW.random() < 0.5:
        os.kill(int(DRAW.choice(ranks)), signal.SIGKILL)  # torchrun ends the others
    else:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() != 0


def state(folder: Path) -> list[tuple[Path, int, int]]:
    """Return the names, sizes and modification times of all files."""
    entries = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            entries.append((path, status.st_size, status.st_mtime_ns))
    return entries


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(without_times(path)).hexdigest() for path in files}


def without_times(path: Path) -> bytes:
    """Return the content of a file without measured times: those in metrics.csv, its digest, and the report."""
    if path.name == "report.html":
        return b""
    if path.name == "metrics.csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        return json.dumps([{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]).encode()
    if path.name == "summary.json":
        summary = json.loads(path.read_text())
        summary.get("files", {}).pop("metrics.csv", None)
        return json.dumps(summary).encode()
    return path.read_bytes()


if __name__ == "__main__":
    main(*sys.argv[1:])
