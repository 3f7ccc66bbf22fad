"""A run folder: everything that a run of stage two writes, and what it needs to resume after a kill.

config.json           the configuration; the cache's id; versions, device and threads
random_labels.json    the teacher's labels for random images
metrics.csv           one row per learner and epoch
student-*.safetensors the students after the last epoch; their metadata says how to build them, and their accuracy
student-*-best-*.safetensors  the same after the best epoch, by the accuracy on held-back images or on the test split
checkpoint.safetensors  until the run is finished, and the one before it: checkpoint.previous.safetensors
summary.json          once the run is finished: what a report needs; the size and SHA-256 of the files above
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

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # which pydantic requires before Python 3.12

from tspipe.cache.manifest import describe_differences
from tspipe.errors import RecipeError
from tspipe.utils.files import open_without_links, remove_abandoned, write_whole, writing
from tspipe.utils.reading import read_file

Row = dict[str, Any]
NAMES = ("student", "arm", "loss")  # the columns of metrics.csv that are no numbers
CHECKPOINTS = ("checkpoint.safetensors", "checkpoint.previous.safetensors")
_MAX_THREADS = 1024


class FileFacts(TypedDict):
    """What summary.json states of a file."""

    bytes: int
    sha256: str


class _Environment(BaseModel):
    """The fields of an environment that a run resumes with."""

    model_config = ConfigDict(extra="allow")
    device: str
    threads: int = Field(ge=1, le=_MAX_THREADS)


class _ConfigFile(BaseModel):
    """config.json."""

    config: dict[str, Any]
    environment: _Environment


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and the config and environment of the run."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]

    @property
    def identity(self) -> str:
        """The SHA-256 of the config; the run's checkpoints, students and summary.json carry it."""
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
        """Read one of the folder's JSON files. Raises ValueError or RecursionError if it is damaged."""
        return json.loads(self._read(name))

    def _read(self, name: str) -> str:
        try:
            return read_file(self.path / name).decode()
        except OSError as problem:
            raise RecipeError(f"{self.path / name} cannot be read: {problem.strerror}.") from problem

    def rows(self) -> list[Row]:
        """Return the rows of metrics.csv, with numbers converted. Raises ValueError or csv.Error if it is damaged."""
        if not (self.path / "metrics.csv").exists():
            return []
        return read_rows(self._read("metrics.csv"))

    def describe(self, names: Iterable[str]) -> dict[str, FileFacts]:
        """Return the size and SHA-256 of some of the folder's files, as summary.json states them."""
        contents = {name: read_file(self.path / name) for name in names}
        return {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        }

    def damaged_files(self) -> list[str]:
        """Return the files of a finished run that are not as its summary.json states, which may itself be damaged."""
        files = self.recorded_files()
        return [name for name, facts in files.items() if not self.is_intact(name, facts)] if files else ["summary.json"]

    def recorded_files(self) -> dict[str, FileFacts]:
        """Return the size and SHA-256 of files as summary.json states them.

        There are none if it is absent, damaged or of another run; a folder that is opened without a config accepts any.
        """
        try:
            summary = self.read_json("summary.json")
            if self.config and summary.get("identity", self.identity) != self.identity:
                return {}
            return TypeAdapter(dict[str, FileFacts]).validate_python(summary["files"])
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError, RecipeError):
            return {}

    def is_intact(self, name: str, facts: FileFacts) -> bool:
        """Return whether a file of the folder has this size and SHA-256."""
        try:
            return Path(name).name == name and self.describe([name])[name] == facts
        except OSError:
            return False

    def begins_with(self, name: str, facts: FileFacts) -> bool:
        """Return whether a file of the folder begins with content of this size and SHA-256."""
        try:
            content = read_file(self.path / name)[: facts["bytes"]]
        except OSError:
            return False
        return hashlib.sha256(content).hexdigest() == facts["sha256"]

    def remove_leftovers(self) -> None:
        """Remove what a process that was killed after the run was finished has left."""
        with contextlib.suppress(OSError):  # a folder that cannot be written
            remove_abandoned(self.path)
            for name in (*CHECKPOINTS, "run.lock"):
                (self.path / name).unlink(missing_ok=True)

    def append(self, rows: Iterable[Row], columns: list[str]) -> None:
        """Append rows to metrics.csv."""
        path = self.path / "metrics.csv"
        new = not path.exists()
        with writing(path), open(path, "a", newline="", encoding="utf-8", opener=open_without_links) as file:
            write_rows(file, rows, columns, header=new)
            file.flush()
            os.fsync(file.fileno())  # a later checkpoint must not survive its rows

    def keep(self, rows: list[Row]) -> None:
        """Replace the rows of metrics.csv by these, which a checkpoint covers."""
        path = self.path / "metrics.csv"
        if not rows:
            path.unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        write_rows(text, rows, list(rows[0]), header=True)
        write_whole(path, text.getvalue().encode())


def find_run(config: dict[str, Any], environment: dict[str, Any], stem: str, out: Path | None) -> RunFolder:
    """Return the folder of this config: `runs/<stem>-<8 hex digits of the config>/`, or `out`. Creates nothing.

    A run that was begun keeps its environment. Raises RecipeError if `out` is the folder of another config.
    """
    digits = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    path = out or Path("runs") / f"{stem}-{digits}"
    run = RunFolder(path, config, environment)
    if not os.path.lexists(path / "config.json"):
        return run
    try:
        recorded = _ConfigFile.model_validate(run.read_json("config.json"))
    except (RecursionError, ValueError) as problem:
        errors = problem.errors() if isinstance(problem, ValidationError) else []
        reason = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors) or str(problem)
        raise RecipeError(
            f"{path / 'config.json'} is not as tspipe student writes it: {reason}. Restore it, or choose another --out."
        ) from None
    if differences := describe_differences(recorded.config, config):
        raise RecipeError(f"{path} is the folder of another run: {differences}. Choose another --out.")
    return RunFolder(path, config, recorded.environment.model_dump())


def results_sha256(rows: Iterable[Row]) -> str:
    """Return the SHA-256 of rows of metrics.csv without their seconds, in which equal runs differ."""
    results = [{name: v for name, v in row.items() if not name.startswith("seconds")} for row in rows]
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


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


def write_rows(file: Any, rows: Iterable[Row], columns: list[str], *, header: bool) -> None:
    """Write rows as CSV; a column that a row lacks is empty."""
    writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
    if header:
        writer.writeheader()
    writer.writerows(rows)


def read_rows(text: str) -> list[Row]:
    """Return the rows of a CSV with numbers converted. Raises ValueError or csv.Error if it is damaged."""
    complete = text[: text.rfind("\n") + 1]  # a machine that stops may leave half a last line
    rows = csv.DictReader(io.StringIO(complete))
    return [{name: v if name in NAMES else _number(v) for name, v in row.items()} for row in rows]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):  # of None where a line is short, of a list where it is long
            continue
    return text
