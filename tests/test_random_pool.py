"""The random pool: stage one labels random images, stage two draws the same pixels again and needs no teacher."""

import random
import zlib
from collections.abc import Callable
from contextlib import nullcontext
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
from shared import TEACHER
from tspipe import learner, random_images, rows, weights
from tspipe import recipe as recipes
from tspipe.cache import Cache
from tspipe.errors import CacheError, CacheMismatch, RecipeError
from tspipe.extract import ExtractConfig, extract
from tspipe.learner import RANDOM, TAUGHT
from tspipe.losses import Target
from tspipe.preprocess import Preprocess
from tspipe.random_images import PoolImages
from tspipe.random_pool import RandomPool
from tspipe.run_folder import RunFolder
from tspipe.teaching import load_teacher, run_teacher
from tspipe.train_students import StudentConfig, train_students

Tspipe = Callable[..., Result]
ROWS = 40  # in blocks of 16, 16 and 8


def stage_one(teacher: Path, out: Path, *overrides: str, rows: int = ROWS) -> ExtractConfig:
    settings = [*TEACHER, "compute.block_rows=16", *overrides]
    return ExtractConfig(recipes.load("digits", settings), weights.read(teacher), out, random_pool=rows)


@pytest.fixture(scope="module")
def pool(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return extract(stage_one(teacher, tmp_path_factory.mktemp("pool") / "digits.h5"))


def by_hand(seed: int, row: int, block_rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Image `row` of a pool from the words of the Mersenne Twister, as cache/README.md says."""
    block, before = divmod(row, block_rows)
    twister = np.random.MT19937(np.random.SeedSequence([seed, zlib.crc32(b"random pool"), 0, block]))
    size = int(np.prod(shape))
    words = twister.random_raw((before + 1) * size)[before * size :]
    return ((words >> 8).astype(np.float32) / np.float32(2**24)).reshape(shape)


def test_another_mersenne_twister_draws_the_same_words() -> None:
    """That of Python's own `random`, begun in the state that cache/README.md describes."""
    state = np.random.SeedSequence([7, 3_043_801_329, 0, 2]).generate_state(624, np.uint32)
    twister = random.Random()
    twister.setstate((3, (2**31, *state[1:].tolist(), 623), None))
    words = np.array([twister.getrandbits(32) for _ in range(2 * 1200)], np.uint32)
    expected = ((words >> 8).astype(np.float32) / np.float32(2**24)).reshape(2, 3, 20, 20)
    np.testing.assert_array_equal(PoolImages(7, 100, 10, (3, 20, 20)).take(20, 2), expected)


@given(
    rows=st.integers(1, 30),
    block_rows=st.integers(1, 12),
    ranges=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 40)), min_size=1, max_size=5),
)
def test_any_range_of_rows_is_what_the_format_says(rows: int, block_rows: int, ranges: list[tuple[int, int]]) -> None:
    """Whatever was drawn before: from where a generator is, back, across blocks, and around the end."""
    shape = (2, 3, 1)
    expected = np.stack([by_hand(5, row, block_rows, shape) for row in range(rows)])
    images = PoolImages(5, rows, block_rows, shape)
    for start, count in ranges:
        found = images.take(start, count)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[(start + np.arange(count)) % rows])


def test_consecutive_ranges_draw_no_image_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    stream = random_images.stream
    monkeypatch.setattr(random_images, "stream", lambda *a: begun.append(a[-1]) or stream(*a))
    images = PoolImages(0, 20, 8, (1, 2, 2))
    for start in range(0, 20, 3):
        images.take(start, 3)
    assert begun == [0, 1, 2, 0]  # the last range goes around the end


def test_stage_one_says_what_the_pool_is(pool: Cache) -> None:
    assert pool.manifest["random"] == {"generator": "mt19937", "rows": ROWS, "seed": 0}
    assert pool.random is not None
    assert len(pool.random) == ROWS
    assert (pool.random.features.shape, pool.random.features.dtype) == ((ROWS, 84), np.dtype("<f2"))
    assert (pool.random.logits.shape, pool.random.logits.dtype) == ((ROWS, 10), np.dtype("<f4"))
    assert pool.random.checksums.shape == (3, 2, 32)


def test_a_cache_without_a_pool_has_none(digits: Cache) -> None:
    assert digits.random is None
    assert digits.manifest["random"] is None


