"""The paper's tables as jobs: their steps, resuming, and errors that are raised before stage one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shared import make_folder, untouched
from tspipe.cache import Cache, open_cache
from tspipe.errors import NetworkError, RecipeError
from tspipe.experiments import reproduce as job
from tspipe.experiments.reproduce import TableConfig, parts, reproduce, shortened
from tspipe.recipes import load
from tspipe.training.arms import ALONE, OWN, RANDOM, TAUGHT, select_arms
from tspipe.training.run_folder import RunFolder

TINY = (
    "teacher.network=lenet5", "teacher.epochs=1", "teacher.batch_size=4", "batch_size=8", "random_images=3",
    "students.lenet5_wide.options.maps=[4,4]", "students.lenet5_wide.options.hidden=8",
)  # fmt: skip
TABLE1 = TableConfig("table1", epochs=2, seeds=1, dataset="folder:photos", settings=TINY)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small folder of images in place of CIFAR-10, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return make_folder(tmp_path / "photos", 16, 8)


def test_a_finished_table_is_left_unchanged(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = reproduce(TABLE1)
    assert capsys.readouterr().out.splitlines()[0] == (
        "Table 1: lenet5 runs on 48 images; 3 students of 2 epochs take 24 steps of 8 images, some with 3 random "
        "images more, which the teacher labels live"
    )
    assert run.config["arms"] == [ALONE, TAUGHT, RANDOM]
    assert list(run.config["students"]) == ["lenet5_wide"]
    assert len(run.rows()) == 2 * 3
    paper = run.read_json("summary.json")["paper"]
    assert paper["accuracy"] == {"lenet5_wide": {ALONE: 0.78, TAUGHT: 0.8136, RANDOM: 0.8149}}
    assert paper["differs"] == [
        "folder:photos in place of cifar10",
        "the teacher lenet5 in place of resnet56",
        "2 epochs in place of 200, with the learning-rate schedule in proportion",
        *(f"--set {setting}" for setting in TINY),
    ]
    made = [path for folder in ("checkpoints", "cache", run.path) for path in Path(folder).iterdir()]
    assert Path("cache/photos-lenet5.h5") in made
    before = {path: untouched(path) for path in made}
    (again,) = reproduce(TABLE1)
    assert again.path == run.path
    assert {path: untouched(path) for path in made} == before


def test_an_interrupted_table_resumes(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job interrupted after stage one does not repeat it."""
    train = job.train_students

    def interrupt(*_: object) -> RunFolder:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "train_students", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reproduce(TABLE1)
    monkeypatch.setattr(job, "train_students", train)
    before = untouched(Path("cache/photos-lenet5.h5"))
    (run,) = reproduce(TABLE1)
    assert untouched(Path("cache/photos-lenet5.h5")) == before
    assert run.finished


