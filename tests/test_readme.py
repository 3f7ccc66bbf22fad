"""What the README says is so: its code runs, its commands and flags exist, its files are there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import typer.main

from shared import make_folder
from tspipe.cache import Cache
from tspipe.cli.app import app
from tspipe.data import datasets
from tspipe.experiments import tables
from tspipe.experiments.results import open_run, read
from tspipe.extraction.extract import ExtractConfig, extract
from tspipe.models import networks, weights
from tspipe.recipes import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FORMAT = (ROOT / "cache" / "README.md").read_text()


@pytest.mark.parametrize("text", [README, FORMAT], ids=["README", "cache/README"])
def test_the_code_runs(text: str, digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cache").mkdir()
    shutil.copy(digits.path, "cache/digits.h5")
    torch.manual_seed(0)
    make_folder(Path("data/photos"))
    weights.save(Path("w.safetensors"), networks.build("lenet5", 2, (3, 16, 16)), {})
    recipe = load.load("folder", ["dataset=folder:data/photos", "teacher.network=lenet5"])
    extract(ExtractConfig(recipe, weights.read(Path("w.safetensors")), Path("cache/photos.h5")))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def commands() -> list[str]:
    """The tspipe commands in the READMEs, without their comments."""
    lines = re.findall(r"^    (tspipe .*)$", README + FORMAT, re.MULTILINE)
    return [line.split("#")[0].strip() for line in lines]


def test_the_commands_and_their_flags_exist() -> None:
    group = typer.main.get_command(app)
    assert len(commands()) >= 18
    for line in commands():
        _, name, *words = line.split()
        command = group.commands[name]
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= flags, line


@pytest.mark.parametrize("run", sorted((ROOT / "docs" / "results").iterdir()), ids=lambda run: run.name)
def test_the_results_are_those_of_the_runs_that_are_kept(run: Path) -> None:
    """Every accuracy and every verdict of a run is in docs/results.md as its files give it."""
    found = read(open_run(run))
    written = " ".join((ROOT / "docs" / "results.md").read_text().split())
    for row in [*tables.accuracies(found).rows, *tables.beside_paper(found).rows]:
        assert " ".join(" ".join(row).split()) in written
    for sentence in tables.verdicts(found):
        assert sentence in written


def test_the_names_it_lists_are_those_there_are() -> None:
    line = next(line for line in README.splitlines() if line.startswith("Datasets: "))
    assert {name for name in datasets.names() if name != "folder"} <= set(re.findall(r"\w+", line))
    line = next(line for line in README.splitlines() if line.startswith("Networks: "))
    written = line.replace("resnet20/32/44/56/110", "resnet20 resnet32 resnet44 resnet56 resnet110")
    assert set(networks.names()) <= set(re.findall(r"\w+", written))


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("gpus", "begins"),
    [("", "b/tspipe cache"), ("GPUS=4", "b/torchrun --standalone --nproc-per-node '4' -m tspipe cache")],
)
def test_make_teacher_cache_starts_a_process_for_each_gpu(gpus: str, begins: str) -> None:
    command = ["make", "-n", "teacher-cache", "BIN=b", "DATASET=cifar10", *gpus.split()]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"\n{begins} --train-teacher --dataset 'cifar10' " in f"\n{said}"


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link.partition("#")[0]).exists(), link


def test_the_first_forty_lines_hold_the_story() -> None:
    start = "\n".join(README.splitlines()[:40])
    for part in ("make demo", "make test", "──▶ teacher", "lenet5"):
        assert part in start
