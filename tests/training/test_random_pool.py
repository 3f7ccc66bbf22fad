"""Training with the random pool: stage one's pixels drawn again, with its targets and without the teacher."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import Result
from shared import POOL_ROWS, interrupted_at, metrics_of, pool_config, pool_image, weights_of
from tspipe.cache import Cache
from tspipe.data.preprocess import Preprocess
from tspipe.data.random_images import Photos
from tspipe.errors import CacheMismatch, RecipeError
from tspipe.extraction.extract import extract
from tspipe.losses import Target
from tspipe.recipes import load
from tspipe.training import batches, learner
from tspipe.training.arms import RANDOM, TAUGHT
from tspipe.training.config import StudentConfig
from tspipe.training.live_teacher import LiveTeacher
from tspipe.training.random_pool import RandomPool
from tspipe.training.random_source import RandomSpec
from tspipe.training.run_folder import RunFolder
from tspipe.training.trainer import train_students

Tspipe = Callable[..., Result]
SMALL = ["epochs=2", "seeds=2", "batch_size=100", "random_images=7", "random_source=pool"]  # 10 batches an epoch


def stage_two(cache: Cache, out: Path, *overrides: str, arms: tuple[str, ...] = (TAUGHT, RANDOM)) -> StudentConfig:
    facts = {"preprocess": cache.manifest["preprocess"]}
    return StudentConfig(load.load("digits", [*SMALL, *overrides], facts=facts), cache, arms, out=out)


def batches_of(cache: Cache, count: int) -> RandomPool:
    preprocess = Preprocess.from_dict(cache.manifest["preprocess"])
    return RandomPool(
        cache, RandomSpec(count, (1, 16, 16), 3, preprocess, torch.device("cpu")), Photos(0, torch.zeros_like)
    )


@pytest.fixture(scope="module")
def run(pool: Cache, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train_students(stage_two(pool, tmp_path_factory.mktemp("runs") / "run"))


@given(seed=st.integers(0, 3), step=st.integers(0, 10**6), count=st.integers(1, POOL_ROWS))
def test_a_batch_has_consecutive_rows_and_wraps_around(pool: Cache, seed: int, step: int, count: int) -> None:
    entropy = np.random.SeedSequence([seed, zlib.crc32(b"random pool offset"), 0, 0])
    offset = int(np.random.MT19937(entropy).random_raw())
    rows = (offset % POOL_ROWS + step * count + np.arange(count)) % POOL_ROWS
    images, output, labels = batches_of(pool, count).batch(seed, step)
    assert labels.shape == (count, 0)
    assert pool.random is not None
    assert images.dtype == output.features.dtype == torch.float32
    np.testing.assert_array_equal(images, [pool_image(0, row, 16, (1, 16, 16)) for row in rows])
    np.testing.assert_array_equal(output.features, pool.random.features[rows])
    np.testing.assert_array_equal(output.logits, pool.random.logits[rows])


def test_drawing_ahead_does_not_change_the_batches(pool: Cache) -> None:
    preprocess = Preprocess.from_dict(pool.manifest["preprocess"])
    batches, numbers = batches_of(pool, 7), [3, 4, 5, 9]
    for number, result in zip(numbers, batches.batches(1, 2, numbers), strict=True):
        images, output, _ = batches_of(pool, 7).batch(1, 2 * 3 + number)
        assert result[0].equal(preprocess.normalise(images))
        assert result[1].features.equal(output.features)
        assert result[1].logits.equal(output.logits)
    assert list(batches.batches(1, 0, [])) == []


def test_an_epoch_continues_where_the_previous_one_ended(
    pool: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch has 10 batches of 100 images, or 8 of 128 of which the last has 104."""
    for size, per_epoch in ((100, 10), (128, 8)):
        learnt: list[Target] = []
        step = learner.Learner.step

        def noted(self: Any, batch: batches.Batch, number: int, learnt: Any = learnt, step: Any = step) -> None:
            assert batch.random is not None
            learnt.append(batch.random[1])
            step(self, batch, number)

        monkeypatch.setattr(learner.Learner, "step", noted)
        train_students(stage_two(pool, tmp_path / str(size), f"batch_size={size}", "seeds=1", arms=(RANDOM,)))
        monkeypatch.setattr(learner.Learner, "step", step)
        expected = [batches_of(pool, 7).batch(0, step)[1] for step in range(2 * per_epoch)]
        assert len(learnt) == len(expected)
        for result, output in zip(learnt, expected, strict=True):
            assert result.features.equal(output.features)
            assert result.labels.equal(output.logits.argmax(1))


def test_training_with_the_pool_needs_no_teacher(run: RunFolder, pool: Cache, tmp_path: Path) -> None:
    bare = replace(pool, _weights=None)
    assert weights_of(train_students(stage_two(bare, tmp_path / "bare"))) == weights_of(run)


def test_label_counts_come_from_the_pool(run: RunFolder, pool: Cache) -> None:
    assert pool.random is not None
    counts = np.bincount(pool.random.logits.load().argmax(1), minlength=10)
    assert run.read_json("random_labels.json") == {str(i): int(n) for i, n in enumerate(counts) if n}


