"""The documentation is correct: its Python blocks run, its commands parse, its links and names exist."""

import ast
import importlib
import itertools
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer.main
from PIL import Image

from shared import make_folder
from tspipe.cache import Cache
from tspipe.cli.app import app
from tspipe.data import datasets
from tspipe.data.random_images.score import label_shares
from tspipe.experiments import tables
from tspipe.experiments.results import across_runs, open_run, read
from tspipe.extraction.extract import ExtractConfig, extract
from tspipe.models import networks, weights
from tspipe.recipes import load
from tspipe.recipes.settings import settings_markdown
from tspipe.training.arms import ALONE
from tspipe.training.config import StudentConfig
from tspipe.training.trainer import train_students

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pipeline" / "tspipe"
README = (ROOT / "README.md").read_text()
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "cache" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Return the arguments of each tspipe command on a page that has a line of its own, with or without torchrun."""
    text = PAGES[page].replace("\\\n", " ")
    lines = re.findall(r"^(?: {4}|srun )(?:torchrun .*?-m )?tspipe (.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def load_recipe(arguments: list[str]) -> None:
    """Load the recipe that a command names, or cifar10, with the command's settings."""
    flags = dict(itertools.pairwise(arguments))
    settings = [value for flag, value in itertools.pairwise(arguments) if flag == "--set"]
    names = {"best": "cifar10,best", "strong": "cifar10,strong", "my.toml": "cifar10"}
    recipe = flags.get("--recipe", "cifar10")
    load.load(names.get(recipe, recipe), settings, {"loss": flags.get("--loss")})


