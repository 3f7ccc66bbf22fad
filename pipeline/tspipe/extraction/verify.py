"""Comparison of a cache with its dataset and its teacher, and repair of damaged bytes."""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tspipe.cache import Cache, match
from tspipe.cache.repair import Repair
from tspipe.cache.verify import Damage, explain
from tspipe.data.datasets import Dataset
from tspipe.data.image_loader import input_shape, open_images, read
from tspipe.data.local import open_dataset_of, open_unlabelled
from tspipe.data.preprocess import Preprocess
from tspipe.errors import CacheDamaged, CacheError, CacheMismatch, DatasetError
from tspipe.extraction import forward
from tspipe.extraction.blocks import Block, split_blocks
from tspipe.extraction.pool_blocks import PoolBlocks
from tspipe.models import loading, weights
from tspipe.models.feature_net import FeatureNet
from tspipe.models.teacher import ROUNDING, draws_at_random, load_teacher, teacher_spec
from tspipe.models.weights import Weights
from tspipe.recipes.schema import Recipe
from tspipe.utils.console import plain_table, stdout_console
from tspipe.utils.device import pick_device, use_full_precision
from tspipe.utils.progress import progress

_TEACHER_COLUMNS = {"features", "logits", "candidates"}  # those that the teacher determines


@dataclass(frozen=True)
class VerifyConfig:
    """What to compare a cache with: the recipe's dataset in `root`, and the teacher in the cache or in `weights`."""

    recipe: Recipe
    root: Path | None = None
    weights: Weights | None = None
    unlabelled: Path | None = None

    def dataset(self, cache: Cache) -> Dataset:
        """Open the local dataset of a cache."""
        dataset = open_dataset_of(cache, self.recipe.dataset, self.root)
        if cache.unlabelled is None or self.unlabelled is None:
            return dataset
        return replace(dataset, unlabelled=open_unlabelled(cache, self.unlabelled, trust=True))


def match_data(cache: Cache, config: VerifyConfig) -> int:
    """Compare classes, keys, labels and the pixels of every image with the local dataset; return their number.

    Raises CacheMismatch naming the first image that differs.
    """
    dataset = config.dataset(cache)
    total = sum(len(cache.split(split)) for split in dataset.splits)
    with progress("comparing", total, "images") as advance:
        match.match_dataset(
            cache.path.name, cache, dataset, sample=None, advance=lambda count: advance(count, "comparing")
        )
    return total


class Difference(NamedTuple):
    """How far each row (n,) of a column is from the teacher's present output."""

    largest: NDArray[np.float64]
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]  # the row's largest absolute value

    @classmethod
    def between(cls, stored: NDArray[np.floating], computed: NDArray[np.floating]) -> "Difference":
        """Return the difference of two arrays (n, d)."""
        differences = np.abs(stored.astype(np.float64) - computed)
        return cls(differences.max(1), differences.mean(1), np.abs(stored).max(1).astype(np.float64))

    def beyond_rounding(self) -> NDArray[np.bool_]:
        """Return which rows differ by more than rounding, or are not finite."""
        close: NDArray[np.bool_] = self.largest <= ROUNDING * self.scale.max()
        return ~close


class Agreement(NamedTuple):
    """The teacher's present output for random images, compared with the file."""

    features: Difference
    logits: Difference
    changed: NDArray[np.bool_]  # (n,), images whose argmax differs

    @property
    def differing(self) -> int:
        """The images whose features or logits differ by more than rounding."""
        return int((self.features.beyond_rounding() | self.logits.beyond_rounding()).sum())


