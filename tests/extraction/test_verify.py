"""`tspipe verify`: damage is said in one sentence, put back byte for byte, and a cache is compared with life."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import Result
from shared import TEACHER, make_folder, spoil
from tspipe.cache import Cache, open_cache
from tspipe.cache.inspect import inspect
from tspipe.extraction.extract import ExtractConfig, extract
from tspipe.models import weights
from tspipe.recipes import load

Tspipe = Callable[..., Result]


@pytest.fixture
def copy(digits: Cache, tmp_path: Path) -> Path:
    return Path(shutil.copy(digits.path, tmp_path / "digits.h5"))


def test_a_sound_file(tspipe: Tspipe, copy: Path) -> None:
    result = tspipe("verify", copy)
    assert (result.code, result.err) == (0, "")
    cache = open_cache(copy)
    assert result.out == (f"{copy} is intact: 1,797 images, {copy.stat().st_size / 1024:.1f} KiB, id {cache.id[:12]}\n")


def test_repair_of_a_sound_file_removes_the_lock_of_a_killed_one(tspipe: Tspipe, copy: Path) -> None:
    stale = copy.with_name("digits.h5.lock")
    stale.touch()
    assert tspipe("verify", copy, "--repair").code == 0
    assert not stale.exists()


def test_damage_is_said_with_dataset_rows_and_remedy(tspipe: Tspipe, copy: Path) -> None:
    spoil(copy, ("train_features", 300), ("test_labels", 0))
    result = tspipe("verify", copy)
    assert result.code == 1
    assert result.says(
        f"{copy} is damaged: train_features, rows 256 to 511; test_labels, rows 0 to 255. Get the file "
        f"again, or repair it: tspipe verify --repair {copy}"
    )


EVERYWHERE = [
    *[(f"{split}_{column}", 3) for split in ("train", "test") for column in ("features", "logits", "labels", "keys")],
    ("train_digests", 999),
]


@pytest.mark.parametrize(
    "places",
    [EVERYWHERE, [("train_checksums", 0)], [("id", 0)], [("classes", 4)]],
    ids=["rows", "checksums", "id", "classes"],
)
def test_repair_ends_with_the_original_bytes(
    tspipe: Tspipe, copy: Path, digits: Cache, places: list[tuple[str, int]]
) -> None:
    spoil(copy, *places)
    assert copy.read_bytes() != digits.path.read_bytes()
    result = tspipe("verify", "--repair", copy)
    assert (result.code, result.error) == (0, "")
    assert result.out.startswith("Repaired: ")
    assert copy.read_bytes() == digits.path.read_bytes()


def test_repair_computes_only_what_is_damaged(tspipe: Tspipe, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tspipe.extraction import forward

    computed: list[int] = []
    run_teacher = forward.run_teacher_on_blocks
    monkeypatch.setattr(
        forward,
        "run_teacher_on_blocks",
        lambda *arguments: computed.append(len(arguments[3])) or run_teacher(*arguments),
    )
    spoil(copy, ("train_features", 300), ("train_labels", 700), ("test_logits", 790))
    assert tspipe("verify", "--repair", copy).code == 0
    assert computed == [256, 29]  # the labels need no teacher


def test_damaged_weights_are_put_back_from_their_file(tspipe: Tspipe, copy: Path, digits: Cache, teacher: Path) -> None:
    spoil(copy, ("teacher_weights", 5000), ("train_features", 0))
    result = tspipe("verify", "--repair", copy)
    assert result.code == 1
    sha256 = digits.manifest["teacher"]["file_sha256"][:12]
    assert result.says(
        f"{copy}: its teacher's weights are needed. Give the file they came from, SHA-256 {sha256}…: --weights FILE"
    )
    assert tspipe("verify", "--repair", copy, "--weights", teacher).code == 0
    assert copy.read_bytes() == digits.path.read_bytes()


def test_a_manifest_cannot_be_put_back(tspipe: Tspipe, copy: Path) -> None:
    offset = inspect(copy).columns["manifest"].offset
    data = bytearray(copy.read_bytes())
    at = data.index(b'"weights_sha256":"', offset) + 20
    data[at] = ord("0") if data[at] != ord("0") else ord("1")
    copy.write_bytes(data)
    result = tspipe("verify", "--repair", copy)
    assert result.code == 1
    assert result.says(
        f"{copy} is damaged: manifest, rows 0 to 65,535 (does not match the id). Get the file again from "
        "its source, or make it again: tspipe cache --force"
    )
    assert copy.read_bytes() == data


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A cache of a folder of images, `shapes/`, beside it."""
    import torch

    from tspipe.models import networks

    folder = make_folder(tmp_path / "shapes")
    torch.manual_seed(0)
    weights.save(tmp_path / "w.safetensors", networks.build("lenet5", 2, (3, 16, 16)), {})
    settings = [f"dataset=folder:{folder}", "teacher.network=lenet5", "compute.block_rows=4"]
    config = load.load("folder", settings)
    return extract(ExtractConfig(config, weights.read(tmp_path / "w.safetensors"), tmp_path / "shapes.h5")).path