def test_the_paper_is_recorded_in_a_run_that_was_finished_before(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether `tspipe student` finished it or another `tspipe reproduce`."""
    monkeypatch.setattr(job, "_record_paper", lambda *_: None)
    (run,) = reproduce(replace(TABLE1, epochs=1))
    assert "paper" not in run.read_json("summary.json")
    monkeypatch.undo()
    monkeypatch.chdir(photos.parent)
    for settings in (TINY, (*TINY, "checkpoint_seconds=5")):
        reproduce(replace(TABLE1, epochs=1, settings=settings))
        assert run.read_json("summary.json")["paper"]["differs"][3:] == [f"--set {text}" for text in settings]


def test_a_cache_without_its_teachers_weights_is_not_replaced(photos: Path) -> None:
    """A teacher trained anew would give another cache."""
    reproduce(TABLE1)
    for file in Path("checkpoints").iterdir():
        file.unlink()
    with pytest.raises(RecipeError) as refused:
        reproduce(TABLE1)
    assert str(refused.value) == (
        "cache/photos-lenet5.h5 exists, but the weights of its lenet5 do not. Use it as it is (--cache "
        "cache/photos-lenet5.h5), or give the weights: --weights FILE"
    )
    (run,) = reproduce(replace(TABLE1, cache=Path("cache/photos-lenet5.h5")))
    assert run.finished


def test_a_dataset_plug_in_replaces_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import numpy as np\n"
        "from tspipe.data.datasets import from_array\n\n\n"
        "def load(root, split):\n"
        "    draw = np.random.default_rng(len(split))\n"
        "    pixels = draw.integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)\n"
        "    return from_array(pixels, draw.integers(0, 2, 32), ['a', 'b'])\n"
    )
    (run,) = reproduce(replace(TABLE1, dataset="cifar10=./mine.py"))
    assert run.read_json("summary.json")["paper"]["differs"][0] == "mine in place of cifar10"
    assert Path("cache/mine-lenet5.h5").exists()


def test_the_cache_with_views_has_a_name_of_its_own(photos: Path) -> None:
    table_config = replace(TABLE1, arms="taught", recipe="strong", settings=(*TINY, "views.count=3"))
    (run,) = reproduce(table_config)
    assert open_cache(Path("cache/photos-lenet5-views3.h5")).manifest["views"]["count"] == 3
    student = run.config["students"]["lenet5_wide"]
    assert (student["optimizer"], student["lr"], student["lr_milestones"]) == ("sgd", 0.01, [1, 1, 2])
    differs = run.read_json("summary.json")["paper"]["differs"]
    assert "the recipe strong" in differs
    assert "students see 3 views of each training image, shifted and flipped" in differs
    assert {row["arm"] for row in run.rows()} == {TAUGHT}


def test_a_pool_is_made_for_a_recipe_that_uses_one(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "POOL", 10)
    settings = (*TINY, "random_source=pool", "views.count=0")
    (run,) = reproduce(replace(TABLE1, arms="alone-random,random", recipe="best", settings=settings))
    cache = open_cache(Path("cache/photos-lenet5-pool10.h5"))
    assert (cache.manifest["random"]["rows"], cache.manifest["random"]["kind"]) == (10, "mixed")
    assert run.config["random_source"] == "pool"
    assert [(row["arm"], row["loss"]) for row in run.rows()[:2]] == [("alone + random", "xent"), (RANDOM, "srrl")]


def test_the_progress_of_a_part_counts_the_images_of_the_others(digits: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time left is that of the whole table."""
    jobs = []
    monkeypatch.setattr(job, "_print_work", lambda *_: None)
    monkeypatch.setattr(job, "_cache", lambda *_: digits.path)
    monkeypatch.setattr(job, "train_students", lambda table_config, _group: jobs.append(table_config))
    monkeypatch.setattr(job, "_record_paper", lambda *_: None)
    reproduce(TableConfig("table2", students=("lenet5",), epochs=3, seeds=2))
    assert [table_config.progress_offset for table_config in jobs] == [(0, 6000), (6000, 0)]
    assert [table_config.recipe.paper.title for table_config in jobs] == ["Table 2, CIFAR-10", "Table 2, CIFAR-100"]
    assert [table_config.recipe.epochs for table_config in jobs] == [3, 3]


def test_a_dataset_selects_the_parts() -> None:
    assert [part.dataset for part in parts(TableConfig("table2"))] == ["cifar10", "cifar100"]
    (part,) = parts(TableConfig("table2", dataset="cifar100"))
    assert (part.name, part.dataset) == ("table2_cifar100", "cifar100")
    (part,) = parts(TableConfig("table2", dataset="cifar10=folder:photos"))
    assert (part.name, part.dataset) == ("table2_cifar10", "folder:photos")
    assert parts(TableConfig("table3", dataset="folder:birds"))[0].dataset == "folder:birds"


@pytest.mark.parametrize(
    ("table_config", "expected"),
    [
        (TableConfig("table4"), "Unknown table 'table4'. There are: table3, table2, table1."),
        (
            TableConfig("table2", dataset="folder:photos"),
            "table2 has a part for each of cifar10 and cifar100, and --dataset applies to one. Name it: "
            "--dataset cifar10=folder:photos",
        ),
        (
            TableConfig("table2", weights=Path("w.pt")),
            "table2 has a part for each of cifar10 and cifar100, and --weights applies to one. Name it: --dataset "
            "cifar10",
        ),
        (
            TableConfig("table2", dataset="cub200=folder:birds"),
            "table2 does not use cub200. It uses: cifar10, cifar100.",
        ),
        (
            TableConfig("table3", arms="random"),
            "There is no arm 'random' with these settings. There are: alone, own, taught.",
        ),
        (
            TableConfig("table1", students=("lenet5", "lenet5")),
            "Two students are named lenet5. Name each once, and give files different names.",
        ),
        (
            TableConfig("table1", arms="alone,own"),
            "There is no arm 'own' with these settings. There are: alone, taught, random.",
        ),
    ],
    ids=lambda value: "",
)
def test_unknown_names_are_refused(table_config: TableConfig, expected: str) -> None:
    with pytest.raises(RecipeError) as refused:
        reproduce(table_config)
    assert str(refused.value) == expected


def test_an_unknown_student_or_loss_is_refused_before_the_teacher_runs() -> None:
    with pytest.raises(NetworkError, match=r"^Unknown network 'lenet6'\. There are: lenet5, "):
        reproduce(TableConfig("table1", students=("lenet6",)))
    with pytest.raises(RecipeError, match=r"^Unknown loss 'tss'\. There are: ts, "):
        reproduce(TableConfig("table1", settings=("loss=tss",)))


def test_a_shorter_schedule_is_in_proportion() -> None:
    paper = shortened(load.load("table2_cifar10"), 20)
    assert (paper.epochs, paper.lr_drop_every) == (20, 5)
    assert paper.optimisation("alexnet").lr_drop_every == 5
    strong = shortened(load.load("table1,strong"), 20)
    assert strong.optimisation("lenet5_wide").lr_milestones == [6, 12, 16]
    assert shortened(load.load("table1,strong"), 1).optimisation("lenet5_wide").lr_milestones == [1, 1, 1]
    birds = shortened(load.load("table3"), 50)
    assert (birds.optimisation("mobilenet_v2").lr_drop_every, birds.alone.lr_drop_every) == (25, None)
    assert shortened(birds, 50).model_dump() == birds.model_dump()
    assert OWN in select_arms(True, birds)


def test_on_the_command_line(tspipe: Callable, photos: Path) -> None:
    settings = [word for setting in TINY for word in ("--set", setting)]
    result = tspipe(
        "reproduce", "table1", "--dataset", "folder:photos", "--arms", "alone,taught", "--epochs", 1, *settings
    )
    assert (result.code, result.error) == (0, "")
    assert "Table 1: lenet5_wide; alone; taught; 1 epoch, 1 seed\n" in result.out
    assert "  differs from the paper: folder:photos in place of cifar10\n" in result.out
    (page,) = Path("runs").glob("*/report.html")
    assert result.out.endswith(f"Report: {page} (figures beside it)\n")
    assert "81.36" in page.read_text()
    refused = tspipe("reproduce", "table1", "--arms", "own")
    assert (refused.code, refused.error) == (
        1,
        "There is no arm 'own' with these settings. There are: alone, taught, random.",
    )
