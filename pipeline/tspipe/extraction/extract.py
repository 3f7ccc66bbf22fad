"""Stage one: every image once through the frozen teacher, into the cache."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tspipe.cache import Cache, CacheWriter, Dimensions, Manifest, match, open_cache
from tspipe.cache.layout import FEATURE_DTYPES
from tspipe.cache.manifest import as_plan, describe_differences
from tspipe.cache.merge import absorb
from tspipe.cache.read import read_keys
from tspipe.data import views
from tspipe.data.datasets import Dataset, open_dataset, stem
from tspipe.data.image_loader import input_shape
from tspipe.data.local import add_unlabelled
from tspipe.data.random_images.minstd import period_warning
from tspipe.errors import CacheError, CacheMismatch, OutOfMemory, RecipeError, TspipeError
from tspipe.extraction import broken, forward, view_cost
from tspipe.extraction.blocks import Block, split_blocks
from tspipe.extraction.pool_blocks import PoolBlocks, pool_section
from tspipe.extraction.portable import check_program, export_program
from tspipe.models import loading, networks, weights
from tspipe.models.feature_net import FeatureNet
from tspipe.models.inference import freeze
from tspipe.models.teacher import accuracy_warning
from tspipe.models.weights import Weights
from tspipe.recipes.schema import Recipe
from tspipe.utils.device import pick_device, use_full_precision
from tspipe.utils.distributed import ALONE, Group
from tspipe.utils.files import remove_stale_lock
from tspipe.utils.memory import keep_freed_memory
from tspipe.utils.progress import Advance, progress, warn
from tspipe.utils.threads import TimeBreakdown, background_writer


@dataclass(frozen=True)
class Contents:
    """What the file holds beyond the teacher's output for the dataset, and its weights.

    Attributes:
        images: the preprocessed pixels, so that stage two needs no dataset.
        random_pool: the number of labelled random images, so that stage two needs no teacher.
        unlabelled: the folder of more images, without labels; None for none.
        portable_teacher: the teacher's program, so that its network's file is not needed.
    """

    images: bool = False
    random_pool: int = 0
    unlabelled: Path | None = None
    portable_teacher: bool = False


@dataclass(frozen=True)
class ExtractConfig:
    """The settings of `tspipe cache`."""

    recipe: Recipe
    weights: Weights
    out: Path
    data: Path | None = None
    contents: Contents = Contents()
    force: bool = False
    download: bool = False
    skip_broken: bool = False  # leave out images that cannot be decoded


def cache_path(dataset: str, teacher: str, default_teacher: str) -> Path:
    """Return `cache/<dataset>.h5` for the recipe's default teacher, `cache/<dataset>-<teacher>.h5` for another."""
    suffix = "" if teacher == default_teacher else f"-{networks.file_stem(teacher)}"
    return Path("cache") / f"{stem(dataset)}{suffix}.h5"


def extract(config: ExtractConfig, group: Group = ALONE) -> Cache | None:
    """Write the cache, or resume one that was begun. Return it opened on rank 0, and None on the others of a group.

    A finished file of the same settings and data is left unchanged. The ranks of a group share the missing blocks.
    The file is the same with any number of ranks, and another number of ranks can resume it.
    Raises CacheMismatch when another cache has the name and `force` is not set, CacheBusy when another process
    writes it.
    """
    job = _prepare(config, group)
    if group.rank:
        _write_part(job, group)
        return None
    cache = _write_cache(job, group)
    for warning in filter(None, (accuracy_warning(cache), leak_warning(cache))):
        warn(warning)
    return cache


def leak_warning(cache: Cache) -> str | None:
    """Return a warning if images without labels are test images."""
    if cache.unlabelled is None:
        return None
    if not (shared := match.shared_images(cache.unlabelled, cache.test)).any():
        return None
    key = read_keys(cache.unlabelled)[int(shared.argmax())]
    return (
        f"{shared.sum():,} of the images without labels are test images, the first {key!r}: students that train on "
        "them know the test set. Remove them from the folder."
    )


@dataclass(frozen=True)
class Job:
    """What to write and what to compute it with. Every process prepares its own."""

    config: ExtractConfig
    dataset: Dataset
    teacher: FeatureNet
    weights: bytes  # the teacher's
    program: bytes  # the teacher's, or empty
    plan: Manifest
    dimensions: Dimensions

    def writer(self, rank: int = 0) -> CacheWriter:
        """Return the writer of the cache, or of another rank's part file."""
        classes = self.dataset.train.classes
        return CacheWriter(self.config.out, self.plan, self.dimensions, classes, self.weights, rank, self.program)