def test_repair_from_other_images_writes_nothing(tspipe: Tspipe, shapes: Path) -> None:
    spoil(shapes, ("train_features", 5))
    damaged = shapes.read_bytes()
    folder = shapes.parent / "shapes"
    (folder / "train/a/05.png").write_bytes((folder / "train/b/00.png").read_bytes())
    result = tspipe("verify", "--repair", shapes, folder)
    assert result.code == 1
    assert result.says(
        f"{shapes}: train images 4 to 7 give other features here than were written, so these are left as they are. "
        "Either the images differ (tspipe verify --data), or this processor or PyTorch rounds differently. Get the "
        "file again."
    )
    assert shapes.read_bytes() == damaged


def test_data_compares_every_image(tspipe: Tspipe, shapes: Path) -> None:
    folder = shapes.parent / "shapes"
    assert tspipe("verify", shapes, "--data", folder).out.endswith("All 24 images are those of the local dataset.\n")
    (folder / "test/b/03.png").write_bytes((folder / "train/b/00.png").read_bytes())
    result = tspipe("verify", shapes, "--data", folder)
    assert result.code == 1
    assert result.error.startswith(
        "shapes.h5 is not of these data: at test index 7, the pixels of 'b/03.png' differ: digest"
    )


def test_the_teacher_is_asked_again(tspipe: Tspipe, copy: Path) -> None:
    result = tspipe("verify", copy, "--teacher", 100)
    assert (result.code, result.error) == (0, "")
    lines = result.out.splitlines()
    assert lines[1] == "The teacher, run again on 100 random images, against the file:"
    assert lines[2].split() == ["difference", "largest", "mean", "largest,", "relative"]
    name, largest, mean, share = lines[3].split()
    # float16 keeps 11 bits, so features differ by rounding, and only by that.
    assert name == "features"
    assert 0 < float(mean) < float(largest)
    assert 0 < float(share) < 2**-11
    assert lines[4].split()[0] == "logits"
    assert lines[5] == "Changed argmax: 0 of 100"


@pytest.mark.parametrize("count", [1, 65])
def test_the_images_chosen_may_all_be_of_one_split(tspipe: Tspipe, copy: Path, count: int, monkeypatch) -> None:
    class Last:
        def choice(self, total: int, size: int, replace: bool) -> np.ndarray:
            return np.arange(total - size, total)

    monkeypatch.setattr(np.random, "default_rng", Last)
    result = tspipe("verify", copy, "--teacher", count)
    assert (result.code, result.error) == (0, "")
    assert result.out.endswith(f"Changed argmax: 0 of {count}\n")


def test_a_teacher_that_says_something_else(tspipe: Tspipe, shapes: Path) -> None:
    folder = shapes.parent / "shapes"
    for path in folder.rglob("*.png"):
        path.write_bytes((folder / "train/b/00.png").read_bytes())
    result = tspipe("verify", shapes, folder, "--teacher", 1000)
    assert result.code == 1
    assert "run again on 24 random images" in result.out
    assert result.error == (
        "The teacher gives other features or logits than the file holds for 23 of 24 images, by more than rounding. "
        "Other images or other code of its network may be why: tspipe verify --data"
    )


def test_a_cache_without_its_teacher_takes_its_weights(
    tspipe: Tspipe, digits: Cache, teacher: Path, tmp_path: Path
) -> None:
    """No command writes one yet; the format allows it."""
    from tspipe.cache import CacheWriter, Dimensions
    from tspipe.cache.manifest import as_plan
    from tspipe.data import datasets
    from tspipe.extraction import blocks as rows

    recipe = load.load("digits", TEACHER)
    dataset, sizes = datasets.open_dataset("digits"), digits.dimensions
    path = tmp_path / "light.h5"
    without = Dimensions(**{**vars(sizes), "weights_bytes": 0})
    with CacheWriter(path, as_plan(digits.manifest), without, digits.classes) as writer:
        for split in ("train", "test"):
            ranges = [sizes.block(split, block) for block in range(sizes.blocks(split))]
            for number, block in enumerate(rows.decode_blocks(dataset.split(split), recipe.preprocess, ranges)):
                stored, computed = digits.split(split), slice(block.indices.start, block.indices.stop)
                columns = {name: getattr(stored, name)[computed] for name in ("features", "logits", "labels", "keys")}
                writer.write_block(split, number, {**columns, "digests": block.digests})
        writer.finish()
    original = path.read_bytes()
    spoil(path, ("test_features", 0))
    assert tspipe("verify", "--repair", path).says(f"{path}: its teacher's weights are needed. …")
    assert tspipe("verify", "--repair", path, "--weights", teacher).code == 0
    assert path.read_bytes() == original
    other = tmp_path / "other.safetensors"
    tensors = {name: tensor + 1 for name, tensor in weights.read(teacher).tensors.items()}
    weights.save(other, tensors, {})
    result = tspipe("verify", path, "--teacher", 3, "--weights", other)
    assert result.code == 1
    assert result.says(f"{other} is not what light.h5 was made with.")
    assert np.array_equal(open_cache(path).train.features, digits.train.features)
