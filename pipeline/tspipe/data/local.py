"""The local images of a cache, which must be those it was made from."""

from dataclasses import replace
from pathlib import Path

from tspipe.cache import SPLITS, Cache, match
from tspipe.cache.layout import UNLABELLED
from tspipe.cache.read import read_keys
from tspipe.data.datasets import Dataset, Images, open_dataset
from tspipe.data.datasets.folder import load_unlabelled
from tspipe.data.hold_out import HoldOut
from tspipe.data.image_loader import input_shape, stored_images
from tspipe.data.preprocess import Preprocess
from tspipe.errors import CacheMismatch, DatasetError
from tspipe.utils.progress import remark_once


def open_local(cache: Cache, spec: str, data: Path | None, *, download: bool, trust: bool) -> Dataset:
    """Open the dataset `spec` in the folder `data` and compare it with the cache; with `trust`, only the counts.

    Raises CacheMismatch, naming the first image that differs.
    """
    dataset, name = open_dataset_of(cache, spec, data, download=download), cache.path.name
    if not trust:
        match.match_dataset(name, cache, dataset)
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


def add_unlabelled(dataset: Dataset, folder: Path, preprocess: Preprocess) -> Dataset:
    """Return the dataset with the images of a folder that have no labels.

    Raises DatasetError if there are none, or if the first of them has another size than the dataset's after
    preprocessing.
    """
    images = load_unlabelled(folder, preprocess.channels)
    shapes = [input_shape(split, preprocess) for split in (dataset.train, images)]
    if shapes[0] != shapes[1]:
        sides = ["×".join(map(str, shape[1:])) for shape in shapes]
        raise DatasetError(
            f"{folder}: {images.keys[0]} is {sides[1]} after preprocessing, the dataset's images are {sides[0]}. Give "
            f"one size: --set preprocess.resize=[{shapes[0][1]},{shapes[0][2]}]"
        )
    return replace(dataset, unlabelled=images)


def open_unlabelled(cache: Cache, folder: Path | None, *, trust: bool) -> Images:
    """Return the images without labels of a cache, from the file or from `folder`, compared with the cache.

    Raises CacheMismatch if the cache has none or `folder` has others, CacheError if a folder is needed.
    """
    name, stored = cache.path.name, cache.unlabelled
    if stored is None:
        raise CacheMismatch(
            f"{name} has no images without labels. Make it again with some (tspipe cache --force --unlabelled FOLDER), "
            "or train without: --set unlabelled_images=0"
        )
    if stored.images is not None:
        return stored_images(cache, UNLABELLED)
    if folder is None:
        raise CacheMismatch(
            f"{name} does not hold the pixels of its images without labels. Give their folder: --unlabelled FOLDER"
        )
    images = load_unlabelled(folder, len(cache.manifest["preprocess"]["mean"]))
    images = images.without(find_left_out(cache, UNLABELLED, images))
    if not trust or len(images) != len(stored):
        match.match_split(name, UNLABELLED, stored, images)
    return images


def open_dataset_of(cache: Cache, spec: str, data: Path | None, *, download: bool = False) -> Dataset:
    """Open a cache's dataset, split as the cache was, without the broken images that stage one left out.

    Those are remarked on.
    """
    split = cache.manifest["dataset"].get("split")
    dataset = open_dataset(spec, data, download=download, split=split and HoldOut(**split))
    broken = {split: find_left_out(cache, split, dataset.split(split)) for split in SPLITS}
    for split, problems in broken.items():
        for problem in problems.values():
            remark_once(problem, f"Left out of {split}, as in {cache.path.name}: {problem}")
    return dataset.without(broken)


def find_left_out(cache: Cache, split: str, images: Images) -> dict[int, str]:
    """Return why images that a cache lacks cannot be decoded, by index; other data has images that can."""
    stored = set(read_keys(cache.split(split)))
    lacking = [i for i, key in enumerate(images.keys) if key not in stored]
    broken: dict[int, str] = {}
    if len(lacking) == len(images) - len(stored):  # else it is other data
        for index in lacking:
            try:
                images.read(index)
            except DatasetError as problem:
                broken[index] = str(problem)
    return broken


def check_preprocess(cache: Cache, preprocess: Preprocess) -> None:
    """Raise CacheMismatch if the cache's targets belong to images with another preprocessing."""
    stored, requested = cache.manifest["preprocess"], preprocess.as_dict()
    for field in stored:
        if stored[field] != requested[field]:
            raise CacheMismatch(
                f"{cache.path.name} was made with preprocess.{field} = {stored[field]}, not {requested[field]}: its "
                "targets belong to those pixels. Leave the setting out, or make another cache with it."
            )
