"""The local images of a cache, which must be those it was made from."""

from pathlib import Path

from tspipe.cache import Cache, match
from tspipe.data.datasets import Dataset, open_dataset
from tspipe.data.preprocess import Preprocess
from tspipe.errors import CacheMismatch


def open_local(cache: Cache, spec: str, data: Path | None, *, download: bool, trust: bool) -> Dataset:
    """Open the dataset `spec` in the folder `data` and compare it with the cache; with `trust`, only the counts.

    Raises CacheMismatch, naming the first image that differs.
    """
    dataset, name = open_dataset(spec, data, download=download), cache.path.name
    if not trust:
        match.match_dataset(name, cache, dataset.split)
        return dataset
    stored, local = (
        f"{len(source.split('train')):,} + {len(source.split('test')):,} images of {len(classes):,} classes"
        for source, classes in ((cache, cache.classes), (dataset, dataset.train.classes))
    )
    if stored != local:
        raise CacheMismatch(
            f"{name} has {stored}, the dataset {local}: --trust-data skips the comparison of images, but cannot do "
            "without their rows."
        )
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
