"""The epochs of a teacher's training: augmented batches, checkpoints, and metrics of each epoch."""

import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.data.datasets import Dataset, Images
from tspipe.data.image_loader import ImageLoader
from tspipe.data.preprocess import Preprocess, shift_and_flip
from tspipe.errors import TrainingError
from tspipe.models import chance
from tspipe.recipes.schema import Recipe
from tspipe.training.batches import sequential_batches, shuffled_batches
from tspipe.training.checkpoint import Checkpointer, Position, load_training_state, training_state
from tspipe.training.evaluation import count_correct, predict
from tspipe.training.optimizers import make_optimizer, set_batch_norm_momentum, set_learning_rate
from tspipe.training.run_folder import Row, write_rows
from tspipe.utils.device import batches_to_device, to_device
from tspipe.utils.files import write_whole
from tspipe.utils.memory import memory_limit
from tspipe.utils.progress import progress, warn
from tspipe.utils.rng import seed_torch, stream

SEED = 0  # a teacher is trained once
_COLUMNS = ["epoch", "loss", "train_accuracy", "test_accuracy", "lr", "seconds"]


class TeacherTraining:
    """Trains a network on the device that it is on.

    Args:
        metrics: the CSV file of the rows, which a resumed training writes again.

    Attributes:
        rows: the metrics of each finished epoch. Loss and train accuracy are those of the training steps, on augmented
            images; a network with losses of its own has no train accuracy. Seconds are of training and testing.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, dataset: Dataset, metrics: Path, device: torch.device):
        self.network, self.recipe, self.metrics = network, recipe, metrics
        uncropped = replace(recipe.preprocess, crop=None) if recipe.teacher.random_crop else recipe.preprocess
        self.train = load_split(dataset.train, "train", recipe, device, uncropped)
        self.test = load_split(dataset.test, "test", recipe, device)
        set_batch_norm_momentum(network, recipe.teacher)
        self.optimizer = make_optimizer(recipe.teacher, network.parameters(), device)
        self.rows: list[Row] = []

    def fit(self, checkpointer: Checkpointer) -> None:
        """Train all epochs, from the last checkpoint if there is one."""
        settings = self.recipe.teacher
        start, seconds, sums = Position(), 0.0, torch.zeros(3, device=self.train.images.device)
        if checkpoint := checkpointer.load(refuse_foreign=True):
            start = checkpoint.position
            load_training_state(checkpoint.tensors, self.network, self.optimizer)
            seconds, sums = self._load_metrics(checkpoint.tensors)
        self._write_metrics()
        description, total = f"teacher {settings.network}", settings.epochs * len(self.train.images)
        done = start.epoch * len(self.train.images) + start.batch * settings.batch_size
        with progress(description, total, "images", done) as advance:
            for epoch in range(start.epoch, settings.epochs):
                began = time.monotonic() - seconds
                for batch, images in self._train_epoch(epoch, start.batch, sums):
                    advance(images, f"{description}, epoch {epoch + 1}/{settings.epochs}")
                    if checkpointer.clock.due():
                        self._check_finite(sums, epoch)
                        checkpointer.save(self._state(sums, time.monotonic() - began), Position(0, epoch, batch + 1))
                self._check_finite(sums, epoch)
                self._finish_epoch(epoch, sums, began)
                start, seconds, sums = Position(), 0.0, torch.zeros_like(sums)

    def _train_epoch(self, epoch: int, first_batch: int, sums: Tensor) -> Iterator[tuple[int, int]]:
        """Train on the batches from the first on; yield the number of each and how many images it has.

        Adds their summed loss, correct predictions and number to `sums`.
        """
        settings = self.recipe.teacher
        set_learning_rate(self.optimizer, settings, epoch)
        self.network.train()
        order = shuffled_batches(SEED, epoch, len(self.train.images), settings.batch_size)[first_batch:]
        device_order = batches_to_device(order, self.train.labels.device)
        batches = zip(device_order, self.train.images.batches(order), strict=True)
        for batch, (rows, pixels) in enumerate(batches, first_batch):
            images = self.recipe.preprocess.normalise(_augment(pixels, self.recipe, epoch, batch))
            labels = self.train.labels[rows]
            seed_torch(SEED, "dropout", epoch, batch)
            loss, logits = teacher_loss(self.network, images, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            correct = 0 if logits is None else (logits.argmax(1) == labels).sum()
            sums[0] += loss.detach() * len(rows)
            sums[1] += correct
            sums[2] += len(rows)
            yield batch, len(rows)

    def _finish_epoch(self, epoch: int, sums: Tensor, began: float) -> None:
        """Test the network; print and write the metrics of the epoch."""
        loss, correct, images = sums.tolist()
        row: Row = {"epoch": epoch + 1, "loss": loss / images}
        row |= {} if hasattr(self.network, "losses") else {"train_accuracy": correct / images}
        row["test_accuracy"] = tested = accuracy(self.network, self.test, self.recipe)
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["seconds"] = round(time.monotonic() - began, 2)
        self.rows.append(row)
        self._write_metrics()
        epochs = str(self.recipe.teacher.epochs)
        train = f"train {row['train_accuracy']:.2%}, " if "train_accuracy" in row else ""
        warn(
            f"epoch {epoch + 1:>{len(epochs)}}/{epochs}: loss {row['loss']:.4g}, {train}test {tested:.2%}, "
            f"lr {row['lr']:.3g}, {row['seconds']:.1f} s"
        )

    def _write_metrics(self) -> None:
        text = io.StringIO(newline="")
        write_rows(text, self.rows, _COLUMNS, header=True)
        write_whole(self.metrics, text.getvalue().encode())

    def _state(self, sums: Tensor, seconds: float) -> dict[str, Tensor]:
        """Return the state of training, with the metrics of the finished epochs and of the current one."""
        metrics = json.dumps({"rows": self.rows, "seconds": seconds}).encode()
        state = training_state(self.network, self.optimizer)
        return {**state, "sums": sums, "metrics": torch.frombuffer(bytearray(metrics), dtype=torch.uint8)}

    def _load_metrics(self, tensors: Mapping[str, Tensor]) -> tuple[float, Tensor]:
        """Restore the rows of `_state`; return the seconds and the sums of the current epoch."""
        try:
            metrics = json.loads(bytes(tensors["metrics"].tolist()))
            self.rows = metrics["rows"]
            return float(metrics["seconds"]), tensors["sums"].to(self.train.images.device, copy=True)
        except (KeyError, TypeError, ValueError) as problem:
            raise TrainingError(
                "The checkpoint has no metrics: another version of tspipe wrote it. Start again with --force."
            ) from problem

    def _check_finite(self, sums: Tensor, epoch: int) -> None:
        if not sums.isfinite().all():
            raise TrainingError(
                f"The teacher's loss is not finite in epoch {epoch + 1}. The last checkpoint is kept. "
                f"Try a smaller learning rate: --set teacher.lr={self.recipe.teacher.lr / 10:g}"
            )


def teacher_loss(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the cross-entropy and the logits, or the sum of the losses that a network such as NTS-Net defines."""
    if callable(losses := getattr(network, "losses", None)):
        return torch.stack(list(losses(images, labels).values())).sum(), None
    logits = network(images)
    return F.cross_entropy(logits, labels), logits


