"""The cache is written so that a kill at any moment loses at most one block."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pets import CLASSES, dimensions, plan, rows_of, write
from tspipe.cache import SPLITS, CacheWriter, open_cache
from tspipe.errors import CacheBusy, CacheError, CacheIncomplete, CacheMismatch


@given(
    train=st.integers(1, 20),
    test=st.integers(1, 9),
    width=st.integers(1, 7),
    dtype=st.sampled_from(["<f2", "<f4"]),
    block_rows=st.integers(1, 8),
    weights=st.binary(max_size=20),
    pool=st.integers(0, 9),
    views=st.sampled_from([0, 2, 3]),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    train: int,
    test: int,
    width: int,
    dtype: str,
    block_rows: int,
    weights: bytes,
    pool: int,
    views: int,
) -> None:
    path, rows = tmp_path_factory.mktemp("w") / "pets.h5", {"train": train, "test": test}
    manifest = plan(rows, width=width, dtype=dtype, block_rows=block_rows, pool=pool, views=views)
    write(path, manifest, weights)
    cache = open_cache(path)
    sizes = dimensions(manifest, weights)
    assert cache.classes == CLASSES
    assert cache.has_teacher == bool(weights)
    for split in SPLITS:
        times = (views or 1) if split == "train" else 1
        blocks = [rows_of(split, sizes.block(split, b), width, times) for b in range(sizes.blocks(split))]
        expected = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        result = cache.split(split)
        np.testing.assert_array_equal(result.features, expected["features"].astype(dtype))
        np.testing.assert_array_equal(result.logits, expected["logits"])
        np.testing.assert_array_equal(result.labels, expected["labels"])
        np.testing.assert_array_equal(result.keys, expected["keys"])
        np.testing.assert_array_equal(result.digests, expected["digests"])
        assert (result.views is None) == (not views or split == "test")
        if result.views is not None:
            np.testing.assert_array_equal(result.views, expected["views"])
        correct = int((expected["logits"][::times].argmax(1) == expected["labels"]).sum())
        assert cache.manifest["teacher"]["correct"][split] == correct
    assert (cache.random is None) == (pool == 0)
    if cache.random is not None:
        expected = rows_of("random", range(pool), width)
        np.testing.assert_array_equal(cache.random.features, expected["features"].astype(dtype))
        np.testing.assert_array_equal(cache.random.logits, expected["logits"])


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    manifest = plan({"train": 10, "test": 3})
    for name in ("a.h5", "b.h5"):
        write(tmp_path / name, manifest, b"weights")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "b.h5"]


@given(stops=st.lists(st.integers(0, 3), max_size=6))
def test_stopped_anywhere_it_goes_on_and_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int]
) -> None:
    folder, manifest = tmp_path_factory.mktemp("w"), plan({"train": 10, "test": 5}, pool=9, views=2)
    every_block = write(folder / "whole.h5", manifest)
    path, done = folder / "pets.h5", []
    for stop in stops:
        done += write(path, manifest, stop_after=stop)
        if path.exists():
            break
        with pytest.raises(CacheIncomplete):
            open_cache(folder / "pets.h5.part")
    if not path.exists():
        done += write(path, manifest)
    assert done == every_block  # none twice, none left out
    assert path.read_bytes() == (folder / "whole.h5").read_bytes()


def test_a_block_whose_rows_did_not_reach_the_disk_is_computed_again(tmp_path: Path) -> None:
    path, manifest = tmp_path / "pets.h5", plan({"train": 10, "test": 3})
    write(path, manifest, stop_after=2)
    part = tmp_path / "pets.h5.part"
    with h5py.File(part, "r") as file:
        offset = file["train_features"].id.get_offset()
    with part.open("r+b") as raw:
        raw.seek(offset)
        raw.write(bytes(2))
    assert write(path, manifest) == [("train", 0), ("train", 2), ("test", 0)]


def test_layout_is_the_designed_one(tmp_path: Path) -> None:
    path = tmp_path / "pets.h5"
    write(path, plan({"train": 10, "test": 3}), b"weights")
    with h5py.File(path, "r") as file:
        assert dict(file.attrs) == {"format": b"tspipe-cache", "version": 1}
        names = sorted(file, key=lambda name: file[name].id.get_offset())
        columns = ("features", "logits", "labels", "keys", "digests", "checksums")
        expected = {f"{split}_{column}" for split in SPLITS for column in columns}
        assert set(names) == {"manifest", "id", "classes", "teacher_weights"} | expected
        for name in names:
            assert file[name].chunks is None
            assert file[name].compression is None
        assert file["train_features"].dtype == np.dtype("<f2")
        assert file["train_checksums"].shape == (3, 5, 32)
        manifest = file["manifest"][()].tobytes()
    assert len(manifest) == 65536
    text = manifest.rstrip(b"\0").decode("ascii")
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def test_another_plan_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "pets.h5"
    write(path, plan({"train": 10, "test": 3}), stop_after=1)
    with pytest.raises(CacheMismatch) as refused:
        write(path, plan({"train": 11, "test": 3}, dtype="<f4"))
    assert str(refused.value) == (
        f"{path}.part was begun with another plan: dataset.rows.train is 10, not 11; "
        "features.dtype is '<f2', not '<f4'. Use the same settings to resume it, or delete it to "
        "start again."
    )
    write(path, plan({"train": 10, "test": 3}))  # the part file was not touched


def test_finishing_early_is_refused(tmp_path: Path) -> None:
    path, manifest = tmp_path / "pets.h5", plan({"train": 10, "test": 3})
    with CacheWriter(path, manifest, dimensions(manifest), CLASSES) as writer, pytest.raises(CacheError) as refused:
        writer.finish()
    assert str(refused.value) == f"{path}.part lacks 4 blocks. Run the same command again."
    assert not path.exists()


def test_a_second_writer_is_refused_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "pets.h5"
    program = (
        "import os, sys; from pathlib import Path\n"
        "from tspipe.utils.files import lock; from tspipe.errors import CacheBusy\n"
        "with lock(Path(sys.argv[1]), CacheBusy): print(os.getpid(), flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    pid = int(holder.stdout.readline())
    with pytest.raises(CacheBusy) as refused:
        write(path, plan({"train": 1, "test": 1}))
    host = os.uname().nodename
    assert str(refused.value) == (
        f"{path} is being written by process {pid} on {host}. Wait for it to end, or stop it."
    )
    holder.kill()
    holder.wait()
    write(path, plan({"train": 1, "test": 1}))
    assert [p.name for p in tmp_path.iterdir()] == ["pets.h5"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError) as refused:
        write(tmp_path / "file" / "pets.h5", plan({"train": 1, "test": 1}))
    assert str(refused.value) == (
        f"{tmp_path}/file/pets.h5.part cannot be written: File exists. "
        "Existing files are kept. Fix this, then run the same command again."
    )


def test_the_part_file_of_another_process_is_not_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, manifest = tmp_path / "pets.h5", plan({"train": 10, "test": 3})
    others = {f"{path}.part": b"half", f"{path}.lock": b"process 1 on another-host"}

    def replaced(*_: object) -> dict[str, int]:
        for name, content in others.items():
            Path(name).unlink()
            Path(name).write_bytes(content)
        return dict.fromkeys(SPLITS, 0)

    monkeypatch.setattr("tspipe.cache.write.count_correct", replaced)
    with pytest.raises(CacheError, match=f"^{path}.part was deleted or replaced while this process was writing it"):
        write(path, manifest)
    assert {str(file): file.read_bytes() for file in tmp_path.iterdir()} == others


@pytest.mark.parametrize("moment", [1, 2])
def test_killed_while_finishing_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """The manifest is complete before the id is written; both are synced to the disk, which takes a while."""
    path, manifest = tmp_path / "pets.h5", plan({"train": 10, "test": 3})
    write(tmp_path / "whole.h5", manifest)
    write(path, manifest, stop_after=3)
    syncs = []

    def killed(descriptor: int) -> None:
        syncs.append(descriptor)
        if len(syncs) == moment:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            write(path, manifest)
    assert not path.exists()
    assert write(path, manifest) == []
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_without_posix_fallocate_the_file_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = plan({"train": 10, "test": 3})
    write(tmp_path / "linux.h5", manifest)
    monkeypatch.delattr(os, "posix_fallocate")
    write(tmp_path / "mac.h5", manifest)
    assert (tmp_path / "mac.h5").read_bytes() == (tmp_path / "linux.h5").read_bytes()


def test_a_plan_that_no_reader_would_take_leaves_nothing(tmp_path: Path) -> None:
    manifest = plan({"train": 1, "test": 1})
    manifest["dataset"]["name"] = "my pets"
    with pytest.raises(CacheError) as refused:
        write(tmp_path / "pets.h5", manifest)
    assert str(refused.value) == 'manifest.dataset.name cannot be "my pets".'
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "names"), [("key_bytes", "the keys of test images"), ("class_bytes", "the names of classes")]
)
def test_names_that_are_too_long_leave_no_file(tmp_path: Path, field: str, names: str) -> None:
    manifest = plan({"train": 10, "test": 3})
    sizes = dimensions(manifest)
    sizes = replace(sizes, **{field: 100_000 if field == "class_bytes" else {**sizes.key_bytes, "test": 100_000}})
    with pytest.raises(CacheError) as refused, CacheWriter(tmp_path / "x.h5", manifest, sizes, CLASSES):
        pass
    assert str(refused.value) == (
        f"{tmp_path / 'x.h5'}: {names} have up to 100,000 bytes; the format allows 4,096. Shorten them."
    )
    assert not list(tmp_path.iterdir())
