import hashlib
import os
import pickle
import shutil

import numpy as np
import pytest

from tspipe.data.datasets import _archive, cifar10, cifar100, open_dataset
from tspipe.errors import DatasetError

BOTH = pytest.mark.parametrize("module", [cifar10, cifar100])


def test_training_batches_follow_one_another(archive):
    images = cifar10.load(archive("cifar10"), "train")
    assert images.array.shape == (20, 32, 32, 3)
    assert images.labels.tolist() == [batch + row for batch in range(5) for row in range(4)]
    assert images.array[:, 0, 0, 0].tolist() == images.labels.tolist()
    assert images.keys == [str(i) for i in range(20)]
    assert images.classes == list("abcdefghij")


def test_test_batch(archive):
    images = cifar10.load(archive("cifar10"), "test")
    assert images.labels.tolist() == [5, 6, 7, 8]
    assert images.keys == ["0", "1", "2", "3"]


def test_a_row_is_three_planes(archive):
    root = archive("cifar10")
    row = pickle.loads((root / cifar10.FOLDER / "test_batch").read_bytes(), encoding="latin1")["data"][1]
    image = cifar10.load(root, "test").read(1)
    for channel in range(3):
        for y, x in [(0, 0), (0, 31), (17, 5), (31, 31)]:
            assert image[y, x, channel] == row[1024 * channel + 32 * y + x]


def test_fine_labels(archive):
    images = cifar100.load(archive("cifar100"), "train")
    assert images.array.shape == (6, 32, 32, 3)
    assert images.labels.tolist() == [94, 95, 96, 97, 98, 99]
    assert images.classes[94:] == ["c94", "c95", "c96", "c97", "c98", "c99"]


@BOTH
def test_root_may_be_the_unpacked_folder(module, archive):
    root = archive(module.__name__.split(".")[-1])
    np.testing.assert_array_equal(
        module.load(root / module.FOLDER, "train").array, module.load(root, "train").array, strict=True
    )


@pytest.mark.parametrize("module, file", [(cifar10, "data_batch_3"), (cifar100, "train")])
def test_nothing_is_unpickled_before_its_checksum_is_right(module, file, archive):
    root = archive(module.__name__.split(".")[-1])
    path, trace = root / module.FOLDER / file, root / "was here"
    hostile = pickle.dumps(Hostile(trace))
    path.write_bytes(hostile)
    with pytest.raises(DatasetError) as problem:
        module.load(root, "train")
    assert str(problem.value) == (
        f"{path} is not the published file: its MD5 is {hashlib.md5(hostile).hexdigest()}, that of the published one "
        f"{module.MD5[file]}. Remove it and fetch it again (--download)."
    )
    assert not trace.exists()
    pickle.loads(hostile)
    assert trace.exists(), "the test itself is harmless"


class Hostile:
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@BOTH
def test_the_class_names_are_checked_too(module, archive):
    root = archive(module.__name__.split(".")[-1])
    path = root / module.FOLDER / ("batches.meta" if module is cifar10 else "meta")
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DatasetError, match="meta is not the published file: its MD5 is"):
        module.load(root, "test")


def test_published_checksums_are_those_of_torchvision():
    published = pytest.importorskip("torchvision.datasets")
    for module, theirs in [(cifar10, published.CIFAR10), (cifar100, published.CIFAR100)]:
        files = dict([*theirs.train_list, *theirs.test_list])
        assert {**files, theirs.meta["filename"]: theirs.meta["md5"]} == module.MD5
        assert (theirs.base_folder, theirs.filename) == (module.FOLDER, module.ARCHIVE)


def test_missing_batch(archive):
    root = archive("cifar10")
    (root / cifar10.FOLDER / "data_batch_4").unlink()
    with pytest.raises(DatasetError) as problem:
        cifar10.load(root, "train")
    path = root / cifar10.FOLDER / "data_batch_4"
    assert str(problem.value) == f"{path} cannot be read: No such file or directory."


def test_a_pipe_is_refused_without_waiting_for_its_other_end(archive):
    root = archive("cifar10")
    path = root / cifar10.FOLDER / "test_batch"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DatasetError) as problem:
        cifar10.load(root, "test")
    assert str(problem.value) == f"{path} cannot be read: it is not a regular file."


def test_nothing_there(tmp_path):
    with pytest.raises(DatasetError) as problem:
        cifar10.load(tmp_path / "x", "train")
    assert str(problem.value) == (
        f"There is no CIFAR-10 in {tmp_path}/x: looked for cifar-10-batches-py/data_batch_1, data_batch_1. "
        "Give its folder (--data FOLDER) or fetch it (--download)."
    )
    with pytest.raises(DatasetError) as problem:
        cifar100.load(tmp_path / "x", "train")
    assert str(problem.value) == (
        f"There is no CIFAR-100 in {tmp_path}/x: looked for cifar-100-python/meta, meta. "
        "Give its folder (--data FOLDER) or fetch it (--download)."
    )


@BOTH
def test_only_the_archive_there(module, tmp_path):
    root = tmp_path / "my data"
    root.mkdir()
    (root / module.ARCHIVE).touch()
    with pytest.raises(DatasetError) as problem:
        module.load(root, "train")
    assert str(problem.value) == (
        f"{root}/{module.ARCHIVE} is not unpacked. Unpack it: tar -xzf '{root}/{module.ARCHIVE}' -C '{root}'"
    )


def test_download_asks_torchvision_then_loads(archive, monkeypatch, tmp_path):
    made = archive("cifar10")
    published = pytest.importorskip("torchvision.datasets")

    def fake(root, download):
        assert download
        shutil.copytree(made, root)

    monkeypatch.setattr(published, "CIFAR10", fake)
    dataset = open_dataset("cifar10", tmp_path / "fetched", download=True)
    assert (len(dataset.train), len(dataset.test)) == (20, 4)


def test_download_that_fails(monkeypatch, tmp_path):
    published = pytest.importorskip("torchvision.datasets")

    def fake(root, download):
        raise OSError("no route to host")

    monkeypatch.setattr(published, "CIFAR100", fake)
    with pytest.raises(DatasetError) as problem:
        cifar100.download(tmp_path)
    assert str(problem.value) == f"CIFAR-100 could not be fetched into {tmp_path}: no route to host"


def test_a_file_with_the_right_checksum_is_read(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert _archive.read(tmp_path / "abc", "900150983cd24fb0d6963f7d28e17f72") == b"abc"
