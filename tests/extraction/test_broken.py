"""Broken images: all are named at once, blocks of other images are kept, and --skip-broken leaves them out."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import Result
from shared import small
from tspipe.cache import open_cache
from tspipe.errors import CacheMismatch, DatasetError
from tspipe.extraction import forward
from tspipe.extraction.extract import ExtractConfig, extract

REMEDY = "and run the same command again, or leave"


@pytest.fixture
def config(tmp_path: Path) -> ExtractConfig:
    """16 and 8 images in blocks of 4; the classes a and b."""
    return small(tmp_path / "shapes")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The blocks that the teacher runs on."""
    blocks: list[tuple[str, int]] = []
    run_teacher = forward.run_teacher_on_blocks

    def counting(*arguments: Any) -> Any:
        blocks.append(arguments[-2:])
        return run_teacher(*arguments)

    monkeypatch.setattr(forward, "run_teacher_on_blocks", counting)
    return blocks


def truncate(path: Path, size: int) -> bytes:
    """Cut a file short; a PNG of 100 bytes has a sound header."""
    content = path.read_bytes()
    path.write_bytes(content[:size])
    return content


def test_broken_headers_are_all_named_before_the_teacher_starts(
    config: ExtractConfig, tmp_path: Path, computed: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shapes"
    for name in ("train/a/00.png", "train/b/07.png", "test/a/01.png"):
        truncate(folder / name, 5)
    with pytest.raises(DatasetError) as refused:
        extract(config)
    assert str(refused.value) == (
        f"3 images cannot be decoded; all are listed above. The first: {folder}/train/a/00.png is not an image that "
        f"Pillow knows. Mend or remove them {REMEDY} them out: tspipe cache --skip-broken"
    )
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "Pillow" in line] == [
        f"{folder}/{name} is not an image that Pillow knows."
        for name in ("train/a/00.png", "train/b/07.png", "test/a/01.png")
    ]
    assert computed == []


