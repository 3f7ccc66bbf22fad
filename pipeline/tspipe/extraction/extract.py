"""Stage one: every image once through the frozen teacher, into the cache."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tspipe.cache import (
    SPLITS,
    Cache,
    CacheWriter,
    Dimensions,
    Manifest,
    match,
    open_cache,
)
from tspipe.cache.manifest import as_plan
from tspipe.cache.merge import absorb
from tspipe.cache.write import differing
from tspipe.data import random_images, views
from tspipe.data.datasets import Dataset, open_dataset, stem
from tspipe.data.image_loader import input_shape
from tspipe.errors import CacheError, CacheMismatch, OutOfMemory, RecipeError, TspipeError
from tspipe.extraction import blocks as rows
from tspipe.extraction import forward
from tspipe.models import loading, networks, weights
from tspipe.models.feature_net import FeatureNet
from tspipe.models.inference import freeze
from tspipe.models.weights import Weights
from tspipe.recipes.schema import Recipe
from tspipe.utils.device import pick_device, use_full_precision
from tspipe.utils.distributed import ALONE, Group
from tspipe.utils.memory import keep_freed_memory
from tspipe.utils.progress import Advance, progress, stderr_console
from tspipe.utils.threads import TimeBreakdown, background_writer

_DTYPES = {"float16": "<f2", "float32": "<f4"}


@dataclass(frozen=True)
class ExtractConfig:
    """What `tspipe cache` was asked for."""

    recipe: Recipe
    weights: Weights
    out: Path
    data: Path | None = None
    force: bool = False
    download: bool = False
    images: bool = False  # keep the preprocessed pixels, so that stage two needs no dataset
    random_pool: int = 0  # random images to label, too, so that stage two needs no teacher


def cache_path(dataset: str, teacher: str, usual: str) -> Path:
    """`cache/<dataset>.h5` for the usual teacher, that of the recipe, `cache/<dataset>-<teacher>.h5` for another."""
    other = "" if teacher == usual else f"-{networks.recorded_name(teacher).replace(':', '-')}"
    return Path("cache") / f"{stem(dataset)}{other}.h5"


def extract(config: ExtractConfig, group: Group = ALONE) -> Cache | None:
    """Write the cache, or go on with one that was begun; gives it opened, on rank 0; None on the others of a group.

    A finished file of the same settings and data is left as it is. The ranks of a group share the blocks that are
    missing; the file is the same with any number of them, and another number goes on with what a killed one left.
    Raises CacheMismatch when the name is taken by another cache and `force` is not set, CacheBusy when another
    process writes it.
    """
    with group.rank_zero_first():
        job = _prepare(config)
    if group.rank:
        _help(job, group)
        return None
    return _lead(job, group)


@dataclass(frozen=True)
class Job:
    """What is to be written, and what for: every process makes it ready for itself."""

    config: ExtractConfig
    dataset: Dataset
    teacher: FeatureNet
    weights: bytes  # the teacher's
    plan: Manifest
    dimensions: Dimensions

    def writer(self, rank: int = 0) -> CacheWriter:
        """What writes it, or this rank's part of it."""
        classes = self.dataset.train.classes
        return CacheWriter(self.config.out, self.plan, self.dimensions, classes, self.weights, rank)


def _prepare(config: ExtractConfig) -> Job:
    recipe, name = config.recipe, config.recipe.teacher.network
    if config.images and recipe.views.count and recipe.preprocess.crop:
        raise RecipeError(
            "--images keeps pixels that are cropped, and the crop takes away what views need. Leave out --images, the "
            "views (--set views.count=0), or the crop (--set preprocess.crop=none)."
        )
    dataset = open_dataset(recipe.dataset, config.data, download=config.download)
    device = pick_device(recipe.compute.device)
    use_full_precision()
    keep_freed_memory()

    shape, classes = input_shape(dataset.train, recipe.preprocess), len(dataset.train.classes)
    spec = loading.NetworkSpec(name, classes, shape, recipe.teacher.options)
    module, options = loading.load_network(spec, config.weights.tensors, config.weights.source)
    options["input_shape"] = list(shape)
    stored = weights.canonical_bytes(module)
    teacher = freeze(module, name, shape, device)
    plan = _plan(config, dataset, options, teacher.width, device, hashlib.sha256(stored).hexdigest())
    dimensions = _dimensions(plan, dataset, len(stored), (*shape[1:], shape[0]) if config.images else None)
    return Job(config, dataset, teacher, stored, plan, dimensions)


