"""The local images of a cache, which must be those it was made from."""

from pathlib import Path

from tspipe.cache import SPLITS, Cache, match
from tspipe.data.datasets import Dataset, open_dataset
from tspipe.data.preprocess import Preprocess
from tspipe.errors import CacheMismatch


def open_local(cache: Cache, spec: str, data: Path | None, *, download: bool, trust: bool) -> Dataset:
    """Open the dataset `spec` in the folder `data` and compare it with the cache; with `trust`, only the counts.

    Raises CacheMismatch, naming the first image that differs.
    """
    dataset = open_dataset(spec, data, download=download)
    (_check_counts if trust else _check_data)(cache, dataset)
    return dataset


def check_preprocess(cache: Cache, preprocess: Preprocess) -> None:
    """Raise CacheMismatch if the cache's targets belong to images with another preprocessing."""
    stored, requested = cache.manifest["preprocess"], preprocess.as_dict()
    for field in stored:
        if stored[field] != requested[field]:
            raise CacheMismatch(
                f"{cache.path.name} was made with preprocess.{field} = {stored[field]}, not {requested[field]}: its "
                "targets belong to those pixels. Leave the setting out, or make another cache with it."
            )


def _check_data(cache: Cache, dataset: Dataset) -> None:
    match.match_classes(cache.path.name, cache.classes, dataset.train.classes)
    for split in SPLITS:
        match.match_split(cache.path.name, split, cache.split(split), dataset.split(split))


def _check_counts(cache: Cache, dataset: Dataset) -> None:
    """Check that trusted data have a row of the cache for each image, and its number of classes."""
    stored = {split: len(cache.split(split)) for split in SPLITS} | {"class": len(cache.classes)}
    local = {split: len(dataset.split(split)) for split in SPLITS} | {"class": len(dataset.train.classes)}
    if stored != local:
        raise CacheMismatch(
            f"{cache.path.name} has {_format_counts(stored)}, the dataset {_format_counts(local)}: "
            "--trust-data skips the comparison of images, but cannot do without their rows."
        )


def _format_counts(counts: dict[str, int]) -> str:
    return "{train:,} + {test:,} images of {class:,} classes".format(**counts)
