"""Stage one: the cache holds what the teacher says of the images, whatever happens on the way."""

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared import TEACHER, small, untouched
from tspipe.cache import Cache, CacheWriter, open_cache
from tspipe.cache.layout import digest
from tspipe.data import datasets
from tspipe.data.preprocess import Preprocess
from tspipe.errors import CacheError, CacheMismatch, OutOfMemory
from tspipe.extraction import forward
from tspipe.extraction.extract import ExtractConfig, cache_path, extract
from tspipe.models import feature_net, loading, networks, weights
from tspipe.recipes import load
from tspipe.recipes.schema import Compute


def config(teacher: Path, out: Path, *overrides: str) -> ExtractConfig:
    return ExtractConfig(load.load("digits", [*TEACHER, *overrides]), weights.read(teacher), out)


def test_the_rows_are_what_the_teacher_gives(digits: Cache) -> None:
    dataset = datasets.open_dataset("digits")
    manifest = digits.manifest
    spec = loading.NetworkSpec("lenet5", 10, (1, 16, 16), manifest["teacher"]["options"])
    module, options = loading.load_network(spec, weights.parse(digits.teacher_weights(), "w"), "w")
    network = feature_net.split(module.eval(), "lenet5", torch.zeros(2, *options["input_shape"]))
    preprocess = Preprocess.from_dict(manifest["preprocess"])
    for split in ("train", "test"):
        images, stored = dataset.split(split), digits.split(split)
        pixels = np.stack([preprocess.apply(images.read(i)) for i in range(len(images))])
        with torch.no_grad():
            features, logits = network(preprocess.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
        scale = features.abs().max()
        # float16 keeps 11 bits.
        assert (torch.from_numpy(stored.features.load()).float() - features).abs().max() < 2**-11 * scale
        torch.testing.assert_close(torch.from_numpy(stored.logits.load()), logits, rtol=1e-4, atol=1e-4)
        assert stored.labels.tolist() == images.labels.tolist()
        assert [key.decode() for key in stored.keys] == images.keys
        assert stored.digests[7].tobytes() == digest(images.read(7))
        correct = int((logits.argmax(1).numpy() == images.labels).sum())
        assert manifest["teacher"]["correct"][split] == correct


def test_the_same_inputs_give_the_same_bytes(digits: Cache, teacher: Path, tmp_path: Path) -> None:
    again = extract(config(teacher, tmp_path / "again.h5"))
    assert again.id == digits.id
    assert again.path.read_bytes() == digits.path.read_bytes()


def test_a_finished_cache_is_left_as_it_is(digits: Cache, teacher: Path) -> None:
    """Only the lock of a process that was killed at the very end is removed."""
    before, stale = untouched(digits.path), digits.path.with_name("digits.h5.lock")
    stale.touch()
    assert extract(config(teacher, digits.path)).id == digits.id
    assert untouched(digits.path) == before
    assert not stale.exists()


def test_another_cache_of_the_name_is_replaced_only_with_force(digits: Cache, teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "digits.h5"
    path.write_bytes(digits.path.read_bytes())
    requested = config(teacher, path, "features.dtype=float32", "compute.batch_size=32")
    with pytest.raises(CacheMismatch) as refused:
        extract(requested)
    assert str(refused.value) == (
        f"{path} is another cache: compute.batch_size is 64, not 32; features.dtype is '<f2', not '<f4'. "
        "Move it away, replace it (tspipe cache --force) or write another (--out)."
    )
    assert open_cache(path).id == digits.id
    assert extract(replace(requested, force=True)).train.features.dtype == np.dtype("<f4")


def test_a_feature_beyond_float16_names_the_image_and_the_remedy(teacher: Path, tmp_path: Path) -> None:
    loud = weights.read(teacher)
    head = "classifier.2"  # the hidden layer whose output the features are
    tensors = {**loud.tensors, f"{head}.weight": loud.tensors[f"{head}.weight"] * 1e6}
    path = tmp_path / "loud.h5"
    requested = replace(config(teacher, path), weights=loud._replace(tensors=tensors))
    with pytest.raises(CacheError) as refused:
        extract(requested)
    assert str(refused.value) == (
        "The teacher's features of '0' reach beyond 65,504, the largest float16. "
        "Store them as float32: --set features.dtype=float32"
    )
    assert not path.exists()


def test_a_teacher_of_nan_names_the_image(teacher: Path, tmp_path: Path) -> None:
    broken = weights.read(teacher)
    tensors = {name: value * float("nan") for name, value in broken.tensors.items()}
    with pytest.raises(CacheError) as refused:
        extract(replace(config(teacher, tmp_path / "x.h5"), weights=broken._replace(tensors=tensors)))
    assert str(refused.value) == "The teacher's features of '0' are not numbers. Are its weights sound?"


def test_data_that_changed_between_two_starts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part file goes on only with the images it was begun with."""
    folder = tmp_path / "shapes"
    requested = small(folder)
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract(requested)
    (folder / "train/a/00.png").write_bytes((folder / "train/b/00.png").read_bytes())
    with pytest.raises(CacheMismatch) as refused:
        extract(requested)
    assert str(refused.value).startswith(
        f"{tmp_path}/shapes.h5.part is not of these data: at train index 0, the pixels of 'a/00.png' differ: "
    )


def test_the_teacher_runs_while_a_block_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block is written only when the teacher has begun the second: in one thread that would never be."""
    second, run_teacher, write_block = threading.Event(), forward.run_teacher_on_blocks, CacheWriter.write_block

    def noting(*arguments: Any) -> Any:
        if arguments[4:] == ("train", 1):
            second.set()
        return run_teacher(*arguments)

    def waiting(self: CacheWriter, split: str, block: int, columns: Any) -> None:
        assert second.wait(30)
        write_block(self, split, block, columns)

    monkeypatch.setattr(forward, "run_teacher_on_blocks", noting)
    monkeypatch.setattr(CacheWriter, "write_block", waiting)
    assert extract(small(tmp_path / "shapes")).dimensions.blocks("train") == 4


def test_progress_counts_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says which part the others wait for, on a line of 80 columns."""
    written: list[int] = []
    displayed: list[str] = []
    write_block = CacheWriter.write_block

    def noting(self: CacheWriter, split: str, block: int, columns: Any) -> None:
        write_block(self, split, block, columns)
        written.append(len(columns["labels"]))

    @contextlib.contextmanager
    def progress(what: str, total: int, unit: str, done: int, visible: bool) -> Iterator[Any]:
        assert (total, unit, done, visible) == (24, "images", 0, True)
        advanced = 0

        def advance(count: int, what: str) -> None:
            nonlocal advanced
            advanced += count
            assert advanced == sum(written)
            displayed.append(what)

        yield advance
        assert advanced == 24

    monkeypatch.setattr(CacheWriter, "write_block", noting)
    monkeypatch.setattr("tspipe.extraction.extract.progress", progress)
    extract(small(tmp_path / "shapes"))
    assert all(re.fullmatch("(train|test), (decoding|teacher|writing)-bound", what) for what in displayed)
    line = f"{displayed[0]} {20 * '━'} 1281167/1281167 999 images/s 0:21:22"
    assert len(line) <= 80


def test_a_writer_that_fails_stops_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise CacheError("No room.")

    monkeypatch.setattr(CacheWriter, "write_block", full)
    with pytest.raises(CacheError) as refused:
        extract(small(tmp_path / "shapes"))
    assert str(refused.value) == "No room."


HUNGRY = """
import torch
from torch import nn

class Hungry(nn.Flatten):
    def forward(self, images):
        if len(images) > {most}:
            raise {error}
        return super().forward(images)

def build(num_classes, input_shape):
    c, h, w = input_shape
    return nn.Sequential(Hungry(), nn.Linear(c * h * w, num_classes))
"""
ERRORS = [
    'torch.OutOfMemoryError("CUDA: no room")',
    "MemoryError",
    'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: 9 bytes")',
    'RuntimeError("MPS backend out of memory")',
]


def hungry(folder: Path, most: int, error: str = ERRORS[0]) -> ExtractConfig:
    """A teacher that takes `most` images at once; 16 and 8 images, a block each."""
    (folder / "hungry.py").write_text(HUNGRY.format(most=most, error=error))
    settings = [f"teacher.network={folder}/hungry.py", "compute.block_rows=16"]
    config = small(folder / "shapes", *settings)
    network = networks.build(f"{folder}/hungry.py", 2, (3, 16, 16))
    weights.save(folder / "hungry.safetensors", network, {})
    return replace(config, weights=weights.read(folder / "hungry.safetensors"))


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_names_the_batch_size_that_fits(tmp_path: Path, error: str) -> None:
    requested = hungry(tmp_path, 9, error)
    with pytest.raises(CacheError) as refused:
        extract(requested)
    assert str(refused.value) == (
        "The teacher runs out of memory with batches of 16 images; batches of 8 fit. "
        "Give the command --set compute.batch_size=8"
    )
    again = replace(
        requested, recipe=requested.recipe.model_copy(update={"compute": Compute(batch_size=8, block_rows=16)})
    )
    assert extract(again).manifest["compute"]["batch_size"] == 8


def test_out_of_memory_after_blocks_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part file is of the larger batches, and only its owner deletes it."""
    requested, run_teacher = hungry(tmp_path, 16), forward._run_batches

    def later(teacher: Any, preprocess: Any, size: int, pixels: Any, split: str, block: int) -> Any:
        if split == "test" and size > 4:
            raise torch.OutOfMemoryError("no room")
        return run_teacher(teacher, preprocess, size, pixels, split, block)

    monkeypatch.setattr(forward, "_run_batches", later)
    with pytest.raises(CacheError) as refused:
        extract(requested)
    part = tmp_path / "shapes.h5.part"
    assert str(refused.value) == (
        "The teacher runs out of memory with batches of 8 images; batches of 4 fit. "
        f"Give the command --set compute.batch_size=4 after deleting {part}, which was begun with the larger "
        "batches."
    )
    again = replace(
        requested, recipe=requested.recipe.model_copy(update={"compute": Compute(batch_size=4, block_rows=16)})
    )
    with pytest.raises(CacheMismatch):
        extract(again)
    part.unlink()
    assert extract(again).manifest["compute"]["batch_size"] == 4


def test_not_even_one_image_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested = hungry(tmp_path, 2)
    monkeypatch.setattr(forward, "_run_batches", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(OutOfMemory) as refused:
        extract(requested)
    assert str(refused.value) == (
        "The teacher runs out of memory even with one image at a time. Use a machine with more memory."
    )


def test_any_other_error_of_a_teacher_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        extract(hungry(tmp_path, 9, 'RuntimeError("a bug")'))


def test_cache_names() -> None:
    assert cache_path("cifar10", "resnet56", "resnet56") == Path("cache/cifar10.h5")
    assert cache_path("folder:birds", "torchvision:resnet18", "resnet56") == Path("cache/birds-torchvision-resnet18.h5")
    assert cache_path("cifar10", "./mine.py", "resnet56") == Path("cache/cifar10-mine.h5")
