"""Images without labels: stage one stores the teacher's output for them, stage two adds them to the batches."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import Result
from shared import TEACHER, spoil
from tspipe.cache import Cache, diff
from tspipe.cache.layout import digest
from tspipe.data.datasets import open_dataset
from tspipe.errors import CacheMismatch, DatasetError
from tspipe.extraction import forward
from tspipe.extraction.extract import Contents, ExtractConfig, extract
from tspipe.models import weights
from tspipe.recipes import load
from tspipe.training import learner
from tspipe.training.arms import ALONE, TAUGHT
from tspipe.training.batches import Batch
from tspipe.training.config import LocalInputs, StudentConfig
from tspipe.training.trainer import train_students

Tspipe = Callable[..., Result]
COUNT = 20
SMALL = ["epochs=1", "batch_size=250", "unlabelled_images=7", "random_images=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write grey images of the size of the digits, some in a subfolder."""
    root = tmp_path_factory.mktemp("unlabelled") / "more"
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = root / ("sub" if i % 2 else ".") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


def stage_one(teacher: Path, out: Path, folder: Path, *, images: bool = False) -> ExtractConfig:
    recipe = load.load("digits", [*TEACHER, "compute.block_rows=16"])
    return ExtractConfig(recipe, weights.read(teacher), out, contents=Contents(images, unlabelled=folder))


@pytest.fixture(scope="module")
def cache(teacher: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return extract(stage_one(teacher, tmp_path_factory.mktemp("cache") / "digits.h5", folder))


def stage_two(cache: Cache, folder: Path | None, out: Path, *settings: str, arm: str = TAUGHT) -> StudentConfig:
    facts = {"preprocess": cache.manifest["preprocess"]}
    recipe = load.load("digits", [*SMALL, *settings], facts=facts)
    return StudentConfig(recipe, cache, (arm,), LocalInputs(unlabelled=folder), out)


def test_the_file_holds_them_as_a_split(cache: Cache, digits: Cache, folder: Path) -> None:
    assert cache.manifest["dataset"]["rows"] == {"train": 1000, "test": 797, "unlabelled": COUNT}
    assert cache.unlabelled is not None
    keys = [key.decode() for key in cache.unlabelled.keys.load()]
    assert keys == sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    image = np.asarray(Image.open(folder / keys[3]))[:, :, None]
    assert cache.unlabelled.digests[3].tobytes() == digest(image)
    assert cache.manifest["dataset"]["fingerprint"] == digits.manifest["dataset"]["fingerprint"]
    np.testing.assert_array_equal(cache.test.features.load(), digits.test.features.load())


def test_killed_in_the_new_split_it_ends_with_the_same_bytes(
    cache: Cache, teacher: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, original = stage_one(teacher, tmp_path / "digits.h5", folder), forward.run_teacher_on_blocks

    def stopping(*arguments: Any) -> Any:
        if arguments[-2:] == ("unlabelled", 1):
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(forward, "run_teacher_on_blocks", stopping)
    with pytest.raises(KeyboardInterrupt):
        extract(config)
    monkeypatch.setattr(forward, "run_teacher_on_blocks", original)
    assert extract(config).path.read_bytes() == cache.path.read_bytes()
    assert extract(config).id == cache.id
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(other / "00.png")
    with pytest.raises(CacheMismatch, match=r"at unlabelled index 0, the pixels of '00\.png' differ"):
        extract(stage_one(teacher, config.out, other))
    (other / "02.png").unlink()
    difference = diff.compare(cache, extract(stage_one(teacher, tmp_path / "other.h5", other))).splits["unlabelled"]
    assert (difference.common, difference.only, difference.edited) == (COUNT - 1, (["02.png"], []), ["00.png"])
    assert (difference.relabelled, difference.features, difference.argmax) == ([], 0.0, 0)


def test_verify_compares_and_repairs_them(tspipe: Tspipe, cache: Cache, folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(cache.path, tmp_path / "copy.h5"))
    spoil(path, ("unlabelled_features", 17), ("unlabelled_keys", 2))
    assert "its unlabelled images are needed. Give their folder" in tspipe("verify", path, "--repair").error
    result = tspipe("verify", path, "--repair", "--data", "--teacher", 1817, "--unlabelled", folder)
    assert (result.code, result.error) == (0, "")
    assert "All 1,817 images are those" in result.out
    assert "Changed argmax: 0 of 1,817" in result.out
    assert path.read_bytes() == cache.path.read_bytes()
    assert "1,000 train, 797 test, 20 unlabelled" in tspipe("info", path).out


def record_batches(monkeypatch: pytest.MonkeyPatch, config: StudentConfig) -> list[Batch]:
    batches, step = list[Batch](), learner.Learner.step
    monkeypatch.setattr(
        learner.Learner, "step", lambda self, batch, number: batches.append(batch) or step(self, batch, number)
    )
    train_students(config)
    monkeypatch.setattr(learner.Learner, "step", step)
    return batches


def test_taught_students_see_them_without_labels(
    cache: Cache, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.unlabelled is not None
    batches = record_batches(monkeypatch, stage_two(cache, folder, tmp_path / "a"))
    features = torch.from_numpy(cache.unlabelled.features.load()).float()
    rows = []
    for batch in batches:
        assert batch.unlabelled is not None
        images, target = batch.unlabelled
        assert (images.shape, target.labels.tolist()) == ((7, 1, 16, 16), [-100] * 7)
        rows += [int((features == row).all(1).nonzero()[0]) for row in target.features]
    assert sorted(rows[:COUNT]) == list(range(COUNT)), "every image once before any comes again"
    alone = record_batches(monkeypatch, stage_two(cache, folder, tmp_path / "b", arm=ALONE))
    assert {batch.unlabelled for batch in alone} == {None}


def test_the_teachers_labels_replace_all_others(
    cache: Cache, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.unlabelled is not None
    batches = record_batches(monkeypatch, stage_two(cache, folder, tmp_path / "a", "labels=teacher", "loss=kd"))
    for batch in batches:
        assert batch.unlabelled is not None
        for target in (batch.target, batch.unlabelled[1]):
            assert target.labels.equal(target.logits.argmax(1))
    assert (cache.train.logits.load().argmax(1) != cache.train.labels).any()


def test_pixels_in_the_file_need_no_folder(teacher: Path, folder: Path, tmp_path: Path) -> None:
    stored = extract(stage_one(teacher, tmp_path / "digits.h5", folder, images=True))
    first = train_students(stage_two(stored, None, tmp_path / "a"))
    assert first.finished


def test_what_is_missing_is_named(
    cache: Cache, digits: Cache, teacher: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CacheMismatch, match=r"digits\.h5 has no images without labels. Make it again with some"):
        train_students(stage_two(digits, folder, tmp_path / "a"))
    with pytest.raises(
        CacheMismatch, match=r"pixels of its images without labels\. Give their folder: --unlabelled FOLDER$"
    ):
        train_students(stage_two(cache, None, tmp_path / "a"))
    with pytest.raises(DatasetError, match=r"There is no folder .*nowhere of images without labels"):
        extract(stage_one(teacher, tmp_path / "x.h5", tmp_path / "nowhere"))
    leaked = Path(shutil.copytree(folder, tmp_path / "leaked"))
    test_image = open_dataset("digits").test.read(5)
    Image.fromarray(test_image[:, :, 0]).save(leaked / "zz.png")
    extract(stage_one(teacher, tmp_path / "leaked.h5", leaked))
    assert "1 of the images without labels are test images, the first 'zz.png'" in capsys.readouterr().err
