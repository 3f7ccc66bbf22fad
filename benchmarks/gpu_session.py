"""A session on a GPU machine: its deadline, its results, and the commands that it runs."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tspipe.training.run_folder import environment
from tspipe.utils.files import write_whole

_PIECE = 15 * 2**20  # bytes of a piece of the state: some machines return files of at most 16 MiB
_PIECES = 3
_GRACE = 20  # seconds for a command to write its checkpoint


class OutOfTime(BaseException):
    """The seconds of the session have passed."""


class Session:
    """Results are kept in `out`; caches, images and runs in `work`.

    Attributes:
        arguments: those of the command line.
        images: a folder with images or packed pieces of them; None without.
        tiny: whether this is a trial on a CPU, with numbers as small as possible.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.out, self.work = arguments.out.resolve(), arguments.work.resolve()
        self.images = arguments.images and arguments.images.resolve()
        self.device, self.tiny = torch.device(arguments.device), arguments.device == "cpu"
        for folder in (self.out, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        self._results: dict[str, dict[str, Any]] = {"machine": machine(arguments.device)}
        signal.signal(signal.SIGALRM, _raise_out_of_time)
        signal.setitimer(signal.ITIMER_REAL, arguments.seconds)

    def record(self, stage: str, name: str, **values: Any) -> None:
        """Keep a result and print it."""
        self._results.setdefault(stage, {})[name] = values
        write_whole(self.out / "results.json", json.dumps(self._results, indent=1).encode())
        brief = {key: value for key, value in values.items() if not isinstance(value, list | dict)}
        print(f"{stage}, {name}: {brief}", flush=True)

    def start(self, arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start Python with these arguments in a folder; its output goes to log.txt."""
        with (self.out / "log.txt").open("ab") as log:
            log.write(f"\n$ {' '.join(arguments)}\n".encode())
            return subprocess.Popen(
                [sys.executable, *arguments], cwd=folder, env={**os.environ, **environment}, stdout=log, stderr=log
            )

    def python(self, arguments: list[str], folder: Path, **environment: str) -> tuple[int, float]:
        """Run Python with these arguments in a folder; return its exit code and seconds."""
        start = time.monotonic()
        process = self.start(arguments, folder, **environment)
        try:
            return process.wait(), time.monotonic() - start
        except OutOfTime:
            stop([process])
            raise

    def pack(self) -> None:
        """Write the small files of run folders into runs.tar.gz, and what a later session resumes into state-N.tar."""
        small = [path for path in self.work.glob("runs/*/*") if path.suffix in (".json", ".csv", ".md", ".png")]
        small += self.work.glob("*.metrics.csv")
        with tarfile.open(self.out / "runs.tar.gz", "w:gz") as archive:
            for path in small:
                archive.add(path, path.relative_to(self.work))
        for old in self.out.glob("state-*.tar"):
            old.unlink()
        for number, paths in enumerate(_pieces([*self.work.glob("teacher-*"), *self.work.glob("runs/*/*")])):
            with tarfile.open(self.out / f"state-{number}.tar", "w") as archive:
                for path in paths:
                    archive.add(path, path.relative_to(self.work))


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Interrupt commands, which write a checkpoint, and kill those that do not end."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    end = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def machine(device: str) -> dict[str, Any]:
    """Describe the machine: GPU, driver, versions."""
    facts = environment(device, torch.get_num_threads())
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.sm", "--format=csv,noheader"]
        facts["driver, memory, clock"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts


def _pieces(paths: list[Path]) -> Iterator[list[Path]]:
    """Yield groups of files that fit into a piece each, small files first, until the pieces are used up."""
    piece, size, number = list[Path](), 0, 0
    for path in sorted((path for path in paths if path.is_file()), key=lambda path: path.stat().st_size):
        if size + path.stat().st_size > _PIECE and piece:
            yield piece
            piece, size, number = [], 0, number + 1
        if number == _PIECES or path.stat().st_size > _PIECE:
            break
        piece.append(path)
        size += path.stat().st_size
    if piece:
        yield piece


def _raise_out_of_time(*_: object) -> None:
    raise OutOfTime
