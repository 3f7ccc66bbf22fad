"""Reports of runs: the text in the terminal, the files, and the content of the page."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from made_runs import ALONE, PAPER, RANDOM, TAUGHT, make_run
from shared import HOSTILE
from tspipe.cli.app import app
from tspipe.errors import ReportError
from tspipe.experiments import report, tables
from tspipe.experiments.figures import Drawing
from tspipe.experiments.results import read
from tspipe.training.run_folder import RunFolder

FIGURES = [f"{name}.{kind}" for name in ("accuracy", "increase", "curves", "pareto") for kind in ("png", "svg")]
VOID = {"meta", "br", "img"}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of three arms and three seeds."""
    made = {ALONE: [[0.60, 0.6], [0.61, 0.62], [0.6, 0.61]], TAUGHT: [[0.5, 0.63], [0.5, 0.65], [0.5, 0.63]]}
    made |= {(TAUGHT, "kd"): [[0.5, 0.6]] * 3, RANDOM: [[0.5, 0.64]] * 3}
    columns = {"mse": 2.0, "xent": 2.0}
    return make_run(tmp_path / "run", made, columns=columns, labels={"bird": 3, "cat": 1}, paper=PAPER)


class Page(HTMLParser):
    """The addresses that a page refers to, its text, and a check that its elements nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open += [tag] if tag not in VOID else []
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag) if tag not in VOID else None

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_a_report_is_one_page_and_figures(run: RunFolder, tmp_path: Path) -> None:
    made = report.write([read(run)], tmp_path / "out")
    assert made == tmp_path / "out/report.html"
    assert sorted(path.name for path in made.parent.iterdir()) == sorted(["report.html", *FIGURES])
    assert all((made.parent / name).read_bytes().startswith(b"\x89PNG") for name in FIGURES if name.endswith("png"))
    page = Page(made.read_text())
    for part in (
        "lenet5 taught by resnet56 on cifar10",
        "lenet5, taught: +2.67 (+1.23 to +4.10), it helps",
        "lenet5 taught, kd 60.00 ± 0.00 60.00 ± 0.00 † 62,006 2.50",
        "best †: the highest of all epochs, selected by the test set itself, as in the paper; it is optimistic.",
        "lenet5 taught 63.67 ± 1.15 † 81.36 +2.67 +3.36 same",
        "Wu and Gu [26] 80.40",
        "Differences from the paper: 1 epoch, not 200.",
        "resnet56, 853,018 parameters: 83.20 % test accuracy.",
        "bird 3 75.0% cat 1 25.0%",
        "lenet5, taught, epoch 1: mse 2 / xent 2 = 1, as expected",
        "seeds 3",
        "torch 2.6.0",
        "ab" * 32,
    ):
        assert part in page.text
    assert page.text.count("over the student alone, points") == 1  # the figures are in the page, as text


def test_a_page_loads_nothing_and_ids_are_unique(run: RunFolder, tmp_path: Path) -> None:
    text = report.write([read(run), read(make_run(tmp_path / "b/run", {ALONE: [[0.5]]}))], tmp_path / "out").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.addresses)
    assert all(name in page.ids for name in re.findall(r"url\(#([^)]*)\)", text))
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(set(page.ids)) == len(page.ids)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {ALONE: [[0.5]], TAUGHT: [[0.5]]})
    one, two = (report.write([read(run)], tmp_path / name).parent for name in ("one", "two"))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in two.iterdir()
    }


def test_runs_of_one_name_do_not_overwrite_each_others_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without the student alone has no increase over it."""
    runs = [read(make_run(tmp_path / name, {TAUGHT: [[0.5]]})) for name in ("a/run", "b/run", "third")]
    monkeypatch.setattr(report.figures, "draw", lambda _, name: Drawing(name, "", "", "<svg></svg>", b""))
    folder = report.write(runs, tmp_path / "out").parent
    assert sorted(path.name for path in folder.glob("*.svg")) == [
        "run-1-accuracy.svg", "run-1-curves.svg", "run-1-pareto.svg", "run-2-accuracy.svg", "run-2-curves.svg",
        "run-2-pareto.svg", "third-accuracy.svg", "third-curves.svg", "third-pareto.svg",
    ]  # fmt: skip