def test_others_are_named_at_the_end_and_other_blocks_are_kept(
    config: ExtractConfig, tmp_path: Path, computed: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shapes"
    expected = extract(config).path.read_bytes()
    config.out.unlink()
    contents = {name: truncate(folder / name, 100) for name in ("train/a/05.png", "test/b/03.png")}
    computed.clear()
    with pytest.raises(DatasetError) as refused:
        extract(config)
    assert str(refused.value).startswith(
        f"2 images cannot be decoded; all are listed above. The first: {folder}/train/"
    )
    listed = capsys.readouterr().err
    assert all(name in listed for name in contents)
    assert computed == [("train", 0), ("train", 2), ("train", 3), ("test", 0)]
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    computed.clear()
    assert extract(config).path.read_bytes() == expected
    assert computed == [("train", 1), ("test", 1)]


def test_blocks_before_a_removed_image_are_used_again(
    config: ExtractConfig, tmp_path: Path, computed: list[tuple[str, int]]
) -> None:
    """Blocks of the same images: those after it have others, and views and random numbers go by place."""
    broken = tmp_path / "shapes/train/b/02.png"  # image 10, in block 2
    truncate(broken, 100)
    with pytest.raises(DatasetError) as refused:
        extract(config)
    assert str(refused.value).endswith(f" Mend or remove it {REMEDY} it out: tspipe cache --skip-broken")
    broken.unlink()
    computed.clear()
    data = extract(config).path.read_bytes()
    assert computed == [("train", 2), ("train", 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes", "shapes.h5"]
    config.out.unlink()
    assert extract(config).path.read_bytes() == data


def test_a_part_file_of_other_images_is_not_used(
    config: ExtractConfig, tmp_path: Path, computed: list[tuple[str, int]]
) -> None:
    """Blocks with other keys or labels are computed again."""
    folder = tmp_path / "shapes"
    truncate(folder / "test/b/03.png", 100)
    with pytest.raises(DatasetError):
        extract(config)
    (folder / "test/b/03.png").unlink()
    (folder / "train/a/00.png").rename(folder / "train/a/00x.png")
    computed.clear()
    cache = extract(config)
    assert computed == [("train", 0), ("test", 1)]
    assert cache.train.keys[0] == b"a/00x.png"


def test_skip_broken_leaves_them_out(
    config: ExtractConfig, tmp_path: Path, computed: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shapes"
    truncate(folder / "train/a/05.png", 5)
    truncate(folder / "train/b/02.png", 100)
    with pytest.raises(DatasetError):
        extract(config)
    skipping = replace(config, skip_broken=True)
    cache = extract(skipping)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Left out of train: {folder}/train/a/05.png is not an image that Pillow knows."
    assert lines[1].startswith(f"Left out of train: {folder}/train/b/02.png cannot be decoded: ")
    assert cache.manifest["dataset"]["rows"] == {"train": 14, "test": 8}
    keys = [key.decode() for key in cache.train.keys]
    assert len(keys) == 14
    assert not {"a/05.png", "b/02.png"} & set(keys)
    # The same command again finds the file finished; the same images removed give the same file.
    computed.clear()
    assert extract(skipping).id == cache.id
    assert computed == []
    for name in ("train/a/05.png", "train/b/02.png"):
        (folder / name).unlink()
    assert extract(replace(config, out=tmp_path / "removed.h5")).id == cache.id


def test_no_image_is_left(config: ExtractConfig, tmp_path: Path) -> None:
    for path in (tmp_path / "shapes/test").rglob("*.png"):
        truncate(path, 5)
    with pytest.raises(DatasetError, match=r"No image of the test split can be decoded\. The first: "):
        extract(replace(config, skip_broken=True))


def test_no_image_of_a_class_is_left(config: ExtractConfig, tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    for path in (folder / "train/b").iterdir():
        truncate(path, 5)
    with pytest.raises(DatasetError) as refused:
        extract(replace(config, skip_broken=True))
    assert str(refused.value) == (
        f"No image of the class 'b' can be decoded in the train split. The first: {folder}/train/b/00.png is not an "
        "image that Pillow knows. Mend one, or remove the class."
    )


def test_students_and_verify_leave_out_the_same(config: ExtractConfig, tmp_path: Path, tspipe: Any) -> None:
    folder = tmp_path / "shapes"
    whole = truncate(folder / "train/a/05.png", 100)
    weights = ["--teacher", "lenet5", "--weights", folder / "w.safetensors", "--set=compute.block_rows=4"]
    made: Result = tspipe("cache", "--dataset", f"folder:{folder}", *weights, "--out", "x.h5", "--skip-broken")
    assert made.code == 0, made.err
    student = ["student", "--cache", "x.h5", "--data", folder, "--student", "lenet5", "--set=batch_size=5"]
    result: Result = tspipe(*student, "--epochs", 1, "--seeds", 1, "--random-images", 0)
    assert result.code == 0, result.err
    assert f"Left out of train, as in x.h5: {folder}/train/a/05.png cannot be decoded: " in result.err
    assert tspipe("verify", "x.h5", folder, "--data", "--teacher", 23).code == 0
    # An image that can be decoded is one more than the cache has.
    (folder / "train/a/05.png").write_bytes(whole)
    refused: Result = tspipe(*student)
    assert refused.error.startswith("x.h5 is not of these data (15 images cached, 16 in the dataset)")
    shutil.rmtree(folder / "train/b")
    assert tspipe(*student).code == 1


def test_another_number_of_rows_in_a_finished_cache_is_refused(config: ExtractConfig, tmp_path: Path) -> None:
    cache = extract(config)
    (tmp_path / "shapes/train/a/05.png").unlink()
    with pytest.raises(CacheMismatch, match=r"dataset\.rows\.train is 16, not 15"):
        extract(config)
    assert open_cache(config.out).id == cache.id


def test_a_teacher_of_images_that_are_broken_now(config: ExtractConfig, tmp_path: Path, tspipe: Any) -> None:
    folder = tmp_path / "shapes"
    dataset = ["--dataset", f"folder:{folder}", "--teacher", "lenet5"]
    assert tspipe("teacher", *dataset, "--epochs", 1, "--set=teacher.batch_size=8").code == 0
    (folder / "train/b/new.png").write_bytes(b"")  # the teacher was trained without it
    made: Result = tspipe("cache", *dataset, "--skip-broken", "--out", "new.h5")
    assert made.code == 0, made.err
    assert open_cache("new.h5").manifest["dataset"]["rows"]["train"] == 16
    truncate(folder / "train/a/05.png", 100)
    remedy = "--weights checkpoints/shapes-lenet5.safetensors"
    refused: Result = tspipe("cache", *dataset)
    assert refused.error.startswith(f"{folder}/train/a/05.png cannot be decoded: ")
    assert refused.error.endswith(
        f". The teacher was trained with this image. Mend it, or use the teacher as it is: {remedy}"
    )
    refused = tspipe("cache", *dataset, "--skip-broken")
    assert refused.error == (
        "Without 2 broken images, listed above, the data are not those that checkpoints/shapes-lenet5.safetensors was "
        f"trained on. Mend what is broken, or use the teacher as it is: {remedy}"
    )
    assert all(f"{folder}/train/{name}.png " in refused.err for name in ("a/05", "b/new"))
    made = tspipe("cache", *dataset, "--skip-broken", *remedy.split())
    assert made.code == 0, made.err
    assert open_cache("cache/shapes-lenet5.h5").manifest["dataset"]["rows"]["train"] == 15
