"""Part files of several ranks become one, and nothing else that bears their name does."""

from pathlib import Path

import pytest

import pets
from tspipe.cache import CacheWriter
from tspipe.cache.merge import absorb

PLAN = pets.plan({"train": 10, "test": 6}, pool=6, views=2)
SIZES = pets.dimensions(PLAN)


def writer(path: Path, rank: int = 0, **changed: object) -> CacheWriter:
    return CacheWriter(path, {**PLAN, **changed}, SIZES, pets.CLASSES, rank=rank)


def write(path: Path, rank: int, blocks: list[tuple[str, int]], **changed: object) -> Path:
    """A rank's part file with these blocks."""
    with writer(path, rank, **changed) as file:
        for split, block in blocks:
            images, views = SIZES.block(split, block), SIZES.views_of(split)
            file.write_block(split, block, pets.rows_of(split, images, SIZES.width, views))
        file.sync()
    return file.part


def missing(path: Path) -> list[tuple[str, int]]:
    """What rank 0 still has to compute after it took in what lies there."""
    with writer(path) as file:
        absorb(file)
        return [(split, block) for split in SIZES.sections for block in file.missing(split)]


ALL = [("train", 0), ("train", 1), ("train", 2), ("test", 0), ("test", 1), ("random", 0), ("random", 1)]


@pytest.mark.parametrize("shares", [[ALL], [[], ALL], [ALL[::2], ALL[1::2]], [ALL[::3], ALL[1::3], ALL[2::3]]])
def test_the_file_is_that_of_one_process(tmp_path: Path, shares: list[list[tuple[str, int]]]) -> None:
    expected, path = tmp_path / "whole.h5", tmp_path / "pets.h5"
    pets.write(expected, PLAN)
    for rank, blocks in enumerate(shares):
        write(path, rank, blocks)
    with writer(path) as file:
        absorb(file)
        file.finish()
    assert path.read_bytes() == expected.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pets.h5", "whole.h5"]


def test_a_part_of_some_blocks_takes_little_room(tmp_path: Path) -> None:
    """A rank's file has holes where the others' rows are."""
    plan = pets.plan({"train": 4096, "test": 4}, width=2048)
    sizes = pets.dimensions(plan)
    with CacheWriter(tmp_path / "pets.h5", plan, sizes, pets.CLASSES, rank=1) as file:
        file.write_block("train", 700, pets.rows_of("train", sizes.block("train", 700), sizes.width))
    status = file.part.stat()
    assert status.st_size > 16 * 2**20
    assert status.st_blocks * 512 < 2 * 2**20


def test_a_block_whose_rows_are_not_those_of_its_checksum_is_left(tmp_path: Path) -> None:
    path = tmp_path / "pets.h5"
    part = write(path, 1, ALL)
    data = part.read_bytes()
    key = data.index(b"tr5")
    part.write_bytes(data[:key] + b"x" + data[key + 1 :])
    assert missing(path) == [("train", 1)]
    assert not part.exists()


def test_a_part_of_another_plan_is_deleted_unused(tmp_path: Path) -> None:
    path = tmp_path / "pets.h5"
    part = write(path, 2, ALL, compute={**PLAN["compute"], "batch_size": 3})
    assert missing(path) == ALL
    assert not part.exists()


def test_what_is_no_part_file_is_deleted_or_left_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "pets.h5"
    gone = [tmp_path / name for name in ("pets.h5.part-1", "pets.h5.part-12")]
    kept = [tmp_path / name for name in ("pets.h5.part-mine", "pets.h5.part-1.txt", "more-pets.h5.part-1")]
    for file in (*gone, *kept):
        file.write_bytes(b"no cache")
    linked = tmp_path / "pets.h5.part-4"
    linked.symlink_to(kept[0])
    assert missing(path) == ALL
    assert not any(file.exists() for file in gone)
    assert not linked.is_symlink()
    assert all(file.read_bytes() == b"no cache" for file in kept)


def test_a_rank_begins_its_part_anew(tmp_path: Path) -> None:
    """Rank 0 has taken in what was of use; what is there now is of nobody."""
    path = tmp_path / "pets.h5"
    write(path, 1, ALL, compute={**PLAN["compute"], "batch_size": 3})
    write(path, 1, ALL[:1])
    assert missing(path) == ALL[1:]


def test_a_part_that_a_network_disk_shows_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, waits = tmp_path / "pets.h5", []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) > 2:
            write(path, len(waits) - 2, [ALL[len(waits) - 3]])

    monkeypatch.setattr("tspipe.cache.merge.time.sleep", sleep)
    with writer(path) as file:
        absorb(file, ranks=3)
        assert file.missing("train") == [2]
    assert len(waits) == 4


def test_a_part_that_never_comes_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tspipe.cache.merge._PATIENCE", 0.0)
    with writer(tmp_path / "pets.h5") as file:
        absorb(file, ranks=2)
        assert file.missing("test") == [0, 1]


def test_ranks_write_beside_rank_0(tmp_path: Path) -> None:
    """Only rank 0 holds the lock of the name."""
    path = tmp_path / "pets.h5"
    with writer(path) as first:
        write(path, 1, ALL)
        absorb(first)
        first.finish()
    assert path.exists()
