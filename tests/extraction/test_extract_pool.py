"""Stage one labels a pool of random images, whose pixels anyone can draw again; the commands on caches know of it."""

import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import Result
from shared import POOL_ROWS, TEACHER, pool_config, pool_image, spoil
from tspipe.cache import Cache
from tspipe.data.preprocess import Preprocess
from tspipe.data.random_images import make
from tspipe.data.random_images import pool as pools
from tspipe.data.random_images.pool import PoolImages
from tspipe.errors import CacheError, CacheMismatch
from tspipe.extraction import forward
from tspipe.extraction.extract import extract
from tspipe.models import weights
from tspipe.models.teacher import load_teacher, run_teacher
from tspipe.recipes import load

Tspipe = Callable[..., Result]


def uniform_pool(seed: int, rows: int, block_rows: int, shape: tuple[int, int, int]) -> PoolImages:
    random = {"generator": "mt19937", "rows": rows, "seed": seed}
    return PoolImages(make("uniform", shape), random, block_rows)


def test_another_mersenne_twister_draws_the_same_words() -> None:
    """That of Python's own `random`, begun in the state that cache/README.md describes."""
    state = np.random.SeedSequence([7, 3_043_801_329, 0, 2]).generate_state(624, np.uint32)
    twister = random.Random()
    twister.setstate((3, (2**31, *state[1:].tolist(), 623), None))
    words = np.array([twister.getrandbits(32) for _ in range(2 * 1200)], np.uint32)
    expected = ((words >> 8).astype(np.float32) / np.float32(2**24)).reshape(2, 3, 20, 20)
    np.testing.assert_array_equal(uniform_pool(7, 100, 10, (3, 20, 20)).take(20, 2), expected)


@given(
    rows=st.integers(1, 30),
    block_rows=st.integers(1, 12),
    ranges=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=5),
)
def test_any_range_of_rows_is_what_the_format_says(rows: int, block_rows: int, ranges: list[tuple[int, int]]) -> None:
    """Whatever was drawn before: from where a generator is, back, across blocks, and around the end."""
    shape = (2, 3, 1)
    expected = np.stack([pool_image(5, row, block_rows, shape) for row in range(rows)])
    images = uniform_pool(5, rows, block_rows, shape)
    for start, count in ranges:
        result = images.take(start, count)
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, expected[(start + np.arange(count)) % rows])


def test_consecutive_ranges_draw_no_image_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    stream = pools.stream
    monkeypatch.setattr(pools, "stream", lambda *a: begun.append(a[-1]) or stream(*a))
    images = uniform_pool(0, 20, 8, (1, 2, 2))
    for start in range(0, 20, 3):
        images.take(start, 3)
    assert begun == [0, 1, 2, 0]  # the last range goes around the end


def test_stage_one_says_what_the_pool_is(pool: Cache) -> None:
    assert pool.manifest["random"] == {"generator": "mt19937", "rows": POOL_ROWS, "seed": 0}
    assert pool.random is not None
    assert len(pool.random) == POOL_ROWS
    assert (pool.random.features.shape, pool.random.features.dtype) == ((POOL_ROWS, 84), np.dtype("<f2"))
    assert (pool.random.logits.shape, pool.random.logits.dtype) == ((POOL_ROWS, 10), np.dtype("<f4"))
    assert pool.random.checksums.shape == (3, 2, 32)


def test_a_cache_without_a_pool_has_none(digits: Cache) -> None:
    assert digits.random is None
    assert digits.manifest["random"] is None


def test_the_rows_are_what_the_teacher_gives_for_the_pixels_drawn_again(pool: Cache) -> None:
    preprocess = Preprocess.from_dict(pool.manifest["preprocess"])
    teacher = load_teacher(pool, load.load("digits"), (1, 16, 16), torch.device("cpu"))
    pixels = np.stack([pool_image(0, row, 16, (1, 16, 16)) for row in range(POOL_ROWS)])
    np.testing.assert_array_equal(uniform_pool(0, POOL_ROWS, 16, (1, 16, 16)).take(0, POOL_ROWS), pixels)
    features, logits = run_teacher(teacher, preprocess.normalise(torch.from_numpy(pixels)))
    assert pool.random is not None
    stored = torch.from_numpy(pool.random.features.load()).float()
    assert (stored - features).abs().max() < 2**-11 * features.abs().max()  # float16 keeps 11 bits
    assert stored.std(0).max() > 0.01  # the images differ, so one in another's place would be noticed
    torch.testing.assert_close(torch.from_numpy(pool.random.logits.load()), logits, rtol=1e-4, atol=1e-4)


def test_the_pool_leaves_all_other_rows_as_they_are(pool: Cache, teacher: Path, tmp_path: Path) -> None:
    bare = extract(pool_config(teacher, tmp_path / "bare.h5", rows=0))
    for split in ("train", "test"):
        assert bare.split(split).checksums.load().tobytes() == pool.split(split).checksums.load().tobytes()
    assert bare.id != pool.id


