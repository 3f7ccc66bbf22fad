"""Every byte that is damaged is found, and in which dataset and rows."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pets import plan, write
from tspipe.cache import SPLITS, open_cache
from tspipe.cache.checksums import block_checksums, checksum_names, fingerprint, identify
from tspipe.cache.column import Column
from tspipe.cache.inspect import inspect
from tspipe.cache.manifest import Manifest, encode_manifest
from tspipe.cache.verify import explain, find_damage
from tspipe.errors import CacheError

WEIGHTS = b"in place of weights"
FLIPS = int(os.environ.get("TSPIPE_FLIPS", "75"))  # of each kind
AGAIN = "Get the file again, or repair it: tspipe verify --repair"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 10 + 3 images and 6 random ones in blocks of 4."""
    path = tmp_path_factory.mktemp("verify") / "pets.h5"
    manifest = plan({"train": 10, "test": 3}, pool=6)
    manifest["teacher"]["weights_sha256"] = hashlib.sha256(WEIGHTS).hexdigest()
    write(path, manifest, WEIGHTS)
    return path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    path = tmp_path / "pets.h5"
    path.write_bytes(sound.read_bytes())
    return path


def flip(path: Path, position: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def region(path: Path, name: str) -> Column:
    return inspect(path, identified=False).columns[name]


def put(path: Path, name: str, row: int, data: bytes) -> None:
    where = region(path, name)
    with path.open("r+b") as file:
        file.seek(where.offset + row * (where.nbytes // where.shape[0]))
        file.write(data)


def test_a_sound_file_is_what_was_written(sound: Path) -> None:
    read: list[int] = []
    assert find_damage(sound, read.append) == []
    columns = ("features", "logits", "labels", "keys", "digests")
    names = [f"{split}_{column}" for split in SPLITS for column in columns] + ["random_features", "random_logits"]
    assert sum(read) == sum(region(sound, name).nbytes for name in names)


@pytest.mark.parametrize(
    ("name", "row", "where"),
    [
        *[(f"train_{c}", 5, "rows 4 to 7") for c in ("features", "logits", "labels", "keys", "digests")],
        *[(f"test_{c}", 1, "rows 0 to 2") for c in ("features", "logits", "labels", "keys", "digests")],
        *[(f"random_{c}", 5, "rows 4 to 5") for c in ("features", "logits")],
        ("train_features", 9, "rows 8 to 9"),
        ("train_checksums", 1, "row 1"),
        ("test_checksums", 0, "row 0"),
        ("random_checksums", 1, "row 1"),
        ("classes", 0, "rows 0 to 1"),
        ("id", 3, "rows 0 to 63"),
        ("teacher_weights", 4, f"rows 0 to {len(WEIGHTS) - 1}"),
    ],
)
@pytest.mark.parametrize("mask", [1, 0x80])
def test_a_flipped_byte_is_found_in_its_dataset_and_rows(
    copy: Path, name: str, row: int, where: str, mask: int
) -> None:
    result = region(copy, name)
    flip(copy, result.offset + row * (result.nbytes // result.shape[0]), mask)
    assert explain(copy, find_damage(copy)) == f"{copy} is damaged: {name}, {where}. {AGAIN} {copy}"


def test_a_changed_manifest_is_named(copy: Path) -> None:
    manifest = inspect(copy).manifest
    manifest["dataset"]["license"] = "CC1"
    put(copy, "manifest", 0, encode_manifest(manifest))
    assert explain(copy, find_damage(copy)) == (
        f"{copy} is damaged: manifest, rows 0 to 65,535 (does not match the id). Get the file again from "
        "its source, or make it again: tspipe cache --force"
    )


def test_several_places_are_all_named_and_neighbours_joined(copy: Path) -> None:
    for name, row in (("train_features", 0), ("train_features", 4), ("train_keys", 9), ("test_logits", 2)):
        result = region(copy, name)
        flip(copy, result.offset + row * (result.nbytes // result.shape[0]))
    places = [damage.where for damage in find_damage(copy)]
    assert places == ["train_features, rows 0 to 7", "train_keys, rows 8 to 9", "test_logits, rows 0 to 2"]


@settings(max_examples=FLIPS)
@given(position=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
@example(position=0.0, mask=1)
@example(position=0.99999, mask=255)
def test_a_flip_anywhere_is_reported_or_changes_nothing(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, position: float, mask: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "pets.h5"
    path.write_bytes(sound.read_bytes())
    flip(path, int(position * path.stat().st_size), mask)
    assert_reported_or_unchanged(path, sound)


@pytest.fixture(scope="module")
def used(sound: Path) -> list[int]:
    """The positions of HDF5's own bytes, most of which are free space, near one that is not zero."""
    whole = sound.read_bytes()[: inspect(sound).columns["manifest"].offset]
    return sorted({j for i, byte in enumerate(whole) if byte for j in range(max(0, i - 8), i + 9)})


@settings(max_examples=FLIPS)
@given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flip_in_what_hdf5_uses_is_reported_or_changes_nothing(
    sound: Path, used: list[int], tmp_path_factory: pytest.TempPathFactory, where: float, mask: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "pets.h5"
    path.write_bytes(sound.read_bytes())
    flip(path, used[int(where * len(used))], mask)
    assert_reported_or_unchanged(path, sound)


def assert_reported_or_unchanged(path: Path, sound: Path) -> None:
    try:
        damage = find_damage(path)
    except CacheError:
        return
    if damage:
        return
    before, after = open_cache(sound), open_cache(path)
    assert (after.id, after.manifest, after.classes) == (before.id, before.manifest, before.classes)
    assert after.teacher_weights() == before.teacher_weights()
    for split in SPLITS:
        for column in ("features", "logits", "keys", "digests", "checksums"):
            target, local = getattr(before.split(split), column), getattr(after.split(split), column)
            assert target.dtype == local.dtype
            assert target.load().tobytes() == local.load().tobytes()
        np.testing.assert_array_equal(before.split(split).labels, after.split(split).labels)
    for column in ("features", "logits", "checksums"):
        assert getattr(before.random, column).load().tobytes() == getattr(after.random, column).load().tobytes()


def fit(path: Path, change: Callable[[Manifest], object] = lambda manifest: None) -> None:
    """Make the checksums, the manifest and the id fit the rows, as a writer with a fault would."""
    structure = inspect(path, identified=False, writable=True)
    columns = structure.columns
    for split in structure.dimensions.sections:
        for block in range(structure.dimensions.blocks(split)):
            put(path, f"{split}_checksums", block, block_checksums(columns, structure.dimensions, split, block))
    structure.manifest["dataset"]["fingerprint"] = fingerprint(columns["classes"].load().tobytes(), columns)
    change(structure.manifest)
    encoded = encode_manifest(structure.manifest)
    put(path, "manifest", 0, encoded)
    put(path, "id", 0, identify(encoded, [columns[name].load().tobytes() for name in checksum_names(columns)]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("column", "dtype"), [("features", "<f2"), ("logits", "<f4")])
@pytest.mark.parametrize(("split", "row"), [("train", 6), ("random", 5)])
def test_targets_that_are_no_numbers(copy: Path, split: str, row: int, column: str, dtype: str, value: float) -> None:
    put(copy, f"{split}_{column}", row, np.array([value], dtype).tobytes())
    fit(copy)
    open_cache(copy)
    result = [damage for damage in find_damage(copy) if "NaN" in damage.reason]
    assert [damage.where for damage in result] == [f"{split}_{column}, row {row}"]
    assert "(NaN or infinite). Get the file again from" in explain(copy, result)


def test_two_images_of_one_key(copy: Path) -> None:
    put(copy, "train_keys", 1, b"tr0\0\0\0")
    fit(copy)
    assert [(damage.dataset, damage.reason) for damage in find_damage(copy)] == [
        ("train_keys", "two images have the same key")
    ]


def test_a_manifest_that_counts_other_right_answers(copy: Path) -> None:
    fit(copy, lambda manifest: manifest["teacher"]["correct"].update(train=10))
    assert [(part.dataset, part.reason) for part in find_damage(copy)] == [
        ("train_logits", "not 10 correct predictions")
    ]


def test_rows_and_checksums_at_once_are_told_apart(copy: Path) -> None:
    """Of the checksums stored and those computed, the mixture that gives the id is right."""
    for name, row in (("train_features", 1), ("train_keys", 9), ("test_logits", 0)):
        result = region(copy, name)
        flip(copy, result.offset + row * (result.nbytes // result.shape[0]))
    sums = region(copy, "train_checksums")
    for column in (1, 2, 7):  # of blocks 0, 0 and 1: logits, labels, labels
        flip(copy, sums.offset + column * 32)
    assert [damage.where for damage in find_damage(copy)] == [
        "train_features, rows 0 to 3",
        "train_keys, rows 8 to 9",
        "test_logits, rows 0 to 2",
        "train_checksums, rows 0 to 1",
    ]


def test_an_id_overwritten_with_zeros_is_not_an_unfinished_file(copy: Path) -> None:
    put(copy, "id", 0, bytes(64))
    assert explain(copy, find_damage(copy)) == (
        f"{copy} is damaged: id, rows 0 to 63 (not a SHA-256). Get the file again from its source, "
        "or make it again: tspipe cache --force"
    )


def test_where_it_cannot_be_known_both_are_named(copy: Path) -> None:
    """A row and its own checksum: nothing tells what either was."""
    flip(copy, region(copy, "train_features").offset)
    flip(copy, region(copy, "train_checksums").offset)
    assert explain(copy, find_damage(copy)) == (
        f"{copy} is damaged: train_features, rows 0 to 3 (these rows or their checksums are damaged). Get the file "
        "again from its source, or make it again: tspipe cache --force"
    )
