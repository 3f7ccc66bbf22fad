"""The images and labels that all learners of a run share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tspipe.data.datasets import Dataset
from tspipe.data.image_loader import ImageLoader, open_images
from tspipe.data.local import check_preprocess, open_local
from tspipe.data.preprocess import Preprocess
from tspipe.data.random_images import Photos
from tspipe.data.views import EpochViews
from tspipe.errors import DatasetError, RecipeError
from tspipe.losses._statistics import TeacherStatistics
from tspipe.training.arms import UNTAUGHT
from tspipe.training.config import StudentConfig
from tspipe.training.statistics import cache_statistics
from tspipe.training.targets import row_labels
from tspipe.utils.device import separate_stream
from tspipe.utils.memory import memory_limit
from tspipe.utils.rng import stream


@dataclass(frozen=True)
class RunData:
    """Training and test images with their labels, loaded from memory or decoded as they are needed.

    Attributes:
        row_labels: (N·V,) int64 on the device, the label of each row of targets; the teacher's with `labels=teacher`.
        test_labels: (N,) int64 on the device, always the dataset's.
        views: which view of each training image an epoch shows; None if the images are used as they are.
        validation_count: how many training images each seed holds back.
        statistics: those of the cache that losses may ask for.
    """

    preprocess: Preprocess
    train: ImageLoader
    test: ImageLoader
    row_labels: Tensor
    test_labels: Tensor
    views: EpochViews | None
    validation_count: int
    statistics: TeacherStatistics

    @property
    def train_labels(self) -> Tensor:
        """The label of each training image, (N,) int64 on the device."""
        return self.row_labels[:: len(self.row_labels) // len(self.train)]

    @property
    def train_count(self) -> int:
        """How many images each seed trains on."""
        return len(self.train) - self.validation_count

    def photos(self, rows: Tensor, num_classes: int) -> Photos:
        """Return the training images in these rows (n,) int64, to make random images from."""

        def read(indices: Tensor) -> Tensor:
            with separate_stream(self.train.device):  # else it waits for the training steps in the queue
                (images,) = self.train.batches([rows[indices]])
                return images.cpu()

        return Photos(len(rows), read, labels=self.train_labels.cpu()[rows].numpy(), classes=num_classes)

    def validation_split(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the images that a seed trains on and those that it holds back: (n,) int64 each."""
        if not self.validation_count:
            return torch.arange(self.train_count), torch.empty(0, dtype=torch.int64)
        shuffled = torch.from_numpy(stream(seed, "validation").permutation(len(self.train)))
        return shuffled[self.validation_count :], shuffled[: self.validation_count]


def open_local_dataset(config: StudentConfig) -> Dataset:
    """Open the local dataset and compare it with the cache."""
    inputs = config.inputs
    return open_local(config.cache, config.recipe.dataset, inputs.data, download=inputs.download, trust=inputs.trust)


def open_run_data(config: StudentConfig, device: torch.device) -> RunData:
    """Open the images of a run, from the cache where it holds pixels, else from the local dataset.

    Raises CacheMismatch when the local data are not those of the cache, DatasetError when a batch is larger than the
    training split, RecipeError when `val_fraction` selects no image.
    """
    recipe, cache = config.recipe, config.cache
    check_preprocess(cache, recipe.preprocess)
    if recipe.view_source == "live":
        views: EpochViews | None = EpochViews(len(cache.train), recipe.views, None, device)
    else:
        views = EpochViews.of_cache(cache, recipe.views, not set(UNTAUGHT).issuperset(config.arms), device)
    dataset, remaining_steps = open_images(cache, lambda: open_local_dataset(config))
    validation_count = round(recipe.val_fraction * len(dataset.train))
    _check_counts(config, dataset, validation_count)
    memory = (recipe.memory or memory_limit(device)) // 3
    labels = row_labels(cache, recipe.labels)
    train = ImageLoader(dataset.train, remaining_steps, "train", memory, device, views=views is not None)
    return RunData(
        Preprocess.from_dict(cache.manifest["preprocess"]),
        train,
        ImageLoader(dataset.test, remaining_steps, "test", memory, device),
        labels.to(device),
        torch.from_numpy(cache.test.labels).to(device),
        views,
        validation_count,
        cache_statistics(cache, labels, recipe, train.shape),
    )


def _check_counts(config: StudentConfig, dataset: Dataset, validation_count: int) -> None:
    recipe, count = config.recipe, len(dataset.train) - validation_count
    if count < recipe.batch_size:
        raise DatasetError(
            f"{dataset.name} has {count:,} training images, too few for a batch of {recipe.batch_size}. "
            f"Use smaller batches: --set batch_size={max(2, count // 4)}"
        )
    if recipe.val_fraction and not validation_count:
        raise RecipeError(
            f"val_fraction={recipe.val_fraction:g} of {len(dataset.train):,} training images selects none. Use a "
            "larger fraction: --set val_fraction=0.1"
        )