def test_the_rows_are_what_the_teacher_gives_for_the_pixels_drawn_again(pool: Cache) -> None:
    preprocess = Preprocess.from_dict(pool.manifest["preprocess"])
    teacher = load_teacher(pool, recipes.load("digits"), (1, 16, 16), torch.device("cpu"))
    pixels = np.stack([by_hand(0, row, 16, (1, 16, 16)) for row in range(ROWS)])
    np.testing.assert_array_equal(PoolImages.of(pool.manifest).take(0, ROWS), pixels)
    features, logits = run_teacher(teacher, preprocess.normalise(torch.from_numpy(pixels)))
    assert pool.random is not None
    stored = torch.from_numpy(pool.random.features.load()).float()
    assert (stored - features).abs().max() < 2**-11 * features.abs().max()  # float16 keeps 11 bits
    assert stored.std(0).max() > 0.01  # the images differ, so one in another's place would be noticed
    torch.testing.assert_close(torch.from_numpy(pool.random.logits.load()), logits, rtol=1e-4, atol=1e-4)


def test_the_pool_leaves_all_other_rows_as_they_are(pool: Cache, teacher: Path, tmp_path: Path) -> None:
    bare = extract(stage_one(teacher, tmp_path / "bare.h5", rows=0))
    for split in ("train", "test"):
        assert bare.split(split).checksums.load().tobytes() == pool.split(split).checksums.load().tobytes()
    assert bare.id != pool.id


@pytest.mark.parametrize("stops", [[("train", 0)], [("random", 0)], [("test", 3), ("random", 1), ("random", 2)]])
def test_killed_and_resumed_it_ends_with_the_same_bytes(
    pool: Cache, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: list[tuple[str, int]]
) -> None:
    wanted, done = stage_one(teacher, tmp_path / "digits.h5"), []
    taught = rows.taught
    for stop in [*stops, None]:

        def stopping(*arguments: Any, stop: Any = stop) -> Any:
            if arguments[-2:] == stop:
                raise KeyboardInterrupt
            done.append(arguments[-2:])
            return taught(*arguments)

        monkeypatch.setattr(rows, "taught", stopping)
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            extract(wanted)
    sizes = pool.dimensions
    assert done == [(section, block) for section in sizes.sections for block in range(sizes.blocks(section))]
    assert wanted.out.read_bytes() == pool.path.read_bytes()


def test_with_and_without_a_pool_are_two_caches(pool: Cache, digits: Cache, teacher: Path) -> None:
    with pytest.raises(CacheMismatch) as refused:
        extract(stage_one(teacher, digits.path, "compute.block_rows=256"))
    assert str(refused.value) == (
        f"{digits.path} is another cache: random is None there and generator mt19937, rows 40, seed 0 here. Replace "
        "it with --force, or choose --out."
    )
    with pytest.raises(CacheMismatch) as refused:
        extract(stage_one(teacher, pool.path, rows=41))
    assert str(refused.value) == (
        f"{pool.path} is another cache: random.rows is 40 there and 41 here. Replace it with --force, or choose --out."
    )


def test_a_feature_beyond_float16_names_the_random_image(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = rows.taught

    def loud(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        features, logits = taught(*arguments)
        if arguments[-2:] == ("random", 1):
            features[1] = 1e6
        return features, logits

    monkeypatch.setattr(rows, "taught", loud)
    with pytest.raises(CacheError) as refused:
        extract(stage_one(teacher, tmp_path / "x.h5"))
    assert str(refused.value) == (
        "The teacher's features of 'random image 17' reach beyond 65,504, the largest float16. "
        "Store them as float32: --set features.dtype=float32"
    )


def test_on_the_command_line(tspipe: Tspipe, teacher: Path) -> None:
    settings = [f"--set={setting}" for setting in TEACHER]
    made = tspipe("cache", "--dataset", "digits", "--weights", teacher, "--random-pool", 10_000, *settings)
    assert made.code == 0
    assert "random pool  10,000 images, mt19937, seed 0 " in made.out
    assert made.out.endswith("Next: tspipe student --cache cache/digits-lenet5.h5 --set random_source=pool\n")
    assert tspipe("cache", "--dataset", "digits", "--random-pool", 0).code == 2


def test_info_of_a_cache_without_a_pool_says_nothing_of_it(tspipe: Tspipe, digits: Cache) -> None:
    assert "random" not in tspipe("info", digits.path).out


SMALL = ["epochs=2", "seeds=2", "batch_size=100", "random_images=7", "random_source=pool"]  # 10 batches an epoch


def stage_two(cache: Cache, out: Path, *overrides: str, arms: tuple[str, ...] = (TAUGHT, RANDOM)) -> StudentConfig:
    facts = {"preprocess": cache.manifest["preprocess"]}
    return StudentConfig(recipes.load("digits", [*SMALL, *overrides], facts=facts), cache, arms, out=out)


def students(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.path.glob("student-*.safetensors"))}


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in run.rows()]


