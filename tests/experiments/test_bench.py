"""The benchmark: what it compares, and that both sides of a comparison do the same work."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Result
from shared import small
from tspipe.cache import Cache
from tspipe.experiments import baselines as floors
from tspipe.experiments import bench
from tspipe.extraction.extract import extract
from tspipe.recipes import load
from tspipe.training.arms import RANDOM, TAUGHT
from tspipe.training.config import StudentConfig

LINES = [
    "rows held / index_select",
    "rows read / h5py",
    "lenet5 epoch / bare",
    "lenet5 epoch / live",
    "random images / eager",
    "cohort of 2 / bare",
    "stage one / bare",
    "stage one / eager",
]


def config(cache: Cache) -> StudentConfig:
    facts = {"preprocess": cache.manifest["preprocess"]}
    return StudentConfig(load.load("digits", ["batch_size=100", "random_images=5"], facts=facts), cache)


def test_what_it_prints(digits: Cache, tspipe: Callable[..., Result]) -> None:
    settings = [f"--set={setting}" for setting in ("batch_size=100", "random_images=5")]
    command = ["bench", "--cache", digits.path, "--seconds", "1", *settings]
    found = json.loads(tspipe(*command, "--json").out)
    assert found["cache"] == digits.id
    assert found["environment"]["threads"] == 1
    assert [line["what"] for line in found["lines"]] == LINES
    for line in found["lines"]:
        assert min(line["floor"], line["ours"]) > 0
        assert line["lower"] <= line["ratio"] <= line["upper"]
        assert bench._LEAST <= line["n"] <= bench._MOST
    facts = found["facts"]
    assert facts["teacher: max|Δ|/max|f| from the plain network"] < 1e-4
    steps = facts["teacher: seconds of a pass over random images"] / facts["lenet5: seconds of a taught step"]
    faster = facts["lenet5: cached epoch, times faster than live"]
    beginning = (
        f"With this teacher and lenet5 a cached epoch is {faster:.3g} × faster than one with the teacher in the loop; "
        f"random images live cost {steps:.2g} student steps a batch: "
    )
    assert found["sentence"].startswith(beginning)

    shown = tspipe(*command).out
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "torch " + torch.__version__.split("+")[0] in shown


def test_a_floor_takes_the_steps_that_training_takes(digits: Cache, tmp_path: Path) -> None:
    """Bare steps end with the weights that `Run.learn` gives, or the comparison would be of two things."""
    measured = bench.Bench(config(digits), 1, tmp_path)
    ours, bare = ([measured._learner("lenet5", arm) for arm in (TAUGHT, RANDOM)] for _ in range(2))
    floors.taken(measured._learn(ours, ""))(3)
    batches = [batch for _, batch in measured.run.batches(0, 0, slice(3))]
    floors.taken(floors.bare_steps(bare[0], ((batch.images, batch.target) for batch in batches)))(3)
    floors.taken(floors.bare_steps(bare[1], map(floors.joined, batches)))(3)
    for one, two in zip(ours, bare, strict=True):
        for name, value in one.network.state_dict().items():
            torch.testing.assert_close(two.network.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_without_a_teacher_only_targets_are_timed(digits: Cache, tmp_path: Path) -> None:
    chosen = config(digits)
    recipe = chosen.recipe.model_copy(update={"random_images": 0})
    found = bench.bench(StudentConfig(recipe, digits), seconds=1)
    assert [line.what for line in found.lines] == LINES[:3]
    assert found.sentence == (
        "The file carries no teacher, or no random images are asked for, so only cached targets were timed."
    )


def test_seconds_are_a_number(tspipe: Callable[..., Result]) -> None:
    assert tspipe("bench", "--cache", "x.h5", "--seconds", "soon").code == 2


@pytest.mark.parametrize(("seconds", "turns", "slow", "fast"), [(1, 11, 1, 1), (110, 16, 1, 5), (4000, 101, 6, 26)])
def test_turns_are_short_and_of_one_length(
    seconds: int, turns: int, slow: int, fast: int, digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, done = 0.0, []

    def way(length: float) -> floors.Way:
        def do(count: int) -> None:
            nonlocal now
            now += count * length
            done.append((length, count))

        return do

    measured = bench.Bench(config(digits), 1, tmp_path)
    measured.seconds = seconds / 2
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    found = measured._turns({"slow": way(3.25), "fast": way(0.75)})
    assert found == {"slow": [3.25] * turns, "fast": [0.75] * turns}
    assert set(done[4:]) == {(3.25, slow), (0.75, fast)}
    assert {length for length, _ in done[4::2]} == {3.25, 0.75}, "neither is always the first"


@pytest.mark.parametrize("images", [False, True])
def test_files_are_decoded_also_for_a_cache_with_pixels(
    images: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = replace(small(tmp_path / "shapes"), images=images)
    cache = extract(wanted)
    assert cache is not None
    chosen = wanted.recipe.model_copy(update={"batch_size": 4, "random_images": 2})
    here = StudentConfig(chosen, cache, data=wanted.data)
    assert bench.bench(here, seconds=1).lines[-1].what == "stage one, files / eager"
    assert "files" not in capsys.readouterr().err
    (tmp_path / "shapes").rename(tmp_path / "elsewhere")
    if images:
        assert [line.what for line in bench.bench(here, seconds=1).lines] == LINES
        said = (
            f"Stage one is not timed from files. There is no train split in {tmp_path}/shapes: looked for "
            f"{tmp_path}/shapes/train. The layout is train/CLASS/IMAGE and test/CLASS/IMAGE. "
            "Name it with --data FOLDER."
        )
        assert "".join(capsys.readouterr().err.split()) == said.replace(" ", "")  # lines may end anywhere


def test_stage_one_is_timed_in_float32(digits: Cache, tmp_path: Path) -> None:
    """As it runs, also where the live teacher is to compute in bfloat16."""
    chosen, seen = config(digits), set[torch.dtype]()
    recipe = chosen.recipe.model_copy(update={"live_precision": "bfloat16"})
    measured = bench.Bench(replace(chosen, recipe=recipe), 1, tmp_path)
    assert measured.live is not None
    teacher = measured.live.teacher
    assert teacher.precision == torch.bfloat16
    teacher.register_forward_hook(lambda *_: seen.add(teacher.precision))
    measured._stage_one()
    assert seen == {torch.float32}


def test_a_pool_is_compared_with_the_live_teacher(pool: Cache) -> None:
    assert [line.what for line in bench.bench(config(pool), seconds=1).lines] == [
        *LINES[:5],
        "random images, pool / live",
        *LINES[5:],
    ]