def _prepare(config: ExtractConfig, group: Group = ALONE) -> Job:
    recipe, out = config.recipe, config.out
    if config.contents.images and recipe.views.count and recipe.preprocess.crop:
        raise RecipeError(
            "--images keeps pixels that are cropped, and the crop takes away what views need. Leave out --images, the "
            "views (--set views.count=0), or the crop (--set preprocess.crop=none)."
        )
    left_out: dict[str, dict[int, str]] = {}
    with group.rank_zero_first():
        dataset = open_dataset(recipe.dataset, config.data, download=config.download, split=recipe.split)
        if config.contents.unlabelled:
            dataset = add_unlabelled(dataset, config.contents.unlabelled, recipe.preprocess)
        if not group.rank:
            finished = open_cache(out) if out.exists() and not config.force else None
            left_out = broken.find(dataset, finished, config.skip_broken)
            broken.report(left_out)
    dataset = dataset.without(group.broadcast(left_out))
    with group.rank_zero_first():
        return _job(config, dataset)


def _job(config: ExtractConfig, dataset: Dataset) -> Job:
    recipe, name = config.recipe, config.recipe.teacher.network
    device = pick_device(recipe.compute.device)
    use_full_precision()
    keep_freed_memory()

    if not recipe.teacher.any_classes:
        weights.check_classes(config.weights, dataset.train.classes, recipe.dataset)
    channels, height, width = input_shape(dataset.train, recipe.preprocess)
    shape = channels, height, width
    spec = loading.NetworkSpec(name, len(dataset.train.classes), shape, recipe.teacher.options)
    given = config.weights
    module, options = loading.load_network(spec, given.tensors, given.source, given.sha256)
    stored = weights.canonical_bytes(module)
    program = export_program(module, name, shape) if config.contents.portable_teacher else b""
    teacher = freeze(module, name, shape, device)
    if program:
        check_program(program, stored, teacher, dataset.train, recipe.preprocess)
    plan = _plan(config, dataset, teacher, {**options, "input_shape": list(shape)}, hashlib.sha256(stored).hexdigest())
    plan["teacher"] |= {"program_sha256": hashlib.sha256(program).hexdigest()} if program else {}
    dimensions = Dimensions(
        rows=plan["dataset"]["rows"],
        width=teacher.width,
        classes=spec.num_classes,
        feature_dtype=plan["features"]["dtype"],
        block_rows=recipe.compute.block_rows,
        class_bytes=_longest(dataset.train.classes),
        key_bytes={split: _longest(dataset.split(split).keys) for split in dataset.splits},
        weights_bytes=len(stored),
        views=plan["views"] and plan["views"]["count"],
        image_shape=(height, width, channels) if config.contents.images else None,
        random_rows=config.contents.random_pool or None,
        program_bytes=len(program),
        balanced=config.contents.random_pool > 0 and recipe.random_balanced,
    )
    return Job(config, dataset, teacher, stored, program, plan, dimensions)


def _longest(texts: Sequence[str]) -> int:
    return max(1, *(len(text.encode()) for text in texts))


def _plan(
    config: ExtractConfig, dataset: Dataset, teacher: FeatureNet, options: dict[str, Any], weights_sha256: str
) -> Manifest:
    """Return the manifest of the unfinished cache."""
    recipe, device = config.recipe, teacher.head.weight.device.type
    return {
        "block_rows": recipe.compute.block_rows,
        "compute": {"batch_size": recipe.compute.batch_size, "device": device, "precision": "float32"},
        "dataset": {
            "classes": len(dataset.train.classes),
            "fingerprint": None,
            "license": dataset.licence,
            "name": dataset.name,
            "rows": {split: len(dataset.split(split)) for split in dataset.splits},
            **({"split": recipe.split.model_dump()} if recipe.split.fraction else {}),
        },
        "features": {"dtype": FEATURE_DTYPES[recipe.features.dtype], "width": teacher.width},
        "preprocess": recipe.preprocess.as_dict(),
        "random": pool_section(config.contents.random_pool, recipe),
        "teacher": {
            "correct": None,
            **({"library": library} if (library := networks.library(recipe.teacher.network)) else {}),
            "file_sha256": config.weights.sha256,
            "network": networks.recorded_name(recipe.teacher.network),
            "options": options,
            "weights_sha256": weights_sha256,
        },
        "views": views.manifest_section(recipe.views),
    }


def _write_cache(job: Job, group: Group) -> Cache:
    """On rank 0, announce the missing blocks, compute its share, and merge all ranks' parts into one file."""
    out = job.config.out
    if out.exists() and not job.config.force:
        remove_stale_lock(out)
        cache = _finished_cache(job)
        group.broadcast(None)
        return cache
    if random := job.plan["random"]:
        shape = tuple(job.plan["teacher"]["options"]["input_shape"])
        if warning := period_warning(random["generator"], random["rows"], "The pool", shape):
            warn(warning)
    with job.writer() as writer:
        _absorb(writer, job.dataset)
        missing = {split: writer.missing(split) for split in job.dimensions.sections}
        group.broadcast((job.plan, missing))
        problems = group.gather(_write_share(writer, job, missing, group))
        if any(problems):
            raise broken.error([problem for of_rank in problems for problem in of_rank])
        if group.size > 1:
            _absorb(writer, job.dataset, group.size)
        writer.finish()
    group.barrier()
    return open_cache(out)