def _lead(job: Job, group: Group) -> Cache:
    """What rank 0 does: say which blocks are missing, compute its share, and make one file of all."""
    out = job.config.out
    if out.exists() and not job.config.force:
        cache = _finished(job.config, job.plan, job.dataset)
        group.broadcast(None)
        return cache
    if pool := job.plan["random"]:
        shape = tuple(job.plan["teacher"]["options"]["input_shape"])
        if said := random_images.spent(pool["generator"], pool["rows"], "The pool", shape):
            stderr_console.print(said)
    with job.writer(0) as writer:
        _absorb(writer, job.dataset)
        missing = {split: writer.missing(split) for split in job.dimensions.sections}
        group.broadcast((job.plan, missing))
        _write_share(writer, job, missing, group)
        group.barrier()
        if group.size > 1:
            _absorb(writer, job.dataset, group.size)
        writer.finish()
    group.barrier()
    return open_cache(out)


def _help(job: Job, group: Group) -> None:
    """What every other rank does: compute its share into a part file of its own."""
    told: tuple[Manifest, dict[str, list[int]]] | None = group.broadcast(None)
    if told is None:
        return
    plan, missing = told
    if differences := list(differing(plan, job.plan)):
        raise CacheMismatch(
            f"Rank {group.rank} would write another cache than rank 0: {'; '.join(differences[:3])}. "
            "All machines of a job need the same data, settings and kind of device."
        )
    with job.writer(group.rank) as writer:
        _write_share(writer, job, missing, group)
        writer.sync()
    group.barrier()
    group.barrier()  # rank 0 has finished: only then is the job done


def _absorb(writer: CacheWriter, dataset: Dataset, ranks: int = 1) -> None:
    """Take in what other ranks wrote, and check that all there is now is of this dataset."""
    absorb(writer, ranks)
    for split in SPLITS:
        match.match_split(
            str(writer.part), split, writer.split(split), dataset.split(split), rows=writer.written(split)
        )


