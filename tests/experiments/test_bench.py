"""The benchmark: its comparisons, and the equal work of both sides."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Result
from tspipe.cache import Cache
from tspipe.errors import RecipeError
from tspipe.experiments import bench, turns, wall_clock
from tspipe.experiments.baselines import as_way, bare_steps, joined
from tspipe.experiments.turns import Timer, Way
from tspipe.recipes import load
from tspipe.training.arms import RANDOM, TAUGHT
from tspipe.training.config import StudentConfig
from tspipe.training.run_folder import RunFolder
from tspipe.training.trainer import Trainer, open_trainer

LINES = [
    "lenet5 step ratio",
    "lenet5 epoch / live",
    "cohort of 2 / bare",
]


def config(cache: Cache) -> StudentConfig:
    facts = {"preprocess": cache.manifest["preprocess"]}
    return StudentConfig(load.load("digits", ["batch_size=100", "random_images=5"], facts=facts), cache)


def test_the_command_prints_comparisons_and_advice(
    digits: Cache, tspipe: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"--set={setting}" for setting in ("batch_size=100", "random_images=5")]
    command = ["bench", "--cache", digits.path, "--seconds", "1", *settings]
    result = json.loads(tspipe(*command, "--json").out)
    assert result["cache"] == digits.id
    assert result["environment"]["threads"] == 1
    assert [line["what"] for line in result["lines"]] == LINES
    for line in result["lines"]:
        assert min(line["floor"], line["ours"]) > 0
        assert line["lower"] <= line["ratio"] <= line["upper"]
        assert turns._MIN_TURNS <= line["n"] <= turns._MAX_TURNS
    facts = result["facts"]
    steps = facts["teacher: seconds of a pass over random images"] / facts["lenet5: seconds of a taught step"]
    faster = facts["lenet5: cached epoch, times faster than live"]
    beginning = (
        f"With this teacher and lenet5, a cached epoch is {faster:.3g} × faster than one with the teacher in the loop. "
        f"Live random images cost {steps:.2g} student steps per batch: "
    )
    assert result["sentence"].startswith(beginning)

    measured = bench.Result(**{**result, "lines": [bench.Line(**line) for line in result["lines"]]})
    monkeypatch.setattr(bench, "bench", lambda *_: measured)
    text = tspipe(*command).out
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "torch " + torch.__version__.split("+")[0] in text


def open_bench(config: StudentConfig, folder: Path) -> Trainer:
    recipe = config.recipe.model_copy(update={"random_source": "live"})
    config = replace(config, arms=(TAUGHT, RANDOM), recipe=recipe)
    return open_trainer(config, RunFolder(folder, {}, {}), torch.device("cpu"))


def test_a_floor_takes_the_steps_that_training_takes(digits: Cache, tmp_path: Path) -> None:
    """Bare steps end with the same weights as training."""
    trainer = open_bench(config(digits), tmp_path)
    ours, bare = ([bench._learner(trainer, "lenet5", arm) for arm in (TAUGHT, RANDOM)] for _ in range(2))
    source = trainer.batches
    as_way(bench._endless_steps(trainer, ours, source))(3)
    batches = [batch for _, batch in source.epoch(0, 0, slice(3))]
    as_way(bare_steps(bare[0], ((batch.images, batch.target) for batch in batches)))(3)
    as_way(bare_steps(bare[1], map(joined, batches)))(3)
    for one, two in zip(ours, bare, strict=True):
        for name, value in one.network.state_dict().items():
            torch.testing.assert_close(two.network.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_without_a_teacher_only_targets_are_timed(digits: Cache, tmp_path: Path) -> None:
    chosen = config(digits)
    recipe = chosen.recipe.model_copy(update={"random_images": 0})
    result = bench.bench(StudentConfig(recipe, digits), seconds=1)
    assert [line.what for line in result.lines] == LINES[:1]
    assert result.sentence == (
        "The file has no teacher, or no random images are used, so only cached targets were timed."
    )


def test_seconds_are_a_number(tspipe: Callable[..., Result]) -> None:
    assert tspipe("bench", "--cache", "x.h5", "--seconds", "soon").code == 2


@pytest.mark.parametrize(("seconds", "turns", "slow", "fast"), [(1, 11, 1, 1), (110, 16, 1, 5), (4000, 101, 6, 26)])
def test_turns_are_short_and_of_one_length(
    seconds: int, turns: int, slow: int, fast: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, done = 0.0, []

    def way(length: float) -> Way:
        def do(count: int) -> None:
            nonlocal now
            now += count * length
            done.append((length, count))

        return do

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    times = Timer(torch.device("cpu"), seconds / 2).turns({"slow": way(3.25), "fast": way(0.75)})
    assert times == {"slow": [3.25] * turns, "fast": [0.75] * turns}
    assert set(done[4:]) == {(3.25, slow), (0.75, fast)}
    assert {length for length, _ in done[4::2]} == {3.25, 0.75}, "neither is always the first"


def test_a_pool_is_compared_with_the_live_teacher(pool: Cache) -> None:
    assert [line.what for line in bench.bench(config(pool), seconds=1).lines] == [
        *LINES[:2],
        "random images, pool / live",
        *LINES[2:],
    ]


def test_an_epoch_is_a_long_command_less_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def seconds(command: list[str]) -> float:
        commands.append(command)
        is_floor, epochs = (
            command[1] == "loop.py",
            int(command[command.index("--epochs") + 1 if "--out" in command else -1]),
        )
        return 5 + 2 * epochs if is_floor else 9 + 3 * epochs

    monkeypatch.setattr(wall_clock, "_seconds", seconds)
    floor, ours = wall_clock.epoch_seconds(Path("loop.py"), Path("x.h5"), "lenet5", 128, ["--set=lr=1"], 1e-9)
    assert (floor, ours) == ([2] * 3, [3] * 3)
    assert commands[0][1:] == ["loop.py", "x.h5", "lenet5", "128", "1"]
    assert "--set=lr=1" in commands[2]
    assert commands[2][commands[2].index("--random-images") + 1] == "0"


def test_a_loop_that_fails_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no pixels"):
        wall_clock._seconds([sys.executable, "-c", "raise SystemExit('no pixels')"])