def compare_teacher(cache: Cache, config: VerifyConfig, count: int) -> Agreement:
    """Run the teacher again on images chosen at random, with the pixels in the file or else of the local dataset.

    They are chosen from all splits whose images are available, and the random pool. Of an image with views, the first,
    unchanged one is compared.
    """
    dataset, preprocess = open_images(cache, lambda: config.dataset(cache))
    device = pick_device(config.recipe.device)
    teacher = open_teacher(cache, config, dataset, preprocess, device)
    sizes, batch_size = cache.dimensions, cache.manifest["compute"]["batch_size"]
    sections = [split for split in sizes.sections if split == "random" or split in dataset.splits]
    ends = np.cumsum([sizes.images(split) for split in sections]).tolist()
    chosen = np.random.default_rng().choice(ends[-1], min(count, ends[-1]), replace=False)
    features, logits, changed = [], [], []
    for split, first, end in zip(sections, [0, *ends[:-1]], ends, strict=True):
        indices = np.sort(chosen[(chosen >= first) & (chosen < end)]) - first
        stored = cache.random if split == "random" else cache.split(split)
        assert stored is not None
        read_pixels = _pixel_reader(split, cache, dataset, preprocess)
        with progress(f"teacher, {split}", len(indices), "images") as advance:
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                pixels = np.stack([read_pixels(int(i)) for i in batch])
                computed = forward.run_teacher_on_blocks(teacher, preprocess, len(batch), pixels, split, 0)
                rows = batch * sizes.views_of(split)
                stored_logits = stored.logits.take(rows)
                features.append(Difference.between(stored.features.take(rows), computed[0]))
                logits.append(Difference.between(stored_logits, computed[1]))
                changed.append(stored_logits.argmax(1) != computed[1].argmax(1))
                advance(len(batch), f"teacher, {split}")
    agreement = Agreement(_join(features), _join(logits), np.concatenate(changed))
    if agreement.differing:
        last = preprocess.normalise(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2))
        if draws_at_random(teacher, last):
            raise CacheError(
                f"{cache.path}: its teacher gives other features each time it runs, as one with dropout always on "
                "does, so it cannot be compared with the file. Leave out --teacher."
            )
    return agreement


def _join(parts: list[Difference]) -> Difference:
    return Difference(*map(np.concatenate, zip(*parts, strict=True)))


def _pixel_reader(split: str, cache: Cache, dataset: Dataset, preprocess: Preprocess) -> Callable[[int], NDArray[Any]]:
    """Return a function from an image's index in a split, or in the random pool, to its pixels (H, W, C)."""
    if split == "random":
        pool = _pool(cache, dataset, preprocess).open()
        return lambda i: pool.take(i, 1)[0].transpose(1, 2, 0)
    images = dataset.split(split)
    return lambda i: read(images, preprocess, i)[1]


def _pool(cache: Cache, dataset: Dataset, preprocess: Preprocess, teacher: FeatureNet | None = None) -> PoolBlocks:
    """Return the random pool of a cache; with a teacher, its candidates are chosen again."""
    assert cache.random is not None
    stored = None if teacher is not None or cache.random.candidates is None else cache.random.candidates.load()
    return PoolBlocks(cache.manifest, dataset.train, preprocess, teacher, stored)


def show(agreement: Agreement) -> None:
    """Print the agreement as a table; raise CacheMismatch if any image differs by more than rounding."""
    table, count = plain_table(("difference",), ("largest", "mean", "largest, relative")), len(agreement.changed)
    for name, part in (("features", agreement.features), ("logits", agreement.logits)):
        largest, scale = part.largest.max(), part.scale.max()
        relative = largest / scale if scale else 0.0
        table.add_row(name, f"{largest:.2g}", f"{part.mean.mean():.2g}", f"{relative:.1e}")
    out = stdout_console()
    out.print(f"The teacher, run again on {count:,} random images, against the file:")
    out.print(table)
    out.print(f"Changed argmax: {agreement.changed.sum():,} of {count:,}")
    if agreement.differing:
        raise CacheMismatch(
            f"The teacher gives other features or logits than the file holds for {agreement.differing:,} of {count:,} "
            "images, by more than rounding. Other images or other code of its network may be why: tspipe verify --data"
        )


def repair(path: Path, damage: list[Damage], config: VerifyConfig) -> None:
    """Restore the original bytes: first those that the rest of the file determines, then those to compute again.

    Raises CacheDamaged if bytes cannot be restored, CacheMismatch if the computed bytes are not those that were
    written; those are then left unchanged.
    """
    if not all(part.repairable for part in damage):
        raise CacheDamaged(explain(path, damage))
    with Repair(path) as file:
        for part in [part for part in damage if part.data is not None]:
            file.known(part)
        left = [part for part in damage if part.data is None]
        names = {part.dataset for part in left}
        if "teacher_weights" in names:
            file.weights(_given_weights(file.cache, config))
        if blocks := _damaged_blocks(file.cache, left):
            _repair_blocks(file, blocks, config)
        if "classes" in names and not file.classes(config.dataset(file.cache).train.classes):
            raise CacheMismatch(f"{path}: its classes cannot be restored, because the dataset has other classes.")