class Split(NamedTuple):
    """A split's preprocessed images and their labels (n,) int64, on the device."""

    images: ImageLoader
    labels: Tensor


def load_split(
    images: Images, name: str, recipe: Recipe, device: torch.device, preprocess: Preprocess | None = None
) -> Split:
    """Load a split in at most half of the memory; `preprocess` replaces the recipe's."""
    memory = (recipe.memory or memory_limit(device)) // 2
    loader = ImageLoader(images, preprocess or recipe.preprocess, name, memory, device)
    return Split(loader, torch.from_numpy(images.labels).to(device))


def accuracy(network: nn.Module, test: Split, recipe: Recipe) -> float:
    """Return the share of the images that the network classifies correctly."""
    network.eval()
    size = recipe.test_batch_size
    batches = test.images.batches(sequential_batches(len(test.images), size))
    (correct,) = count_correct([network], batches, test.labels.split(size), recipe.preprocess)
    return correct / len(test.images)


def chance_remark(network: nn.Module, test: Split, recipe: Recipe, accuracy: float) -> str | None:
    """Describe why a network of this accuracy classifies no better than by guessing; see `models.chance.remark`."""
    if not chance.is_suspicious(accuracy, labels := test.labels.cpu().numpy()):
        return None
    network.eval()
    batches = test.images.batches(sequential_batches(len(test.images), recipe.test_batch_size))
    return chance.remark(predict(network, batches, recipe.preprocess), labels)


def _augment(pixels: Tensor, recipe: Recipe, epoch: int, batch: int) -> Tensor:
    """Shift, flip and crop images (n, C, H, W) at random, as the recipe says.

    A crop at a random place is a centre crop of a shifted image.
    """
    settings, count = recipe.teacher, len(pixels)
    crop = recipe.preprocess.crop if settings.random_crop else None
    margin = np.array([extent - crop if crop else 0 for extent in pixels.shape[2:]])
    centre = margin // 2
    low, high = centre - margin - settings.shift, centre + settings.shift
    if (high > low).any() or settings.flip:
        generator = stream(SEED, "views", epoch, batch)
        shifts = generator.integers(low, high + 1, (count, 2))
        flips = generator.integers(0, 1 + settings.flip, (count, 1))
        views = torch.from_numpy(np.concatenate([shifts, flips], axis=1))
        pixels = shift_and_flip(pixels, to_device(views, pixels.device))
    if crop is None:
        return pixels
    top, left = centre
    return pixels[:, :, top : top + crop, left : left + crop]
