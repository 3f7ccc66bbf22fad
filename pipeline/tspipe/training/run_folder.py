"""A run folder: everything that a run of stage two writes, and what it needs to resume after a kill.

config.json           the configuration; the cache's id; versions, device and threads
random_labels.json    the teacher's labels for random images
metrics.csv           one row per learner and epoch
student-*.safetensors the trained students; their metadata says how to build them
checkpoint.safetensors  until the run is finished
summary.json          once the run is finished
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

from tspipe.cache.manifest import describe_differences
from tspipe.errors import RecipeError
from tspipe.utils.files import write_whole, writing

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and the config and environment of the run."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]

    @property
    def identity(self) -> str:
        """The SHA-256 of the config; the run's checkpoints carry it."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return (self.path / "summary.json").exists()

    def create(self) -> None:
        """Create the folder and its config.json, unless it exists."""
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
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def rows(self) -> list[Row]:
        """Return the rows of metrics.csv, with numbers converted."""
        path = self.path / "metrics.csv"
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]  # a machine that stops may leave half a last line
        return [{name: _number(v) for name, v in row.items()} for row in csv.DictReader(io.StringIO(complete))]

    def append(self, rows: Iterable[Row], columns: list[str]) -> None:
        """Append rows to metrics.csv."""
        path = self.path / "metrics.csv"
        new = not path.exists()
        with writing(path), path.open("a", encoding="utf-8", newline="") as file:
            _write_rows(file, rows, columns, header=new)
            file.flush()
            os.fsync(file.fileno())  # a later checkpoint must not survive its rows

    def keep(self, rows: list[Row]) -> None:
        """Replace the rows of metrics.csv by these, which a checkpoint covers."""
        path = self.path / "metrics.csv"
        if not rows:
            path.unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        _write_rows(text, rows, list(rows[0]), header=True)
        write_whole(path, text.getvalue().encode())


def find_run(config: dict[str, Any], environment: dict[str, Any], stem: str, out: Path | None) -> RunFolder:
    """Return the folder of this config: `runs/<stem>-<8 hex digits of the config>/`, or `out`. Creates nothing.

    A run that was begun keeps its environment. Raises RecipeError if `out` is the folder of another config.
    """
    digits = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    path = out or Path("runs") / f"{stem}-{digits}"
    run = RunFolder(path, config, environment)
    if not (path / "config.json").exists():
        return run
    recorded = run.read_json("config.json")
    if differences := describe_differences(recorded["config"], config):
        raise RecipeError(f"{path} is the folder of another run: {differences}. Choose another --out.")
    return RunFolder(path, config, recorded["environment"])


def environment(device: str, threads: int) -> dict[str, Any]:
    """Return what the results of a run depend on beside its config."""
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
    """Return the model name of the processor or GPU, or the architecture if the system states none."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # absent on macOS
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
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