def test_an_interrupted_run_ends_with_the_same_students(
    run: RunFolder, pool: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two learners take 20 steps per epoch; interrupted within an epoch, at its end, and in the second seed."""
    run_config = stage_two(pool, tmp_path / "killed", "checkpoint_seconds=0")
    taken = interrupted_at(monkeypatch, 8, 21, 40, 64)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            train_students(run_config)
    result = train_students(run_config)
    assert len(taken) > 80
    assert weights_of(result) == weights_of(run)
    assert metrics_of(result) == metrics_of(run)


def test_the_pool_and_a_live_teacher_on_its_images_agree(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = extract(pool_config(teacher, tmp_path / "digits.h5", "features.dtype=float32"))
    settings = ["epochs=1", "seeds=1"]

    def trained(source: str, name: str) -> dict[str, torch.Tensor]:
        config = stage_two(cache, tmp_path / name, *settings, f"random_source={source}", arms=(RANDOM,))
        path = train_students(config).path / "student-lenet5-taught-random-seed0.safetensors"
        return safetensors.torch.load_file(path)

    pooled, other = trained("pool", "pool"), trained("live", "other")
    batches = batches_of(cache, 7)

    def draw(self: LiveTeacher, seed: int, epoch: int, number: int) -> tuple[Any, Any]:
        images, _, labels = batches.batch(seed, number)
        return (images, labels), iter([])

    monkeypatch.setattr(LiveTeacher, "_draw", draw)
    live = trained("live", "live")
    for name, value in pooled.items():
        torch.testing.assert_close(live[name], value, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(other["head.weight"], pooled["head.weight"], rtol=1e-4, atol=1e-6)


def test_a_run_with_the_pool_is_another_run(run: RunFolder, pool: Cache, tmp_path: Path) -> None:
    assert run.config["random_source"] == "pool"
    live = train_students(stage_two(pool, tmp_path / "live", "random_source=live", "epochs=1", "seeds=1"))
    assert live.config["random_source"] == "live"
    with pytest.raises(RecipeError) as refused:
        train_students(stage_two(pool, run.path, "random_source=live"))
    assert str(refused.value) == (
        f"{run.path} is the folder of another run: random_source is 'pool', not 'live'. Choose another --out."
    )


LIVE = "have the teacher label random images live: --set random_source=live"


def test_a_cache_without_a_pool_is_refused(digits: Cache, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatch) as refused:
        train_students(stage_two(digits, tmp_path / "x"))
    assert str(refused.value) == (
        "digits.h5 has no random pool. Make the cache again with one (tspipe cache --force --random-pool 10000), or "
        + LIVE
    )
    assert not (tmp_path / "x").exists()


def test_a_pool_smaller_than_a_batch_is_refused(pool: Cache, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatch) as refused:
        train_students(stage_two(pool, tmp_path / "x", "random_images=41"))
    assert str(refused.value) == (
        "digits.h5 has a random pool of 40 images, fewer than the 41 of a batch. Use fewer (--random-images 40), make "
        "the cache again with more (tspipe cache --force --random-pool 41), or " + LIVE
    )
    train_students(stage_two(pool, tmp_path / "all", "random_images=40", "epochs=1", "seeds=1"))


def test_an_unknown_generator_is_refused(pool: Cache, tmp_path: Path) -> None:
    random = {**pool.manifest["random"], "generator": "xoshiro"}
    with pytest.raises(CacheMismatch) as refused:
        train_students(stage_two(replace(pool, manifest={**pool.manifest, "random": random}), tmp_path / "x"))
    assert str(refused.value) == (
        "The cache's random pool has the generator 'xoshiro', and this tspipe knows mt19937 and minstd only. Install a "
        "newer tspipe, or " + LIVE
    )


def test_a_pool_of_images_of_another_shape_is_refused(pool: Cache, tmp_path: Path) -> None:
    printed = {**pool.manifest["teacher"], "options": {"input_shape": [2**16, 2**16, 2**16]}}
    with pytest.raises(CacheMismatch) as refused:
        train_students(stage_two(replace(pool, manifest={**pool.manifest, "teacher": printed}), tmp_path / "x"))
    assert str(refused.value) == (
        "digits.h5: its teacher takes images of [65536, 65536, 65536], its dataset has images of [1, 16, 16]."
    )


def test_the_pool_on_the_command_line(tspipe: Tspipe, pool: Cache) -> None:
    settings = [f"--set={setting}" for setting in [*SMALL, "seeds=1"]]
    made = tspipe("student", "--cache", pool.path, "--compare", *settings)
    assert (made.code, made.error) == (0, "")
    assert "taught + random" in made.out
    assert "The teacher's labels for random images: " in made.out
    bad = tspipe("student", "--cache", pool.path, "--set=random_source=file")
    assert bad.error == "The recipe digits: random_source cannot be \"file\": input should be 'live' or 'pool'."
