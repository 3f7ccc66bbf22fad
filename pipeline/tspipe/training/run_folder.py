"""A run folder: everything a run of stage two leaves, and what it needs to go on after a kill.

config.json           what was asked for; the cache's id; versions, device and threads
random_labels.json    what the teacher calls random images
metrics.csv           a row per learner and epoch
student-*.safetensors the trained students, with how to build them in their metadata
checkpoint.safetensors  only while the run is unfinished
summary.json          only when it is finished
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tspipe.cache.write import differing
from tspipe.errors import RecipeError
from tspipe.utils.files import write_whole, writing

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """One run's folder and the config it belongs to."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        """Where the run goes on from."""
        return self.path / "checkpoint.safetensors"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "summary.json").exists()

    def create(self) -> None:
        """Make the folder, with its config, unless it is there."""
        if (self.path / "config.json").exists():
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("config.json", {"config": self.config, "environment": self.environment})

    def write_json(self, name: str, value: Any) -> None:
        """Write one of the folder's JSON files."""
        write_whole(self.path / name, (json.dumps(value, indent=2) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """Read one of the folder's JSON files."""
        return json.loads((self.path / name).read_text())

    def rows(self) -> list[Row]:
        """metrics.csv, numbers as numbers."""
        path = self.path / "metrics.csv"
        if not path.exists():
            return []
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]  # the machine may have stopped in the middle of the last line
        return [{name: _number(v) for name, v in row.items()} for row in csv.DictReader(io.StringIO(whole))]

    def append(self, rows: Iterable[Row], columns: list[str]) -> None:
        """Add rows to metrics.csv."""
        path = self.path / "metrics.csv"
        new = not path.exists()
        with writing(path), path.open("a", newline="") as file:
            _write_rows(file, rows, columns, header=new)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that follows must not outlive its rows

    def keep(self, rows: list[Row]) -> None:
        """Make metrics.csv hold just these rows: those a checkpoint covers."""
        path = self.path / "metrics.csv"
        if not rows:
            path.unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        _write_rows(text, rows, list(rows[0]), header=True)
        write_whole(path, text.getvalue().encode())


def find_run(config: dict[str, Any], environment: dict[str, Any], stem: str, out: Path | None) -> RunFolder:
    """The folder of this config: `runs/<stem>-<8 hex digits of the config>/`, or `out`. Creates nothing.

    A run that was begun keeps its environment. Raises RecipeError if `out` is the folder of another config.
    """
    digits = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    path = out or Path("runs") / f"{stem}-{digits}"
    run = RunFolder(path, config, environment)
    if not (path / "config.json").exists():
        return run
    found = run.read_json("config.json")
    if differences := list(differing(found["config"], config)):
        raise RecipeError(f"{path} is the folder of another run: {'; '.join(differences[:3])}. Choose another --out.")
    return RunFolder(path, config, found["environment"])


def environment(device: str, threads: int) -> dict[str, Any]:
    """What the numbers of a run depend on beside its config."""
    packages = ("tspipe", "torch", "torchvision", "numpy", "h5py", "pillow")
    return {
        "device": device,
        "threads": threads,
        "processor": processor(device),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def processor(device: str) -> str:
    """The model of what computes, as the driver or the system calls it; the architecture where it says none."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # there is none on macOS
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        if name := next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""):
            return name
    return platform.processor() or platform.machine()


def _write_rows(file: Any, rows: Iterable[Row], columns: list[str], *, header: bool) -> None:
    writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
    if header:
        writer.writeheader()
    writer.writerows(rows)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
