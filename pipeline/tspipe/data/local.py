"""The local images of a cache: which must be those it was made from."""

from pathlib import Path

from tspipe.cache import SPLITS, Cache, match
from tspipe.data.datasets import Dataset, open_dataset
from tspipe.data.preprocess import Preprocess
from tspipe.errors import CacheMismatch


def open_local(cache: Cache, spec: str, data: Path | None, *, download: bool, trust: bool) -> Dataset:
    """The dataset `spec` in the folder `data`, compared with the cache; with `trust` only counted.

    Raises CacheMismatch, naming the first image that differs.
    """
    dataset = open_dataset(spec, data, download=download)
    (_check_counts if trust else _check_data)(cache, dataset)
    return dataset


def check_preprocess(cache: Cache, wanted: Preprocess) -> None:
    """Raise CacheMismatch where other pixels are asked for than the cache's targets belong to."""
    there, here = cache.manifest["preprocess"], wanted.as_dict()
    for field in there:
        if there[field] != here[field]:
            raise CacheMismatch(
                f"{cache.path.name} was made with preprocess.{field} = {there[field]}, not {here[field]}: its targets "
                "belong to those pixels. Leave the setting out, or make another cache with it."
            )


def _check_data(cache: Cache, dataset: Dataset) -> None:
    match.match_classes(cache.path.name, cache.classes, dataset.train.classes)
    for split in SPLITS:
        match.match_split(cache.path.name, split, cache.split(split), dataset.split(split))


def _check_counts(cache: Cache, dataset: Dataset) -> None:
    """What even data that are trusted must have: a row of the cache for each image, and its classes."""
    there = {split: len(cache.split(split)) for split in SPLITS} | {"class": len(cache.classes)}
    here = {split: len(dataset.split(split)) for split in SPLITS} | {"class": len(dataset.train.classes)}
    if there != here:
        raise CacheMismatch(
            f"{cache.path.name} has {_counts(there)}, the dataset {_counts(here)}: --trust-data skips the comparison "
            "of images, but cannot do without their rows."
        )


def _counts(counts: dict[str, int]) -> str:
    return "{train:,} + {test:,} images of {class:,} classes".format(**counts)
