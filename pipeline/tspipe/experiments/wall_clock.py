"""The wall-clock time of an epoch, from whole commands: a long run less a short one, so that start-up cancels."""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tspipe.errors import RecipeError
from tspipe.utils.console import printable

_SHORT, _LONG = 1, 3  # epochs
_MIN_TURNS = 3


def epoch_seconds(
    floor: Path, cache: Path, student: str, batch_size: int, options: Sequence[str], seconds: float
) -> tuple[list[float], list[float]]:
    """Return the seconds of one more epoch in each turn: of the loop in the Python file `floor`, and of tspipe.

    The loop is run as `python FLOOR CACHE STUDENT BATCH_SIZE EPOCHS`, in alternation with `tspipe student`, for about
    `seconds` and at least three turns.

    Args:
        options: those of `tspipe student` beside the cache, the student, the seeds and the epochs.

    Raises RecipeError if a command fails.
    """
    floor_command = [sys.executable, str(floor), str(cache), student, str(batch_size)]
    command = [sys.executable, "-m", "tspipe", "student", "--cache", str(cache), "--student", student]
    command += ["--random-images", "0", "--seeds", "1", *options]
    floor_times, times = list[float](), list[float]()
    start, turns = time.monotonic(), math.inf
    while len(times) < turns:
        with tempfile.TemporaryDirectory() as folder:
            floor_times.append(_difference([[*floor_command, str(epochs)] for epochs in (_SHORT, _LONG)]))
            runs = [(epochs, str(Path(folder, str(epochs)))) for epochs in (_SHORT, _LONG)]
            times.append(_difference([[*command, "--epochs", str(epochs), "--out", out] for epochs, out in runs]))
        if len(times) == 1:
            turns = max(_MIN_TURNS, int(seconds / (time.monotonic() - start)))
    return floor_times, times


def _difference(commands: list[list[str]]) -> float:
    """Return the seconds of an epoch, from a short run and a long one."""
    short, long = map(_seconds, commands)
    return (long - short) / (_LONG - _SHORT)


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RecipeError(f"{' '.join(command[1:4])} … failed: {printable(lines[-1])}")
    return time.perf_counter() - start