@pytest.mark.parametrize(
    "page",
    [page for page, text in PAGES.items() if page not in ("CONTRIBUTING.md", "docs/photos.md") and PYTHON.search(text)],
)
def test_the_python_blocks_run(page: str, digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cache").mkdir()
    shutil.copy(digits.path, "cache/digits.h5")
    torch.manual_seed(0)
    make_folder(Path("data/photos"))
    weights.save(Path("w.safetensors"), networks.build("lenet5", 2, (3, 16, 16)), {})
    if page == "docs/deploy.md":
        train_students(
            StudentConfig(load.load("digits", ["epochs=1", "seeds=1"]), digits, (ALONE,), out=Path("runs/digits"))
        )
    recipe = load.load("folder", ["dataset=folder:data/photos", "teacher.network=lenet5"])
    extract(ExtractConfig(recipe, weights.read(Path("w.safetensors")), Path("cache/photos.h5")))
    for block in PYTHON.findall(PAGES[page]):
        exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_parse(page: str) -> None:
    group = typer.main.get_command(app)
    for name, *arguments in commands(page):
        group.commands[name].make_context(name, list(arguments))
        if "dataset=./shapes.py" not in arguments:  # a file that exists only in its own test
            load_recipe(arguments)


def test_enough_commands_are_checked() -> None:
    assert sum(len(commands(page)) for page in PAGES) >= 70
    used = {name for page in PAGES for name, *_ in commands(page)}
    assert used == set(typer.main.get_command(app).commands)


def test_the_examples_of_contributing_train(tspipe: Callable) -> None:
    for block in PYTHON.findall(PAGES["CONTRIBUTING.md"]):
        assert block.count("\n") < 40
        Path(re.match(r"# (\w+\.py)\n", block)[1]).write_text(block)
    for arguments in commands("CONTRIBUTING.md"):
        result = tspipe(*arguments)
        assert result.code == 0, result.err
    assert "taught + random, cosine" in result.out


def test_the_example_of_photos_works(tspipe: Callable) -> None:
    make_folder(Path("photos"))
    steps = {
        "teacher": ["--teacher", "lenet5", "--epochs", "1"],
        "cache": ["--teacher", "lenet5", "--out", "cache/photos.h5"],
        "student": ["--student", "lenet5", "--epochs", "1", "--seeds", "1"],
    }
    for name, *arguments in [command for command in commands("README.md") if "photos" in " ".join(command)]:
        result = tspipe(name, *[argument for argument in arguments if argument != "--download"], *steps[name])
        assert result.code == 0, result.err


LITE0 = """
from torch import nn

class EfficientNet(nn.Sequential):
    @classmethod
    def from_name(cls, name, num_classes=1000):
        net = cls()
        net._conv_stem, net._bn0 = nn.Conv2d(3, 192, 32, 32), nn.BatchNorm2d(192)
        net._blocks = nn.Sequential(*(nn.Identity() for _ in range(15)), nn.AdaptiveAvgPool2d(1))
        net._flatten, net._fc = nn.Flatten(), nn.Linear(192, num_classes)
        return net
"""


def test_the_walk_from_weights_to_a_phone(tspipe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's commands, with its own files, for a tiny network in place of EfficientNet-Lite0."""
    make_photos(Path("photos"))
    Path("efficientnet_lite_pytorch.py").write_text(LITE0)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    torch.save(
        importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("").state_dict(), "lite0.pth"
    )
    for block in PYTHON.findall(PAGES["docs/photos.md"]):
        Path(re.match(r"# (\w+\.py)\n", block)[1]).write_text(block)
    for name, *arguments in commands("docs/photos.md")[-5:]:
        result = tspipe(name, *arguments, *{"teacher": ["--epochs=1"], "student": ["--epochs=1"]}.get(name, []))
        assert result.code == 0, result.err


def make_photos(root: Path) -> None:
    """Write JPEG images of two classes and of different sizes."""
    for index, folder in enumerate(root / split / name for split in ("train", "test") for name in "ab"):
        folder.mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (250 + 20 * i, 300 - 10 * i), (200 * (index % 2), 20 * i, 90)).save(folder / f"{i}.jpg")


RUNS = [path.parent for path in sorted((ROOT / "docs").glob("results*/*/config.json"))]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_results_are_those_of_the_recorded_runs(run: Path) -> None:
    """Every accuracy and every verdict of a recorded run is on the page as computed from its files."""
    findings = read(open_run(run))
    page = " ".join(PAGES[f"docs/{run.parent.name}.md"].split())
    for row in [*tables.accuracies(findings, narrow=True).rows, *tables.beside_paper(findings).rows]:
        assert " ".join(" ".join(row).split()) in page
    for sentence in tables.verdicts(findings):
        assert sentence in page


def test_the_ranking_of_all_arms_is_that_of_the_recorded_runs() -> None:
    findings = [read(open_run(run)) for run in RUNS if run.parent.name == "results"]
    page = " ".join(PAGES["docs/results.md"].split())
    (compared,) = across_runs(findings)
    for row in tables.across_runs(compared).rows:
        assert " ".join(" ".join(row).split()) in page
    for interval in re.findall(
        r"[+-]\d+\.\d\d \([+-]\d+\.\d\d to [+-]\d+\.\d\d\)", PAGES["README.md"].partition("## Does it")[2]
    ):
        assert interval in page


def test_the_page_of_recipes_is_generated_from_the_schema() -> None:
    markdown = settings_markdown()
    page = PAGES["docs/recipes.md"]
    table = page.partition("tspipe.recipes.settings -->\n")[2].partition("<!-- end of settings -->")[0]
    assert table.strip() == markdown.strip()


def test_the_messages_quoted_are_in_the_source() -> None:
    """Every message in docs/reliability.md consists of strings of the package and inserted values."""
    nodes = [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    texts = {node.value.strip() for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    messages = re.findall(r"^\|[^|]*\| `(.*)` \|$", PAGES["docs/reliability.md"], re.MULTILINE)
    assert len(messages) >= 25
    for message in messages:
        rest = message
        for text in sorted((text for text in texts if len(text) > 3 and text in message), key=len, reverse=True):
            rest = rest.replace(text, "")
        rest = re.sub(r"'[^']*'|\"[^\"]*\"|\S+\.h5", "", rest)
        assert not re.search(r"[a-z]{4}", rest), (message, rest)


def test_the_names_listed_are_those_available() -> None:
    page = PAGES["docs/command-line.md"]
    listed = re.findall(r"\w+", page.partition("\nDatasets: ")[2].partition("\nNetworks: ")[0])
    assert {name for name in datasets.names() if name != "folder"} <= set(listed)
    listed = page.partition("\nNetworks: ")[2].partition("\n\n")[0]
    listed = listed.replace("resnet20/32/44/56/110", "resnet20 resnet32 resnet44 resnet56 resnet110")
    assert set(networks.names()) <= set(re.findall(r"\w+", listed))


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page, text in PAGES.items():
        for target in re.findall(r"^    make ([a-z-]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page, target)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("gpus", "start"),
    [("", "b/tspipe cache"), ("GPUS=4", "b/torchrun --standalone --nproc-per-node '4' -m tspipe cache")],
)
def test_make_teacher_cache_starts_a_process_for_each_gpu(gpus: str, start: str) -> None:
    command = ["make", "-n", "teacher-cache", "BIN=b", "DATASET=cifar10", *gpus.split()]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"\n{start} --train-teacher --dataset 'cifar10' " in f"\n{printed}"


@pytest.mark.parametrize("page", PAGES)
def test_link_targets_exist(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("page", PAGES)
def test_the_files_named_exist(page: str) -> None:
    for file in re.findall(r"(?<![\w/])(?:tests|benchmarks|pipeline|docs)/[a-z0-9_/]+\.(?:py|toml|md)", PAGES[page]):
        assert (ROOT / file).exists(), file


def test_the_readme_is_short_and_starts_with_the_essentials() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130
    start = "\n".join(lines[:40])
    for part in ("──▶ teacher", "pip install", "make demo", "make test", "make teacher-cache"):
        assert part in start


def test_the_readme_shows_what_the_commands_print(tspipe: Callable, digits: Cache) -> None:
    printed = [line.split("  ")[0] for line in tspipe("info", digits.path).out.splitlines()]
    block = README.partition("# ends with:\n\n")[2].partition("\n\n")[0].splitlines()
    assert [line.strip().split("  ")[0] for line in block[:-1]] == printed
    assert block[-1].startswith("    Next: tspipe student --cache ")
    assert f"    {label_shares({'8': 76, '5': 24})}\n" in README


def test_every_page_is_linked_from_the_readme() -> None:
    assert [page for page in PAGES if page != "README.md" and f"({page})" not in README] == []