def _damaged_blocks(cache: Cache, damage: list[Damage]) -> dict[tuple[str, int], set[str]]:
    """Return the damaged columns of each (split, block)."""
    damaged: dict[tuple[str, int], set[str]] = defaultdict(set)
    sizes = cache.dimensions
    for part in damage:
        split, _, column = part.dataset.partition("_")
        if split not in sizes.sections:
            continue
        for block in range(sizes.blocks(split)):
            if sizes.column_rows(split, column, sizes.block(split, block)).start in part.rows:
                damaged[split, block].add(column)
    return damaged


def _repair_blocks(file: Repair, blocks: dict[tuple[str, int], set[str]], config: VerifyConfig) -> None:
    cache, dataset = file.cache, config.dataset(file.cache)
    preprocess, compute = Preprocess.from_dict(cache.manifest["preprocess"]), cache.manifest["compute"]
    teacher = None
    if any(columns & _TEACHER_COLUMNS for columns in blocks.values()):
        use_full_precision()
        teacher = open_teacher(cache, config, dataset, preprocess, pick_device(compute["device"]))
    with progress("repairing", len(blocks), "blocks") as advance:
        for split in dict.fromkeys(split for split, _ in blocks):
            numbers = sorted(number for section, number in blocks if section == split)
            ranges = [cache.dimensions.block(split, block) for block in numbers]
            if split not in (*dataset.splits, "random"):
                raise CacheError(f"{file.path}: its {split} images are needed. Give their folder: --unlabelled FOLDER")
            if split != "random" and ranges[-1].stop > len(dataset.split(split)):
                raise CacheMismatch(f"{file.path} has more {split} images than the dataset, which is another one.")
            if split == "random":
                lost = any("candidates" in columns for (section, _), columns in blocks.items() if section == split)
                restored = _pool(cache, dataset, preprocess, teacher if lost else None).blocks(ranges)
            else:
                restored = split_blocks(split, dataset, preprocess, cache.manifest, ranges)
            for number, block in zip(numbers, restored, strict=True):
                if block.broken:
                    raise DatasetError(block.broken[0])
                columns = block.columns
                if teacher is not None and blocks[split, number] & _TEACHER_COLUMNS:
                    features, logits = forward.run_teacher_on_blocks(
                        teacher, preprocess, compute["batch_size"], block.teacher_input, split, number
                    )
                    columns |= {"features": features, "logits": logits}
                wrong = file.block(split, number, {name: columns[name] for name in blocks[split, number]})
                if wrong:
                    raise CacheMismatch(_mismatch_message(file.path, split, block, wrong))
                advance(1, "repairing")


def _mismatch_message(path: Path, split: str, block: Block, wrong: list[str]) -> str:
    rounding = "this processor or PyTorch rounds differently. Get the file again."
    why = f"Either the images differ (tspipe verify --data), or {rounding}" if split != "random" else f"T{rounding[1:]}"
    return (
        f"{path}: {split} images {block.indices.start:,} to {block.indices.stop - 1:,} give other "
        f"{' and '.join(sorted(wrong))} here than were written, so these are left as they are. {why}"
    )


def open_teacher(
    cache: Cache, config: VerifyConfig, dataset: Dataset, preprocess: Preprocess, device: torch.device
) -> FeatureNet:
    """Load the teacher in the cache, else the one in `--weights`, for the images of this dataset."""
    shape = input_shape(dataset.train, preprocess)
    data = None if cache.has_teacher else _given_weights(cache, config)
    return load_teacher(cache, config.recipe, shape, device, data)


def _given_weights(cache: Cache, config: VerifyConfig) -> bytes:
    """Return the weights in `--weights` in the cache's form; raise CacheMismatch if they are not the cache's."""
    stored = cache.manifest["teacher"]
    if config.weights is None:
        raise CacheError(
            f"{cache.path}: its teacher's weights are needed. Give the file they came from, SHA-256 "
            f"{stored['file_sha256'][:12]}…: --weights FILE"
        )
    spec = teacher_spec(cache, config.recipe, tuple(stored["options"]["input_shape"]))
    module, _ = loading.load_network(spec, config.weights.tensors, config.weights.source)
    data = weights.canonical_bytes(module)
    if hashlib.sha256(data).hexdigest() != stored["weights_sha256"]:
        raise CacheMismatch(f"{config.weights.source} is not what {cache.path.name} was made with.")
    return data