def _write_share(writer: CacheWriter, job: Job, missing: dict[str, list[int]], group: Group) -> None:
    """Compute and write this rank's share of the missing blocks; rank 0 shows how far all of them have come."""
    sizes, mine = job.dimensions, {split: blocks[group.rank :: group.size] for split, blocks in missing.items()}
    total = sum(sizes.images(split) * sizes.views_of(split) for split in missing)
    left, share = (sum(len(sizes.block(s, n)) * sizes.views_of(s) for s in of for n in of[s]) for of in (missing, mine))
    done = 0

    def shown(advance: Advance, count: int, what: str) -> None:
        nonlocal done
        before, done = done, done + count
        advance(left * done // share - left * before // share, what)  # the others come as far in the same time

    try:
        unit = "views" if sizes.views else "images"
        with progress("teacher", total, unit, total - left) if not group.rank else nullcontext(_silent) as advance:
            write_rows(writer, job, mine, partial(shown, advance))
    except OutOfMemory as problem:
        begun = group.size > 1 or any(len(writer.written(split)) for split in missing)
        raise _smaller(problem, writer, begun) from problem


def _silent(count: int, what: str) -> None:
    """Progress that nobody sees."""


def write_rows(writer: CacheWriter, job: Job, blocks: Mapping[str, Sequence[int]], advance: Advance) -> None:
    """Compute and write these blocks, by split: decoding goes on ahead of the teacher, writing behind it."""
    recipe, spent = job.config.recipe, TimeBreakdown()

    def write(split: str, number: int, block: rows.Block, features: Any, logits: Any) -> None:
        writer.write_block(split, number, {"features": features, "logits": logits, **block.columns})
        advance(len(features), f"{split}, {spent.most}-bound")

    with background_writer() as do:
        for split, numbers in blocks.items():
            ranges = [job.dimensions.block(split, number) for number in numbers]
            found = rows.of_section(split, job.dataset, recipe.preprocess, job.plan, ranges)
            for number, block in zip(numbers, spent.waiting("decoding", found), strict=True):
                with spent.on("teacher"):
                    features, logits = forward.run_teacher_on_blocks(
                        job.teacher, recipe.preprocess, recipe.compute.batch_size, block.given, split, number
                    )
                _check_features(features, block.keys, recipe)
                with spent.on("writing"):
                    do(partial(write, split, number, block, features, logits))


def _smaller(problem: OutOfMemory, writer: CacheWriter, begun: bool) -> TspipeError:
    """The command that goes on where memory ran out; a part file not begun is of no use to it, and removed."""
    if not problem.fits:
        return problem
    remedy = f"{problem} Give the command --set compute.batch_size={problem.fits}"
    if begun:
        part = writer.path.with_name(writer.path.name + ".part")
        return CacheError(f"{remedy} after deleting {part}, which was begun with the larger batches.")
    writer.part.unlink()
    return CacheError(remedy)


def _check_features(features: NDArray[np.float32], keys: NDArray[np.bytes_], recipe: Recipe) -> None:
    largest = float(np.finfo(recipe.features.dtype).max)
    bad = np.flatnonzero(~(np.abs(features) <= largest).all(axis=1))
    if not len(bad):
        return
    key = keys[bad[0] * len(keys) // len(features)].decode()  # an image may have several views
    if np.isfinite(features[bad[0]]).all():
        raise CacheError(
            f"The teacher's features of {key!r} reach beyond {largest:,.0f}, the largest float16. "
            "Store them as float32: --set features.dtype=float32"
        )
    raise CacheError(f"The teacher's features of {key!r} are not numbers. Are its weights sound?")


def _plan(
    config: ExtractConfig,
    dataset: Dataset,
    options: dict[str, Any],
    width: int,
    device: torch.device,
    weights_sha256: str,
) -> Manifest:
    recipe = config.recipe
    return {
        "block_rows": recipe.compute.block_rows,
        "compute": {"batch_size": recipe.compute.batch_size, "device": device.type, "precision": "float32"},
        "dataset": {
            "classes": len(dataset.train.classes),
            "fingerprint": None,
            "license": dataset.licence,
            "name": dataset.name,
            "rows": {split: len(dataset.split(split)) for split in SPLITS},
        },
        "features": {"dtype": _DTYPES[recipe.features.dtype], "width": width},
        "preprocess": recipe.preprocess.as_dict(),
        "random": random_images.described(config.random_pool, recipe.random_generator) if config.random_pool else None,
        "teacher": {
            "correct": None,
            "file_sha256": config.weights.sha256,
            "network": networks.recorded_name(recipe.teacher.network),
            "options": options,
            "weights_sha256": weights_sha256,
        },
        "views": views.described(recipe.views),
    }


def _dimensions(
    plan: Manifest, dataset: Dataset, weights_bytes: int, image_shape: tuple[int, int, int] | None
) -> Dimensions:
    return Dimensions(
        rows=plan["dataset"]["rows"],
        width=plan["features"]["width"],
        classes=plan["dataset"]["classes"],
        feature_dtype=plan["features"]["dtype"],
        block_rows=plan["block_rows"],
        class_bytes=_longest(dataset.train.classes),
        key_bytes={split: _longest(dataset.split(split).keys) for split in SPLITS},
        weights_bytes=weights_bytes,
        views=plan["views"] and plan["views"]["count"],
        image_shape=image_shape,
        random_rows=plan["random"] and plan["random"]["rows"],
    )


def _longest(texts: Any) -> int:
    return max(1, *(len(text.encode()) for text in texts))


def _finished(config: ExtractConfig, plan: Manifest, dataset: Dataset) -> Cache:
    """The finished cache of this name, if it is what would be written."""
    path = config.out
    cache = open_cache(path)
    there, here = (
        {**manifest, "images": images}
        for manifest, images in ((as_plan(cache.manifest), cache.has_images), (plan, config.images))
    )
    if differences := list(differing(there, here)):
        raise CacheMismatch(
            f"{path} is another cache: {'; '.join(differences[:3])}. Move it away, replace it (tspipe cache --force) "
            "or write another (--out)."
        )
    match.match_classes(str(path), cache.classes, dataset.train.classes)
    for split in SPLITS:
        match.match_split(str(path), split, cache.split(split), dataset.split(split))
    return cache
