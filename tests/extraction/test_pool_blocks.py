"""Stage one labels pools of every kind, which stage two and cache/README.md's example draw again."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Result
from shared import POOL_ROWS, pool_config, spoil
from tspipe.cache import Cache
from tspipe.cache.manifest import decode_manifest, encode_manifest
from tspipe.data.datasets import open_dataset
from tspipe.data.preprocess import Preprocess
from tspipe.data.random_images import KINDS
from tspipe.data.random_images.score import score
from tspipe.errors import CacheMismatch, NotACache
from tspipe.extraction import forward, score_kinds
from tspipe.extraction.extract import extract
from tspipe.models.teacher import load_teacher, run_teacher
from tspipe.recipes import load
from tspipe.training.arms import RANDOM
from tspipe.training.config import StudentConfig
from tspipe.training.trainer import train_students

Tspipe = Callable[..., Result]
ROOT = Path(__file__).parents[2]
BALANCED = ["random_kind=mixed", "random_balanced=true"]
SMALL = ["epochs=1", "batch_size=250", "random_images=7", "random_source=pool"]


@pytest.fixture(scope="module")
def balanced(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return extract(pool_config(teacher, tmp_path_factory.mktemp("balanced") / "digits.h5", *BALANCED))


def test_the_example_of_the_specification_draws_a_mixture(teacher: Path, tmp_path: Path) -> None:
    cache = extract(pool_config(teacher, tmp_path / "digits.h5", "random_kind=mixed", "views.flip=true"))
    assert cache.manifest["random"] == {
        "generator": "mt19937",
        "rows": POOL_ROWS,
        "seed": 0,
        "kind": "mixed",
        "shift": 2,
        "flip": True,
    }
    preprocess = Preprocess.from_dict(cache.manifest["preprocess"])
    train = open_dataset("digits").train
    photos = np.stack([preprocess.apply(train.read(i)) for i in range(len(train))])
    text = (ROOT / "cache" / "README.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def view" in code]
    example = re.sub("^photos = .*$", "", example, flags=re.MULTILINE)
    images = []
    for i in range(POOL_ROWS):
        names: dict[str, Any] = {"photos": photos}
        exec(example.replace("0, 2, False, 256, 5", f"0, 2, True, 16, {i}"), names)
        images.append(names["image"].astype(np.uint8))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    network = load_teacher(cache, load.load("digits"), (1, 16, 16), torch.device("cpu"))
    logits = run_teacher(network, preprocess.normalise(pixels)).logits
    assert cache.random is not None
    torch.testing.assert_close(torch.from_numpy(cache.random.logits.load()), logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(CacheMismatch, match=r"made with random_kind = mixed, not uniform\. Leave the setting out"):
        train_students(StudentConfig(load.load("digits", SMALL), cache, (RANDOM,), out=tmp_path / "run"))


def test_a_balanced_pool_has_even_labels_and_costs_passes(
    balanced: Cache,
    pool: Cache,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert balanced.random is not None
    assert pool.random is not None
    even, uneven = (np.bincount(p.logits.load().argmax(1), minlength=10) for p in (balanced.random, pool.random))
    assert even.max() <= 3 * 2  # at most 2 of a class in each block of 16, of 16 and of 8
    assert uneven.max() > 10
    assert balanced.random.candidates is not None
    assert balanced.random.candidates.load().max() < 8 * 16
    passes = []
    original = forward.run_teacher_on_blocks
    monkeypatch.setattr(forward, "run_teacher_on_blocks", lambda *a: passes.append(a[-2:]) or original(*a))
    again = extract(pool_config(teacher, tmp_path / "digits.h5", *BALANCED))
    assert again.path.read_bytes() == balanced.path.read_bytes()
    printed = capsys.readouterr().err
    rows = 16 * sum(name == "random candidates" and block < 2 for name, block in passes)
    rows += 8 * passes.count(("random candidates", 2))
    assert (
        f"random images before balancing, {rows / POOL_ROWS + 1:.1f} passes of the teacher for each that is" in printed
    )
    assert "The teacher's labels for the balanced images: " in printed
    assert passes.count(("random", 0)) == 1
    assert 1 < passes.count(("random candidates", 0)) <= 8


@pytest.mark.parametrize("places", [[("random_candidates", 20)], [("random_logits", 0), ("random_features", 39)]])
def test_a_balanced_pool_is_verified_and_repaired(
    tspipe: Tspipe, balanced: Cache, tmp_path: Path, places: list[tuple[str, int]]
) -> None:
    path = Path(shutil.copy(balanced.path, tmp_path / "copy.h5"))
    spoil(path, *places)
    assert tspipe("verify", path).code == 1
    result = tspipe("verify", "--repair", path, "--teacher", 1797 + POOL_ROWS)
    assert (result.code, result.error) == (0, "")
    assert "Changed argmax: 0 " in result.out
    assert path.read_bytes() == balanced.path.read_bytes()


def test_stage_two_trains_on_a_balanced_pool(tspipe: Tspipe, balanced: Cache) -> None:
    settings = [f"--set={setting}" for setting in SMALL]
    result = tspipe("student", "--cache", balanced.path, *settings)
    assert (result.code, result.error) == (0, "")
    assert "random pool  40 images, mixed, mt19937, seed 0, balanced" in tspipe("info", balanced.path).out
    refused = tspipe("student", "--cache", balanced.path, *settings, "--set=random_kind=cutmix")
    assert "was made with random_kind = mixed, not cutmix" in refused.error


def test_every_kind_is_scored_by_the_teacher(tspipe: Tspipe, balanced: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_kinds, "IMAGES", 40)
    result = tspipe("list", "random-kinds", "--cache", balanced.path)
    rows = {line[:16].strip(): line.split() for line in result.out.splitlines()[1:]}
    assert ["training images", "random pool", *KINDS] == list(rows)[:6]
    assert balanced.random is not None
    pooled = score(balanced.random.logits.load())
    assert f"{pooled.deviation:.4f}" == rows["random pool"][-1]
    assert tspipe("list", "random-kinds").out.split() == list(KINDS)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kind": "uniform"}, "manifest.random.kind cannot be"),
        ({"kind": "mixed"}, "manifest.random lacks the field 'flip'"),
        ({"shift": 1, "flip": True}, "manifest.random lacks the field 'kind'"),
        ({"kind": "mixed", "shift": -1, "flip": True}, "manifest.random.shift cannot be -1"),
        ({"rounds": 1}, "manifest.random.rounds cannot be 1"),
        ({"kind": "structured", "generator": "minstd"}, "manifest.random.generator cannot be"),
    ],
)
def test_a_pool_that_no_version_describes_is_refused(pool: Cache, options: dict[str, Any], problem: str) -> None:
    random = {**pool.manifest["random"], **options}
    with pytest.raises(NotACache, match=problem):
        decode_manifest(encode_manifest({**pool.manifest, "random": random}))