@pytest.mark.parametrize("stops", [[("train", 0)], [("random", 0)], [("test", 3), ("random", 1), ("random", 2)]])
def test_killed_and_resumed_it_ends_with_the_same_bytes(
    pool: Cache, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: list[tuple[str, int]]
) -> None:
    requested, done = pool_config(teacher, tmp_path / "digits.h5"), []
    taught = forward.run_teacher_on_blocks
    for stop in [*stops, None]:

        def stopping(*arguments: Any, stop: Any = stop) -> Any:
            if arguments[-2:] == stop:
                raise KeyboardInterrupt
            done.append(arguments[-2:])
            return taught(*arguments)

        monkeypatch.setattr(forward, "run_teacher_on_blocks", stopping)
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            extract(requested)
    sizes = pool.dimensions
    assert done == [(section, block) for section in sizes.sections for block in range(sizes.blocks(section))]
    assert requested.out.read_bytes() == pool.path.read_bytes()


def test_with_and_without_a_pool_are_two_caches(pool: Cache, digits: Cache, teacher: Path) -> None:
    with pytest.raises(CacheMismatch) as refused:
        extract(pool_config(teacher, digits.path, "compute.block_rows=256"))
    assert str(refused.value) == (
        f"{digits.path} is another cache: random is absent, not (generator mt19937, rows 40, seed 0). Move "
        "it away, replace it (tspipe cache --force) or write another (--out)."
    )
    with pytest.raises(CacheMismatch) as refused:
        extract(pool_config(teacher, pool.path, rows=41))
    assert str(refused.value) == (
        f"{pool.path} is another cache: random.rows is 40, not 41. Move it away, replace it (tspipe "
        "cache --force) or write another (--out)."
    )


def test_a_feature_beyond_float16_names_the_random_image(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = forward.run_teacher_on_blocks

    def loud(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        features, logits = taught(*arguments)
        if arguments[-2:] == ("random", 1):
            features[1] = 1e6
        return features, logits

    monkeypatch.setattr(forward, "run_teacher_on_blocks", loud)
    with pytest.raises(CacheError) as refused:
        extract(pool_config(teacher, tmp_path / "x.h5"))
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


def test_what_the_pool_has_is_asked_of_the_teacher_again(
    tspipe: Tspipe, pool: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows, those of the pool among them: float16 rounds, and nothing else differs."""
    images = 1797 + POOL_ROWS
    result = tspipe("verify", pool.path, "--teacher", images)
    assert (result.code, result.error) == (0, "")
    assert result.out.endswith(f"Changed argmax: 0 of {images:,}\n")
    taught = forward.run_teacher_on_blocks
    monkeypatch.setattr(
        forward, "run_teacher_on_blocks", lambda *a: [part + 100 * (a[-2] == "random") for part in taught(*a)]
    )
    result = tspipe("verify", pool.path, "--teacher", images)
    assert result.error.startswith(
        f"The teacher gives other features or logits than the file holds for {POOL_ROWS} of {images:,} images, "
    )


DAMAGE = [
    [("random_logits", 39)],
    [("random_checksums", 1)],
    [("random_features", 0), ("random_features", 20), ("random_logits", 0), ("train_labels", 3), ("test_features", 3)],
]


@pytest.mark.parametrize("places", DAMAGE)
def test_repair_draws_the_images_again(
    tspipe: Tspipe, pool: Cache, tmp_path: Path, places: list[tuple[str, int]]
) -> None:
    path = Path(shutil.copy(pool.path, tmp_path / "copy.h5"))
    spoil(path, *places)
    assert tspipe("verify", path).code == 1
    result = tspipe("verify", "--repair", path)
    assert (result.code, result.error) == (0, "")
    assert path.read_bytes() == pool.path.read_bytes()


def test_repair_where_the_teacher_says_something_else_writes_nothing(
    tspipe: Tspipe, pool: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(pool.path, tmp_path / "copy.h5"))
    spoil(path, ("random_features", 20))
    damaged, taught = path.read_bytes(), forward.run_teacher_on_blocks
    monkeypatch.setattr(forward, "run_teacher_on_blocks", lambda *a: [part * 1.01 for part in taught(*a)])
    result = tspipe("verify", "--repair", path)
    assert result.says(
        f"{path}: random images 16 to 31 give other features here than were written, so these are left as they are. "
        "This processor or PyTorch rounds differently. Get the file again."
    )
    assert path.read_bytes() == damaged


def test_diff_says_how_pools_differ(tspipe: Tspipe, pool: Cache, teacher: Path, tmp_path: Path) -> None:
    tensors = weights.read(teacher).tensors
    tensors["classifier.4.bias"] = tensors["classifier.4.bias"] + 0.5
    weights.save(tmp_path / "other.safetensors", tensors, {})
    other = extract(pool_config(tmp_path / "other.safetensors", tmp_path / "other.h5"))
    lines = tspipe("diff", pool.path, other.path).out.splitlines()
    assert "random: logits of 40 unchanged images differ by up to 0.5, 0 in their argmax" in lines
    small = extract(pool_config(teacher, tmp_path / "small.h5", rows=39))
    result = tspipe("diff", pool.path, small.path)
    assert [line.split() for line in result.out.splitlines()][2:] == [["random.rows", "40", "39"]]
    none = extract(pool_config(teacher, tmp_path / "none.h5", rows=0))
    assert "random  generator mt19937, rows 40, seed 0  none " in tspipe("diff", pool.path, none.path).out


def test_info_says_it_of_a_url_too(tspipe: Tspipe, pool: Cache) -> None:
    for where in (pool.path, f"file://{pool.path}"):
        assert "random pool  40 images, mt19937, seed 0 " in tspipe("info", where).out
