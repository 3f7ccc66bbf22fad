"""Fixtures of all tests: a small teacher on the digits, its cache, and the command line in this process."""

import json
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # tests run in parallel, and so do the processes they start
os.environ["COLUMNS"] = "80"
# All tests except those of test_gpu.py run as on a machine without a GPU.
os.environ.update({} if os.environ.get("TSPIPE_TEST_GPU") else {"CUDA_VISIBLE_DEVICES": ""})

import pytest
import torch
from hypothesis import settings

from shared import TEACHER, pool_config
from tspipe.cache import Cache
from tspipe.cli.app import main
from tspipe.extraction.extract import ExtractConfig, extract
from tspipe.models import weights
from tspipe.recipes import load
from tspipe.training.train_teacher import TeacherConfig, train_teacher
from zygote import save_time, serve

GPU = os.environ.get("TSPIPE_TEST_GPU")
torch.set_num_threads(1)
save_time()
if not GPU:
    torch.backends.mps.is_available = lru_cache(lambda: False)
settings.register_profile("suite", deadline=None, max_examples=25)  # timings are for benchmarks
settings.load_profile("suite")


def error_in(lines: list[str]) -> str:
    """Return the text of the error among these lines."""
    return "".join(line.removeprefix("Error: ") for line in lines if line.startswith("Error: "))


class Result(NamedTuple):
    """The exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Return the text of the error."""
        return error_in(self.err.splitlines())

    def says(self, sentence: str) -> bool:
        """Return whether this is the text of the error. A sentence that ends in … is a prefix of it."""
        return self.error.startswith(sentence[:-1]) if sentence.endswith("…") else self.error == sentence


@pytest.fixture
def tspipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Result]:
    """Run a command in an empty folder: `tspipe("info", "x.h5")`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["tspipe", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return run


class Run(NamedTuple):
    """Whether a process was killed, the exit codes of its ranks and the lines that they printed."""

    killed: bool
    codes: list[int]
    lines: list[str]

    @property
    def code(self) -> int:
        """Return the first exit code that is not 0."""
        return next(filter(None, self.codes), 0)

    @property
    def error(self) -> str:
        """Return the text of the error."""
        return error_in(self.lines)


class Zygote:
    """Runs commands in child processes; see zygote.py."""

    def __init__(self) -> None:
        (answers, answer), (request, requests) = os.pipe(), os.pipe()
        if not os.fork():
            try:
                os.close(requests)  # else its own end of the pipe would hide that the tests have ended
                serve(os.fdopen(request), os.fdopen(answer, "w"))
            finally:
                os._exit(0)
        os.close(request)
        os.close(answer)
        self.requests, self.answers = os.fdopen(requests, "w"), os.fdopen(answers)

    def run(self, *arguments: object, seconds: float | None = None, **conditions: object) -> Run:
        """Run a command until it ends, or kill it after `seconds`."""
        request = {"arguments": list(map(str, arguments)), "seconds": seconds, **conditions}
        print(json.dumps(request), file=self.requests, flush=True)
        return Run(*json.loads(self.answers.readline()))


@pytest.fixture(scope="session", autouse=True)
def zygote() -> Zygote:
    """Start real processes in a tenth of a second each; it is forked before the first test starts threads."""
    return Zygote()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a LeNet-5 on the digits for three epochs; return its weights file."""
    path = tmp_path_factory.mktemp("checkpoints") / "digits-lenet5.safetensors"
    return train_teacher(TeacherConfig(load.load("digits", TEACHER), out=path)).path


@pytest.fixture(scope="session")
def digits(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Write the cache of `teacher`."""
    path = tmp_path_factory.mktemp("cache") / "digits.h5"
    return extract(ExtractConfig(load.load("digits", TEACHER), weights.read(teacher), path))


@pytest.fixture(scope="session")
def pool(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Write a cache of `teacher` with a random pool."""
    return extract(pool_config(teacher, tmp_path_factory.mktemp("pool") / "digits.h5"))
