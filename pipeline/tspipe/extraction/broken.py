"""Images that cannot be decoded: all are named at once, or left out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from tspipe.cache import Cache
from tspipe.data.datasets import Dataset, Images
from tspipe.data.image_loader import find_broken
from tspipe.data.local import find_left_out
from tspipe.errors import DatasetError
from tspipe.utils.console import echo
from tspipe.utils.progress import warn


def find(dataset: Dataset, finished: Cache | None, skip: bool) -> dict[str, dict[int, str]]:
    """Return the images to leave out with `--skip-broken`, by split and index, and why.

    Without `skip` only headers are read, before the teacher starts; with it, all images are decoded, so that the rows
    of the cache are known. Of a finished cache, none are read but those that it lacks.

    Raises DatasetError if there are broken images and `skip` is not set, or if no image of a split or of a class of
    train is left.
    """
    if finished is not None:
        return {split: find_left_out(finished, split, dataset.split(split)) for split in dataset.splits} if skip else {}
    broken = {}
    for split in dataset.splits:
        images = dataset.split(split)
        if skip and images.array is None:
            images = replace(images, check_header=images.read)
        broken[split] = find_broken(images, split)
        if len(broken[split]) == len(images):
            raise DatasetError(f"No image of the {split} split can be decoded. The first: {broken[split][0]}")
        if split == "train" and skip:
            _check_classes(images, broken[split])
    problems = [problem for split in broken.values() for problem in split.values()]
    if problems and not skip:
        raise error(problems)
    return broken


def _check_classes(images: Images, broken: Mapping[int, str]) -> None:
    """Raise DatasetError if all images of a class are broken: in a folder, an empty class is refused, too."""
    left = np.delete(images.labels, list(broken))
    for index, problem in broken.items():
        if (label := images.labels[index]) not in left:
            raise DatasetError(
                f"No image of the class {images.classes[label]!r} can be decoded in the train split. The first: "
                f"{problem} Mend one, or remove the class."
            )


def report(broken: dict[str, dict[int, str]]) -> None:
    """Print which images are left out."""
    for split, problems in broken.items():
        for problem in problems.values():
            echo(f"Left out of {split}: {problem}")


def error(problems: Sequence[str]) -> DatasetError:
    """Print what is wrong with each of several images; return the error for all."""
    text, them = problems[0], "it"
    if len(problems) > 1:
        for problem in problems:
            warn(problem)
        text, them = f"{len(problems):,} images cannot be decoded; all are listed above. The first: {text}", "them"
    return DatasetError(
        f"{text} Mend or remove {them} and run the same command again, or leave {them} out: tspipe cache --skip-broken"
    )