def batches_of(cache: Cache, count: int) -> RandomPool:
    preprocess = Preprocess.from_dict(cache.manifest["preprocess"])
    return RandomPool(cache, preprocess, count, (1, 16, 16), torch.device("cpu"))


@pytest.fixture(scope="module")
def run(pool: Cache, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train_students(stage_two(pool, tmp_path_factory.mktemp("runs") / "run"))


@given(seed=st.integers(0, 3), step=st.integers(0, 10**6), count=st.integers(1, ROWS))
def test_a_batch_is_rows_that_follow_one_another_around_the_pool(pool: Cache, seed: int, step: int, count: int) -> None:
    entropy = np.random.SeedSequence([seed, zlib.crc32(b"random pool offset"), 0, 0])
    offset = int(np.random.MT19937(entropy).random_raw())
    rows = (offset % ROWS + step * count + np.arange(count)) % ROWS
    images, said = batches_of(pool, count).batch(seed, step)
    assert pool.random is not None
    assert images.dtype == said.features.dtype == torch.float32
    np.testing.assert_array_equal(images, [by_hand(0, row, 16, (1, 16, 16)) for row in rows])
    np.testing.assert_array_equal(said.features, pool.random.features[rows])
    np.testing.assert_array_equal(said.logits, pool.random.logits[rows])


def test_ahead_of_the_students_it_gives_what_it_gives_in_turn(pool: Cache) -> None:
    preprocess = Preprocess.from_dict(pool.manifest["preprocess"])
    batches, steps = batches_of(pool, 7), [3, 4, 5, 9]
    for step, found in zip(steps, batches.batches(1, steps), strict=True):
        images, said = batches_of(pool, 7).batch(1, step)
        assert found[0].equal(preprocess.normalise(images))
        assert found[1].features.equal(said.features)
        assert found[1].logits.equal(said.logits)
    assert list(batches.batches(1, [])) == []


def test_an_epoch_goes_on_in_the_pool_where_the_one_before_ended(
    pool: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 batches of 100 images an epoch, and of 128 images 8, the last of them of 104."""
    for size, per_epoch in ((100, 10), (128, 8)):
        learnt: list[Target] = []
        step = learner.Learner.step

        def noted(self: Any, batch: learner.Batch, number: int, learnt: Any = learnt, step: Any = step) -> None:
            assert batch.random is not None
            learnt.append(batch.random[1])
            step(self, batch, number)

        monkeypatch.setattr(learner.Learner, "step", noted)
        train_students(stage_two(pool, tmp_path / str(size), f"batch_size={size}", "seeds=1", arms=(RANDOM,)))
        monkeypatch.setattr(learner.Learner, "step", step)
        expected = [batches_of(pool, 7).batch(0, step)[1] for step in range(2 * per_epoch)]
        assert len(learnt) == len(expected)
        for found, said in zip(learnt, expected, strict=True):
            assert found.features.equal(said.features)
            assert found.labels.equal(said.logits.argmax(1))


def test_students_of_the_pool_need_no_teacher(run: RunFolder, pool: Cache, tmp_path: Path) -> None:
    bare = replace(pool, _weights=None)
    assert students(train_students(stage_two(bare, tmp_path / "bare"))) == students(run)


def test_the_labels_are_counted_from_the_pool(run: RunFolder, pool: Cache) -> None:
    assert pool.random is not None
    counts = np.bincount(pool.random.logits.load().argmax(1), minlength=10)
    assert run.read_json("random_labels.json") == {str(i): int(n) for i, n in enumerate(counts) if n}


def test_killed_and_resumed_a_run_ends_with_the_same_students(
    run: RunFolder, pool: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two learners take 20 steps an epoch of a seed; killed within an epoch, at its end, and in the second seed."""
    wanted = stage_two(pool, tmp_path / "killed", "checkpoint_seconds=0")
    step, taken = learner.Learner.step, 0

    def stopping(self: Any, batch: learner.Batch, number: int) -> None:
        nonlocal taken
        taken += 1
        if taken in (8, 21, 40, 64):
            raise KeyboardInterrupt
        step(self, batch, number)

    monkeypatch.setattr(learner.Learner, "step", stopping)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            train_students(wanted)
    found = train_students(wanted)
    assert taken > 80
    assert students(found) == students(run)
    assert metrics(found) == metrics(run)


def test_the_pools_images_given_live_teach_the_same(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = extract(stage_one(teacher, tmp_path / "digits.h5", "features.dtype=float32"))
    settings = ["epochs=1", "seeds=1"]

    def trained(source: str, name: str) -> dict[str, torch.Tensor]:
        config = stage_two(cache, tmp_path / name, *settings, f"random_source={source}", arms=(RANDOM,))
        path = train_students(config).path / "student-lenet5-taught-random-seed0.safetensors"
        return safetensors.torch.load_file(path)

    pooled, other = trained("pool", "pool"), trained("live", "other")
    batches = batches_of(cache, 7)
    monkeypatch.setattr(random_images, "uniform", lambda seed, epoch, batch, *rest: batches.batch(seed, batch)[0])
    live = trained("live", "live")
    for name, value in pooled.items():
        torch.testing.assert_close(live[name], value, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(other["head.weight"], pooled["head.weight"], rtol=1e-4, atol=1e-6)


def test_a_run_is_another_with_the_pool_and_keeps_its_name_without(run: RunFolder, pool: Cache, tmp_path: Path) -> None:
    assert run.config["random_source"] == "pool"
    live = train_students(stage_two(pool, tmp_path / "live", "random_source=live", "epochs=1", "seeds=1"))
    assert "random_source" not in live.config
    taught = train_students(stage_two(pool, tmp_path / "taught", "epochs=1", "seeds=1", arms=(TAUGHT,)))
    assert "random_source" not in taught.config
    with pytest.raises(RecipeError) as refused:
        train_students(stage_two(pool, run.path, "random_source=live"))
    assert str(refused.value) == (
        f"{run.path} is the folder of another run: random_source is 'pool' there and None here. Choose another --out."
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
        "digits.h5 has a random pool of 40 images, fewer than the 41 of a batch. Take fewer (--random-images 40), make "
        "the cache again with more (tspipe cache --force --random-pool 41), or " + LIVE
    )
    train_students(stage_two(pool, tmp_path / "all", "random_images=40", "epochs=1", "seeds=1"))


def test_an_unknown_generator_is_refused(pool: Cache, tmp_path: Path) -> None:
    random = {**pool.manifest["random"], "generator": "minstd"}
    with pytest.raises(CacheMismatch) as refused:
        train_students(stage_two(replace(pool, manifest={**pool.manifest, "random": random}), tmp_path / "x"))
    assert str(refused.value) == (
        "The cache's random pool was drawn by 'minstd', and this tspipe knows 'mt19937' only. Take a newer tspipe, or "
        + LIVE
    )


def test_a_pool_of_images_of_another_shape_is_refused(pool: Cache, tmp_path: Path) -> None:
    told = {**pool.manifest["teacher"], "options": {"input_shape": [2**16, 2**16, 2**16]}}
    with pytest.raises(CacheMismatch) as refused:
        train_students(stage_two(replace(pool, manifest={**pool.manifest, "teacher": told}), tmp_path / "x"))
    assert str(refused.value) == (
        "digits.h5: its teacher takes images of [65536, 65536, 65536], its dataset's are of [1, 16, 16]."
    )


def test_students_of_the_pool_on_the_command_line(tspipe: Tspipe, pool: Cache) -> None:
    settings = [f"--set={setting}" for setting in [*SMALL, "seeds=1"]]
    made = tspipe("student", "--cache", pool.path, "--compare", *settings)
    assert (made.code, made.error) == (0, "")
    assert "taught + random" in made.out
    assert "The teacher calls the random images: " in made.out
    bad = tspipe("student", "--cache", pool.path, "--set=random_source=file")
    assert bad.error == "The recipe digits: random_source cannot be \"file\": input should be 'live' or 'pool'."
