"""A file that is replaced or damaged while it is read is read as one file, or refused in one sentence."""

import errno
import os
import pickle
import threading
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from pets import CLASSES, dimensions, plan, write
from tspipe.cache import CacheWriter, open_cache
from tspipe.cache.repair import Repair
from tspipe.cache.verify import find_damage
from tspipe.errors import CacheError, NotACache
from tspipe.utils.threads import available_cores


def two_caches(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Write two caches of one layout with other licences and features; return licence and features by id."""
    contents = {}
    for name, shift in (("first", 0), ("second", 1)):
        manifest = plan({"train": 10, "test": 3})
        manifest["dataset"]["license"] = name
        sizes = dimensions(manifest)
        with CacheWriter(folder / f"{name}.h5", manifest, sizes, CLASSES) as writer:
            for split in sizes.sections:
                for block in writer.missing(split):
                    n = len(sizes.block(split, block))
                    rows = {"features": np.full((n, 5), shift), "logits": np.zeros((n, 2)), "labels": np.zeros(n)}
                    keys = np.array([f"{split[:2]}{i}".encode() for i in sizes.block(split, block)])
                    writer.write_block(split, block, {**rows, "keys": keys, "digests": np.zeros((n, 8))})
            identity = writer.finish()
        contents[identity] = name, np.full((10, 5), shift, "<f2").tobytes()
    return contents


def test_while_another_file_takes_its_name_one_of_both_is_read(tmp_path: Path) -> None:
    contents = two_caches(tmp_path)
    files = [(tmp_path / name).read_bytes() for name in ("first.h5", "second.h5")]
    path, replacements, stop = tmp_path / "pets.h5", 0, threading.Event()
    path.write_bytes(files[0])

    def replace() -> None:
        nonlocal replacements
        while not stop.is_set():
            replacements += 1
            (tmp_path / "new").write_bytes(files[replacements % 2])
            (tmp_path / "new").replace(path)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(60):
            cache = open_cache(path)
            result = cache.manifest["dataset"]["license"], cache.train.features.load().tobytes()
            assert result == contents[cache.id]
    finally:
        stop.set()
        writer.join()
    assert replacements > 20


def test_an_open_cache_stays_the_old_file_and_another_process_refuses_the_new_one(tmp_path: Path) -> None:
    contents = two_caches(tmp_path)
    cache = open_cache(tmp_path / "first.h5")
    column = pickle.dumps(cache.train.features)
    (tmp_path / "second.h5").replace(tmp_path / "first.h5")
    assert cache.train.features.load().tobytes() == contents[cache.id][1]
    with pytest.raises(CacheError) as refused:
        pickle.loads(column).load()
    assert str(refused.value) == f"{tmp_path}/first.h5 was replaced while it was in use. Run the command again."


def test_an_error_of_the_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pets.h5"
    write(path, plan({"train": 10, "test": 3}))
    cache = open_cache(path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Unable to open file\n(file read failed: …)")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        patch.setattr(os, "preadv", fail)
        for rows in ([1, 2], slice(None)):
            with pytest.raises(CacheError, match=r"pets.h5 can no longer be read"):
                cache.train.features[rows]
    with monkeypatch.context() as patch:
        patch.setattr(h5py, "File", fail)
        with pytest.raises(NotACache) as refused:
            open_cache(path)
        assert str(refused.value) == f"{path}: cannot be read (Input/output error)."
        with pytest.raises(CacheError) as refused:
            write(tmp_path / "new.h5", plan({"train": 10, "test": 3}))
        assert str(refused.value).startswith(f"{tmp_path}/new.h5.part cannot be written: Input/output error. ")
    assert [file.name for file in tmp_path.iterdir()] == ["pets.h5"]


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_a_part_file_that_is_a_link_is_not_written_to(tmp_path: Path, link: object) -> None:
    manifest = plan({"train": 10, "test": 3})
    write(tmp_path / "other.h5", manifest, stop_after=1)
    victim = tmp_path / "other.h5.part"
    before = victim.read_bytes()
    link(tmp_path / "pets.h5.part", victim)
    with pytest.raises(CacheError, match=r"pets.h5.part: cannot be read \(.*(link|second name)"):
        write(tmp_path / "pets.h5", manifest)
    assert victim.read_bytes() == before


def test_a_part_file_that_is_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pets.h5.part")
    with pytest.raises(CacheError, match="is not a regular file"):
        write(tmp_path / "pets.h5", plan({"train": 10, "test": 3}))


@pytest.mark.parametrize("views", [0, 4])
def test_finishing_and_verifying_hold_a_few_megabytes(tmp_path: Path, views: int) -> None:
    """The logits alone have 24 MB."""
    manifest = plan({"train": 6000 // (views or 1), "test": 4}, block_rows=100, views=views)
    manifest["dataset"]["classes"] = 1000
    sizes = dimensions(manifest)
    sizes = type(sizes)(**{**vars(sizes), "classes": 1000})
    path = tmp_path / "pets.h5"
    with CacheWriter(path, manifest, sizes, [f"{i}" for i in range(1000)]) as writer:
        for split in sizes.sections:
            for block in writer.missing(split):
                n, times = len(sizes.block(split, block)), sizes.views_of(split)
                shapes = {"features": (n * times, 5), "logits": (n * times, 1000), "labels": (n,), "digests": (n, 8)}
                keys = np.array([f"{split[:2]}{i:04}".encode() for i in sizes.block(split, block)])
                rows = {name: np.zeros(shape) for name, shape in shapes.items()}
                writer.write_block(split, block, {**rows, "keys": keys, "views": np.zeros((n * times, 3))})
        tracemalloc.start()
        writer.finish()
        finishing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    assert find_damage(path) == []
    verifying = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 24e6
    assert finishing < 8e6
    assert verifying < 4e6 + 4e6 * available_cores()


def test_a_cache_behind_a_link_is_repaired(tmp_path: Path) -> None:
    path, link = tmp_path / "pets.h5", tmp_path / "link.h5"
    write(path, plan({"train": 10, "test": 3}))
    sound = path.read_bytes()
    link.symlink_to(path)
    with path.open("r+b") as file:
        file.seek(open_cache(path).train.checksums.offset)
        file.write(bytes(32))
    damage = find_damage(link)
    with Repair(link) as repair:
        for part in damage:
            repair.known(part)
    assert path.read_bytes() == sound