def test_arms_of_several_runs_are_paired_with_the_student_alone_of_the_first(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with fewer seeds, and one of another dataset, are not compared."""
    mixed = make_run(tmp_path / "mixed", {RANDOM: [[0.5, 0.66], [0.5, 0.67], [0.5, 0.68]]})
    short = make_run(tmp_path / "short", {RANDOM: [[0.5, 0.9]] * 2})
    other = make_run(tmp_path / "other", {RANDOM: [[0.5, 0.9]] * 3}, dataset="digits")
    report.make([run, mixed, short, other], tmp_path / "out")
    text = capsys.readouterr().out.partition("lenet5: 2 epochs, 3 seeds")[2]
    ranked = [" ".join(line.split()) for line in text.splitlines() if "±" in line]
    assert ranked[0] == "mixed taught + random 67.00 ± 1.00 +6.00 (+3.52 to +8.48) 2.50"
    assert [line.partition(" ")[0] for line in ranked] == ["mixed", *["run"] * 4]
    assert "run alone 61.00 ± 1.00 2.50" in ranked
    page = Page((tmp_path / "out/report.html").read_text())
    assert "All runs of lenet5: 2 epochs, 3 seeds" in page.text
    assert "+6.00 (+3.52 to +8.48)" in page.text
    assert (tmp_path / "out/across-runs-1.png").exists()


def test_a_report_names_what_to_try_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what none of the runs has."""
    noise = make_run(tmp_path / "noise", {ALONE: [[0.6]], RANDOM: [[0.6]]})
    report.make([noise])
    text = capsys.readouterr().out
    for option in ("--loss srrl", "--random-images 128 --set random_kind=mixed", "--arms alone-random"):
        assert f"  {option}: " in text
        assert f"{option}: " in Page((noise.path / "report.html").read_text()).text
    mixed = make_run(tmp_path / "mixed", {(RANDOM, "srrl"): [[0.6]]})
    mixed.config["random_kind"] = "mixed"
    report.make([noise, mixed], tmp_path / "out")
    text = capsys.readouterr().out.partition(tables.UNTRIED)[2]
    assert "--arms alone-random" in text
    assert "--loss srrl" not in text
    assert "random_kind=mixed" not in text


def test_text_of_a_run_folder_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"dataset": HOSTILE, "labels": {HOSTILE: 1}, "student": HOSTILE}
    made = {ALONE: [[0.6]], TAUGHT: [[0.6]], (TAUGHT, HOSTILE): [[0.6]], (HOSTILE, "ts"): [[0.6]]}
    run = make_run(tmp_path / "run", made, columns={"mse": 2.0, "xent": 2.0}, **summary)
    run.config[HOSTILE] = HOSTILE
    report.make([run])
    assert "\x1b" not in capsys.readouterr().out
    for path in (run.path / "report.html", *run.path.glob("*.svg")):
        text = path.read_text()
        assert "<script" not in text
        assert "\x1b" not in text
        assert "script&gt;" in text


def test_the_terminal_shows_a_finished_run_in_eighty_columns(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    report.show(run)
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    words = "".join(text.split())  # lines may end anywhere
    for part in (
        "61.00 ± 1.00",
        "Test accuracy in %, mean ± sample deviation; best is selected by the test set.",
        "lenet5, taught: +2.67 (+1.23 to +4.10), it helps",
        "The teacher's labels for random images: bird (75%), cat (25%)",
        f"Run folder: {run.path} (metrics.csv, curves.png, students)",
    ):
        assert part.replace(" ", "") in words
    assert (run.path / "curves.png").exists()


def test_three_accuracies_fit_in_eighty_columns_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {ALONE: [[0.60], [0.61]], RANDOM: [[0.5], [0.63]]}
    report.show(make_run(tmp_path / "run", made, columns={"val_accuracy": 0.5}, student="mobilenet_v2"))
    text = capsys.readouterr().out
    assert any(line.split()[:4] == ["mobilenet_v2", "taught", "+", "random"] for line in text.splitlines())
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "chosen by held-back training images" in " ".join(text.split())


def test_a_run_without_matplotlib(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stage two finishes without curves; a report is refused."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.show(run)
    assert "no curves: pip install 'tspipe[plots]'" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ReportError) as problem:
        report.make([run], tmp_path / "out")
    assert str(problem.value) == "The figures of a report need matplotlib: pip install 'tspipe[plots]'"
    assert not (tmp_path / "out").exists()


def test_the_command(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run named twice is reported once, in its folder; the folder for several runs does not depend on their order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report.figures, "draw", lambda _, name: Drawing(name, "", "", "<svg></svg>", b""))
    result = CliRunner().invoke(app, ["report", "run", "./run/"], catch_exceptions=False)
    assert " ".join(result.output.split()).endswith("Report: run/report.html (figures beside it)")
    assert result.output.count("mse 2 / xent 2 = 1, as expected") == 3  # its three taught results, once
    one, two = (make_run(tmp_path / name, {ALONE: [[0.5]]}) for name in "ab")
    folder = report.default_folder([one, two])
    assert folder == report.default_folder([two, one]) != report.default_folder([run, one])
    CliRunner().invoke(app, ["report", "a", "b"], catch_exceptions=False)
    assert (folder / "report.html").exists()