def _write_part(job: Job, group: Group) -> None:
    """On every other rank, compute its share of the missing blocks into a part file."""
    announced: tuple[Manifest, dict[str, list[int]]] | None = group.broadcast(None)
    if announced is None:
        return
    plan, missing = announced
    if differences := describe_differences(job.plan, plan):
        raise CacheMismatch(
            f"Rank {group.rank} would write another cache than rank 0: {differences}. "
            "All machines of a job need the same data, settings and kind of device."
        )
    with job.writer(group.rank) as writer:
        problems = _write_share(writer, job, missing, group)
        writer.sync()
    group.gather(problems)
    group.barrier()  # rank 0 has finished the file


def _finished_cache(job: Job) -> Cache:
    """Return the finished cache of this name; raise CacheMismatch if it is not the one that would be written."""
    path = job.config.out
    cache = open_cache(path)
    stored = {**as_plan(cache.manifest), "images": cache.has_images}
    if differences := describe_differences(stored, {**job.plan, "images": job.config.contents.images}):
        raise CacheMismatch(
            f"{path} is another cache: {differences}. Move it away, replace it (tspipe cache --force) "
            "or write another (--out)."
        )
    match.match_dataset(str(path), cache, job.dataset)
    return cache


def _absorb(writer: CacheWriter, dataset: Dataset, ranks: int = 1) -> None:
    """Merge what other ranks wrote, and check that all rows now present belong to this dataset."""
    absorb(writer, ranks, dataset.split)
    for split in dataset.splits:
        rows = writer.written(split)
        match.match_split(str(writer.part), split, writer.split(split), dataset.split(split), rows=rows)


def _write_share(writer: CacheWriter, job: Job, missing: dict[str, list[int]], group: Group) -> list[str]:
    """Compute and write this rank's share of the missing blocks; rank 0 shows the progress of all ranks.

    Blocks with images that cannot be decoded stay missing. Returns what is wrong with these images.
    """
    sizes, local = job.dimensions, {split: blocks[group.rank :: group.size] for split, blocks in missing.items()}
    total = sum(sizes.images(split) * sizes.views_of(split) for split in missing)
    all_left, local_left = (
        sum(len(sizes.block(split, n)) * sizes.views_of(split) for split in blocks for n in blocks[split])
        for blocks in (missing, local)
    )
    with progress("teacher", total, "views" if sizes.views else "images", total - all_left, not group.rank) as advance:
        try:
            if sizes.views and missing["train"] and not group.rank:
                shape = tuple(job.plan["teacher"]["options"]["input_shape"])
                warn(view_cost.describe(sizes, job.teacher, job.config.recipe.preprocess, shape))
            # the progress assumes that all ranks are equally fast
            return write_rows(writer, job, local, lambda count, what: advance(count * all_left / local_left, what))
        except OutOfMemory as error:
            begun = group.size > 1 or any(len(writer.written(split)) for split in missing)
            raise _with_remedy(error, writer, begun) from error


def write_rows(writer: CacheWriter, job: Job, blocks: Mapping[str, Sequence[int]], advance: Advance) -> list[str]:
    """Compute and write these blocks, by split. Threads decode ahead of the teacher and write behind it.

    Returns what is wrong with images that cannot be decoded, whose blocks are not written.
    """
    recipe, times, problems = job.config.recipe, TimeBreakdown(), list[str]()
    pool = PoolBlocks(job.plan, job.dataset.train, recipe.preprocess, job.teacher)

    def write(split: str, number: int, block: Block, features: Any, logits: Any) -> None:
        writer.write_block(split, number, {"features": features, "logits": logits, **block.columns})
        advance(len(features), f"{split}, {times.longest}-bound")

    with background_writer() as submit:
        for split, numbers in blocks.items():
            ranges = [job.dimensions.block(split, number) for number in numbers]
            if split == "random":
                decoded = pool.blocks(ranges)
            else:
                decoded = split_blocks(split, job.dataset, recipe.preprocess, job.plan, ranges)
            for number, block in zip(numbers, times.iterate("decoding", decoded), strict=True):
                if block.broken:
                    problems += block.broken
                    continue
                with times.measure("teacher"):
                    features, logits = forward.run_teacher_on_blocks(
                        job.teacher, recipe.preprocess, recipe.compute.batch_size, block.teacher_input, split, number
                    )
                _check_features(features, block.keys, recipe)
                with times.measure("writing"):
                    submit(partial(write, split, number, block, features, logits))
    for sentence in pool.balance_report():
        warn(sentence)
    return problems


def _with_remedy(error: OutOfMemory, writer: CacheWriter, begun: bool) -> TspipeError:
    """Return the error with the command that resumes; a part file without rows is removed."""
    if not error.fits:
        return error
    remedy = f"{error} Give the command --set compute.batch_size={error.fits}"
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
