"""Stage one: every image once through the frozen teacher, into the cache."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tspipe import feature_net, networks, random_images, rows, weights
from tspipe.cache import SPLITS, Cache, CacheWriter, Dimensions, Manifest, match, open_cache
from tspipe.cache.layout import as_plan
from tspipe.cache.write import differing
from tspipe.datasets import Dataset, open_dataset, stem
from tspipe.distributed import pick_device
from tspipe.errors import CacheError, CacheMismatch
from tspipe.feature_net import FeatureNet
from tspipe.pixels import input_shape
from tspipe.progress import progress
from tspipe.recipe import Recipe
from tspipe.weights import Weights

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
    other = "" if teacher == usual else f"-{networks.stated_name(teacher).replace(':', '-')}"
    return Path("cache") / f"{stem(dataset)}{other}.h5"


def extract(config: ExtractConfig) -> Cache:
    """Write the cache, or go on with one that was begun; gives it opened.

    A finished file of the same settings and data is left as it is. Raises CacheMismatch when the name is taken
    by another cache and `force` is not set, CacheBusy when another process writes it.
    """
    recipe, name = config.recipe, config.recipe.teacher.network
    dataset = open_dataset(recipe.dataset, config.data, download=config.download)
    device = pick_device(recipe.compute.device)
    rows.exact()

    shape, classes = input_shape(dataset.train, recipe.preprocess), len(dataset.train.classes)
    module, options = feature_net.load_teacher(
        name, classes, shape, recipe.teacher.options, config.weights.tensors, config.weights.source
    )
    options["input_shape"] = list(shape)
    stored = weights.canonical(module)
    teacher = feature_net.frozen(module, name, shape, device)
    plan = _plan(config, dataset, options, teacher.width, device, hashlib.sha256(stored).hexdigest())
    if config.out.exists() and not config.force:
        return _finished(config, plan, dataset)

    dimensions = _dimensions(plan, dataset, len(stored), (*shape[1:], shape[0]) if config.images else None)
    with CacheWriter(config.out, plan, dimensions, dataset.train.classes, stored) as writer:
        for split in SPLITS:
            match.match_split(
                str(writer.part), split, writer.split(split), dataset.split(split), rows=writer.written(split)
            )
        _write_rows(writer, dataset, teacher, recipe)
        writer.finish()
    return open_cache(config.out)


def _write_rows(writer: CacheWriter, dataset: Dataset, teacher: FeatureNet, recipe: Recipe) -> None:
    sizes = writer.dimensions
    missing = {split: writer.missing(split) for split in sizes.sections}
    ranges = {split: [sizes.block(split, block) for block in missing[split]] for split in sizes.sections}
    total = sum(sizes.images(split) for split in sizes.sections)
    left = sum(len(images) for split in sizes.sections for images in ranges[split])
    with progress("teacher", total, "images", total - left) as advance:
        for split in sizes.sections:
            blocks = rows.of_section(split, dataset, recipe.preprocess, writer.plan, ranges[split])
            for number, block in zip(missing[split], blocks, strict=True):
                features, logits = rows.taught(
                    teacher, recipe.preprocess, recipe.compute.batch_size, block.pixels, split, number
                )
                _check_features(features, block.keys, recipe)
                columns: dict[str, NDArray[Any]] = {
                    "features": features,
                    "logits": logits,
                    "labels": block.labels,
                    "keys": block.keys,
                }
                writer.write_block(split, number, {**columns, "digests": block.digests, "images": block.pixels})
                advance(len(block.indices), f"teacher, {split}")


def _check_features(features: NDArray[np.float32], keys: NDArray[np.bytes_], recipe: Recipe) -> None:
    largest = float(np.finfo(recipe.features.dtype).max)
    bad = np.flatnonzero(~(np.abs(features) <= largest).all(axis=1))
    if not len(bad):
        return
    key = keys[bad[0]].decode()
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
        "random": random_images.described(config.random_pool) if config.random_pool else None,
        "teacher": {
            "correct": None,
            "file_sha256": config.weights.sha256,
            "network": networks.stated_name(recipe.teacher.network),
            "options": options,
            "weights_sha256": weights_sha256,
        },
        "views": None,
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
            f"{path} is another cache: {'; '.join(differences[:3])}. Replace it with --force, or choose --out."
        )
    match.match_classes(str(path), cache.classes, dataset.train.classes)
    for split in SPLITS:
        match.match_split(str(path), split, cache.split(split), dataset.split(split))
    return cache
