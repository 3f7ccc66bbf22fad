"""Kills commands at random moments: python benchmarks/kills.py [ROUNDS [SCENARIO ...]]

A scenario first runs its command undisturbed. Each round then starts the command in a folder of its own, sends SIGKILL
at a random moment between its first write and its end, runs the same command again to its end, and compares the SHA-256
of every file with that of the undisturbed run. Measured times are left out. Prints for each scenario the number of
kills, how many second runs finished with exit code 0 and with equal files, the files that are missing, and the files
that the undisturbed run does not leave.

A command is a process of its own, forked from this one, which has imported everything: it starts at once.
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
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import zygote
from tspipe.cache.inspect import inspect

BLOCK_ROWS = 64
TEACHER = ["--set=teacher.network=lenet5", "--set=teacher.epochs=2", f"--set=compute.block_rows={BLOCK_ROWS}"]
DRAW = random.Random(0)
IMPORTS = ["matplotlib.backends.backend_agg", "sklearn.datasets", "torch._dynamo", "tspipe.training.train_teacher"]
IMPORTS += ["tspipe.experiments.report", "tspipe.experiments.reproduce", "tspipe.extraction.verify", "tspipe.cli.app"]


class Scenario(NamedTuple):
    """A command, the function that prepares its folder, and the number of its processes; 0 without torchrun."""

    arguments: list[str]
    prepare: Callable[[Path], object]
    ranks: int = 0


def student(caches: Path) -> Scenario:
    """Stage two with two seeds of three arms and a checkpoint after every batch."""
    small = ["--epochs", "3", "--seeds", "2", "--set=checkpoint_seconds=0", "--set=random_images=8"]
    return Scenario(["student", "--cache", f"{caches}/digits.h5", "--compare", "--out", "run", *small], nothing)


def student_ranks(caches: Path) -> Scenario:
    """Stage two in two processes of a torchrun job, of which one or both are killed."""
    return student(caches)._replace(ranks=2)


def cache_ranks(caches: Path) -> Scenario:
    """Stage one in three processes of a torchrun job, of which one or all are killed."""
    weights = f"{caches}/checkpoints/digits-lenet5.safetensors"
    small = ["--weights", weights, "--out", "digits.h5", "--random-pool", "2000"]
    return Scenario(["cache", "--dataset", "digits", *TEACHER, *small], nothing, 3)


def reproduce(caches: Path) -> Scenario:
    """A table of the paper: a teacher is trained, its cache is made, students are trained and reported."""
    small = ["--epochs", "2", "--set=students.lenet5_wide.options.maps=[4,4]", "--set=random_images=8"]
    small += ["--set=students.lenet5_wide.options.hidden=8", "--set=checkpoint_seconds=0"]
    small += ["--set=preprocess.resize=[16,16]"]
    return Scenario(["reproduce", "table1", "--dataset", "digits", *TEACHER, *small], nothing)


def push(caches: Path) -> Scenario:
    """A cache is published in a folder."""
    return Scenario(["push", f"{caches}/pool.h5", "shelf"], lambda folder: (folder / "shelf").mkdir())


def repair(caches: Path) -> Scenario:
    """A cache with damage in every tenth block of its random pool is repaired in its place."""

    def damage(folder: Path) -> None:
        path = Path(shutil.copy(caches / "pool.h5", folder))
        features = inspect(path).columns["random_features"]
        ten_blocks = 10 * BLOCK_ROWS * features.row_bytes
        with path.open("r+b") as file:
            for offset in range(features.offset, features.offset + features.nbytes, ten_blocks):
                os.pwrite(file.fileno(), b"damage", offset)

    return Scenario(["verify", "pool.h5", "--repair"], damage)


def nothing(folder: Path) -> None:
    """Leave the folder empty."""


SCENARIOS = [student, student_ranks, cache_ranks, reproduce, push, repair]


def main(rounds: str = "30", *names: str) -> None:
    for module in IMPORTS:
        import_module(module)
    with tempfile.TemporaryDirectory() as root:
        caches = Path(root) / "caches"
        caches.mkdir()
        cache = ["cache", "--dataset", "digits", "--train-teacher", *TEACHER]
        for arguments in (["--out", "digits.h5"], ["--out", "pool.h5", "--random-pool", "100000"]):
            finish(start(Scenario([*cache, *arguments], nothing), caches))
        print(f"{'':16}{'kills':>6}{'finished':>10}{'equal':>7}{'missing':>9}{'left over':>11}", flush=True)
        for make in SCENARIOS:
            if not names or make.__name__ in names:
                counts = run_scenario(make(caches), Path(root) / make.__name__, int(rounds))
                print("{:16}{:6}{:10}{:7}{:9}{:11}".format(make.__name__, *counts), flush=True)


def run_scenario(scenario: Scenario, folder: Path, rounds: int) -> tuple[int, ...]:
    """Return the numbers of kills, finished runs, equal runs, missing files and files left over."""
    undisturbed = prepare(scenario, folder / "undisturbed")
    before = state(undisturbed)
    processes = start(scenario, undisturbed)
    wait_for_write(undisturbed, before, processes)
    first_write = time.monotonic()
    assert finish(processes) == 0
    duration = time.monotonic() - first_write
    expected = digests(undisturbed)
    kills = finished = equal = missing = left_over = 0
    for attempt in range(20 * rounds):  # a short command often ends before the kill
        if kills == rounds:
            break
        killed = prepare(scenario, folder / str(attempt))
        if run_and_kill(scenario, killed, DRAW.uniform(0, duration)):
            kills += 1
            code = finish(start(scenario, killed))
            result = digests(killed)
            finished += code == 0
            equal += result == expected
            missing += len(expected.keys() - result.keys())
            left_over += len(result.keys() - expected.keys())
            if different := {name for name, _ in expected.items() ^ result.items()}:
                print(f"{killed}, exit code {code}: {sorted(different)}", file=sys.stderr, flush=True)
        shutil.rmtree(killed)
    return kills, finished, equal, missing, left_over


def prepare(scenario: Scenario, folder: Path) -> Path:
    folder.mkdir(parents=True)
    scenario.prepare(folder)
    return folder


def start(scenario: Scenario, folder: Path) -> dict[int, int]:
    """Start a command in a folder; return the pipes that its processes print to, by process id."""
    with contextlib.chdir(folder):
        environments = zygote.rank_environments(scenario.ranks) if scenario.ranks else [{}]
        return dict(zygote.start(environment, scenario.arguments) for environment in environments)


def finish(processes: dict[int, int]) -> int:
    """Wait for all processes; return the first exit code that is not 0, else 0. Prints what a failed one printed."""
    codes = []
    for process, pipe in processes.items():
        with os.fdopen(pipe, errors="replace") as output:
            text = output.read()
        codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        if codes[-1] > 0:
            print(text, file=sys.stderr, flush=True)
    return next((code for code in codes if code), 0)


def run_and_kill(scenario: Scenario, folder: Path, delay: float) -> bool:
    """Run a command and kill it this many seconds after its first write; return False if it ends before."""
    before, processes = state(folder), start(scenario, folder)
    wait_for_write(folder, before, processes)
    time.sleep(delay)
    victims = [DRAW.choice(list(processes))] if DRAW.random() < 0.5 else list(processes)
    for process in victims:  # a process that has ended stays until it is waited for
        os.kill(process, signal.SIGKILL)
    return killed(processes)


def wait_for_write(folder: Path, before: list[tuple[Path, int, int]], processes: dict[int, int]) -> None:
    """Wait until a file in the folder changes, or all processes have ended."""
    while state(folder) == before and any(not ended(process) for process in processes):
        time.sleep(0.001)


def ended(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def killed(processes: dict[int, int]) -> bool:
    """Wait for the processes to end; return whether one was killed before its end."""
    codes = []
    for process, pipe in processes.items():
        with os.fdopen(pipe, "rb") as output:  # an unread pipe could block its writer
            output.read()
        codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    return -signal.SIGKILL in codes


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
