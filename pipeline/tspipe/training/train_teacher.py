"""Before stage one: train a teacher from scratch, or fine-tune one, on a dataset's training split."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from tspipe.data.datasets import Dataset, Images, open_dataset, stem
from tspipe.data.image_loader import ImageLoader, input_shape
from tspipe.data.preprocess import shift_and_flip
from tspipe.errors import DatasetError, NetworkError, TrainingError
from tspipe.models import feature_net, loading, networks, weights
from tspipe.models.probe import check_trainable, probe_images
from tspipe.models.teacher import chance
from tspipe.models.weights import Weights
from tspipe.recipes.schema import Recipe
from tspipe.training import training_data
from tspipe.training.batches import sequential_batches, shuffled_batches
from tspipe.training.checkpoint import Checkpointer, Position, load_training_state, training_state
from tspipe.training.evaluation import count_correct
from tspipe.training.optimizers import make_optimizer, set_batch_norm_momentum, set_learning_rate
from tspipe.utils.device import pick_device
from tspipe.utils.files import lock, remove_stale_lock
from tspipe.utils.memory import keep_freed_memory, memory_limit
from tspipe.utils.progress import progress
from tspipe.utils.rng import seed_torch, stream

_SEED = 0  # a teacher is trained once
_SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ckpt")  # of a checkpoint's name


@dataclass(frozen=True)
class TeacherConfig:
    """The configuration of `tspipe teacher`.

    Attributes:
        start: weights to fine-tune; None to start as the recipe says.
        force: replace weights of other settings.
    """

    recipe: Recipe
    data: Path | None = None
    start: Weights | None = None
    out: Path | None = None
    force: bool = False
    download: bool = False


class TrainedTeacher(NamedTuple):
    """The file of the weights, which are those of the last epoch; their test accuracy, and what chance may reach."""

    path: Path
    accuracy: float
    chance: float


def checkpoint_path(dataset: str, network: str) -> Path:
    """Return `checkpoints/<dataset>-<network>.safetensors`; a network file `./mine.py` is `mine`."""
    return Path("checkpoints") / f"{stem(dataset)}-{networks.recorded_name(network).replace(':', '-')}.safetensors"


def find_checkpoint(dataset: str, network: str) -> Path | None:
    """Return the file in `checkpoints/` with this teacher's weights, in any of the usual formats, or None."""
    path = checkpoint_path(dataset, network)
    return next((file for suffix in _SUFFIXES if (file := path.with_suffix(suffix)).exists()), None)


def train_teacher(config: TeacherConfig) -> TrainedTeacher:
    """Train the recipe's teacher and write its weights, with preprocess, accuracy and data in the file's metadata.

    A killed run resumes from its last checkpoint and, on the CPU, ends with the same weights; finished weights are
    left as they are. Raises TrainingError when the loss is not finite, or when the file holds weights of other settings
    or other data and `force` is not set.
    """
    recipe, settings = config.recipe, config.recipe.teacher
    device = pick_device(recipe.device)
    keep_freed_memory()
    dataset = open_dataset(recipe.dataset, config.data, download=config.download, split=recipe.split)
    if len(dataset.train) < settings.batch_size:
        raise DatasetError(
            f"{dataset.name} has {len(dataset.train):,} training images, too few for a batch of "
            f"{settings.batch_size}. Use smaller batches: --set teacher.batch_size={max(2, len(dataset.train) // 4)}"
        )
    start = _start_weights(config)
    path = config.out or checkpoint_path(dataset.name, settings.network)
    data = training_data.describe(dataset.train)
    tested = training_data.describe(dataset.test, "test")
    tested = {f"test_{name}": tested[name] for name in ("labels_sha256", "pixels_sha256")}
    identity = _identity(recipe, dataset.name, data, start)
    checkpointer = Checkpointer(path.with_name(path.name + ".part"), recipe.checkpoint_seconds, identity)
    if path.exists() and not config.force:
        trained = weights.read(path)
        accuracy = _recorded_accuracy(trained, identity, data)
        if not trained.metadata.items() >= tested.items():  # of another test split
            network, _ = _build_network(config, input_shape(dataset.train, recipe.preprocess), dataset, start)
            loading.load_into(network, trained.tensors, settings.network, trained.source)
            network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            accuracy = _accuracy(network, recipe, dataset.test, device)
        checkpointer.delete()  # it remains if a process was killed at the very end
        remove_stale_lock(path)
        return TrainedTeacher(path, accuracy, chance(dataset.test.labels))
    network, options = _build_network(config, input_shape(dataset.train, recipe.preprocess), dataset, start)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path, TrainingError):
        if config.force:
            checkpointer.delete()
        memory = (recipe.memory or memory_limit(device)) // 2
        uncropped = replace(recipe.preprocess, crop=None) if settings.random_crop else recipe.preprocess
        train = ImageLoader(dataset.train, uncropped, "train", memory, device)
        _fit(network, recipe, train, torch.from_numpy(dataset.train.labels).to(device), checkpointer)
        accuracy = _accuracy(network, recipe, dataset.test, device)
        metadata = {
            **data,
            **tested,
            "accuracy": f"{accuracy:.4f}",
            "dataset": dataset.name,
            "identity": identity,
            "network": networks.recorded_name(settings.network),
            "options": json.dumps(options, sort_keys=True),
            "preprocess": json.dumps(recipe.preprocess.as_dict(), sort_keys=True),
        }
        weights.save(path, network, metadata)
        checkpointer.delete()
    return TrainedTeacher(path, accuracy, chance(dataset.test.labels))


def _fit(network: nn.Module, recipe: Recipe, train: ImageLoader, labels: Tensor, checkpointer: Checkpointer) -> None:
    """Train all epochs, from the last checkpoint if there is one."""
    settings = recipe.teacher
    set_batch_norm_momentum(network, settings)
    optimizer = make_optimizer(settings, network.parameters(), train.device)
    start = Position()
    if checkpoint := checkpointer.load(refuse_foreign=True):
        start = checkpoint.position
        load_training_state(checkpoint.tensors, network, optimizer)
    description = f"teacher {settings.network}"
    done = start.epoch * len(train) + start.batch * settings.batch_size
    with progress(description, settings.epochs * len(train), "images", done) as advance:
        for epoch in range(start.epoch, settings.epochs):
            first_batch = start.batch if epoch == start.epoch else 0
            set_learning_rate(optimizer, settings, epoch)
            network.train()
            epoch_loss = torch.zeros((), device=train.device)
            order = shuffled_batches(_SEED, epoch, len(train), settings.batch_size)[first_batch:]
            for batch, (rows, pixels) in enumerate(zip(order, train.batches(order), strict=True), first_batch):
                images = recipe.preprocess.normalise(_augment(pixels, recipe, epoch, batch))
                seed_torch(_SEED, "dropout", epoch, batch)
                loss = teacher_loss(network, images, labels[rows.to(labels.device)])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                epoch_loss += loss.detach()
                advance(len(rows), f"{description}, epoch {epoch + 1}/{settings.epochs}")
                if checkpointer.clock.due():
                    _check_finite(epoch_loss, recipe, epoch)
                    checkpointer.save(training_state(network, optimizer), Position(0, epoch, batch + 1))
            _check_finite(epoch_loss, recipe, epoch)


def teacher_loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy, or the sum of the losses that a network such as NTS-Net defines itself."""
    if callable(losses := getattr(network, "losses", None)):
        return torch.stack(list(losses(images, labels).values())).sum()
    return F.cross_entropy(network(images), labels)


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
        generator = stream(_SEED, "views", epoch, batch)
        shifts = generator.integers(low, high + 1, (count, 2))
        flips = generator.integers(0, 1 + settings.flip, (count, 1))
        views = torch.from_numpy(np.concatenate([shifts, flips], axis=1))
        pixels = shift_and_flip(pixels, views.to(pixels.device))
    if crop is None:
        return pixels
    top, left = centre
    return pixels[:, :, top : top + crop, left : left + crop]


def _check_finite(loss: Tensor, recipe: Recipe, epoch: int) -> None:
    if not torch.isfinite(loss):
        raise TrainingError(
            f"The teacher's loss is not finite in epoch {epoch + 1}. The last checkpoint is kept. "
            f"Try a smaller learning rate: --set teacher.lr={recipe.teacher.lr / 10:g}"
        )


def _accuracy(network: nn.Module, recipe: Recipe, images: Images, device: torch.device) -> float:
    network.eval()
    test = ImageLoader(images, recipe.preprocess, "test", (recipe.memory or memory_limit(device)) // 2, device)
    labels = torch.from_numpy(images.labels).to(device)
    batches = test.batches(sequential_batches(len(test), recipe.test_batch_size))
    (correct,) = count_correct([network], batches, labels.split(recipe.test_batch_size), recipe.preprocess)
    return correct / len(test)


def _start_weights(config: TeacherConfig) -> Weights | None:
    """Return the weights that training starts from: the user's, those that the network names, or none."""
    settings = config.recipe.teacher
    if config.start or not settings.pretrained or not (name := networks.pretrained(settings.network)):
        return config.start
    return weights.pretrained(name, settings.network, download=config.download)


def _build_network(
    config: TeacherConfig, shape: tuple[int, int, int], dataset: Dataset, start: Weights | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network and the options that it was built with; a last layer for other classes starts anew."""
    settings = config.recipe.teacher
    try:
        spec = loading.NetworkSpec(settings.network, len(dataset.train.classes), shape, settings.options)
        tensors, options = loading.adapt(spec, start.tensors) if start else ({}, dict(settings.options))
        seed_torch(_SEED, "weights")
        network = networks.build(settings.network, spec.num_classes, shape, options)
        if not hasattr(network, "losses"):
            check_trainable(network, settings.network, probe_images(shape))
        if start:
            state = network.state_dict()
            completed = networks.complete(settings.network, tensors, state)
            tensors = completed or _with_new_head(network, settings.network, tensors, shape)
            loading.load_into(network, tensors, settings.network, start.source)
        return network, options
    except NetworkError as problem:
        if config.start or not start:
            raise
        raise NetworkError(
            f"{start.source}, from which the training of {settings.network} starts, does not fit the network as it is "
            "built here. Start from random weights: --set teacher.pretrained=false"
        ) from problem


def _with_new_head(
    network: nn.Module, name: str, tensors: dict[str, Tensor], shape: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Return a file's weights; the last layer's are the network's own where the file's are for other classes."""
    state = network.state_dict()
    path, _ = feature_net.last_linear(network, name, probe_images(shape))
    head = [key for key in state if key.rpartition(".")[0] == path and key in tensors]
    if any(tensors[key].shape[1:] != state[key].shape[1:] for key in head):
        return tensors
    return {**tensors, **{key: state[key] for key in head if len(state[key]) != len(tensors[key])}}


def _identity(recipe: Recipe, dataset: str, data: dict[str, str], start: Weights | None) -> str:
    """Return a digest of everything that determines the weights; only a checkpoint with the same one is resumed."""
    teacher = recipe.teacher.model_dump(exclude={"any_classes"})
    parts = [teacher, recipe.preprocess.as_dict(), dataset, data, start.sha256 if start else None]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _recorded_accuracy(trained: Weights, identity: str, data: dict[str, str]) -> float:
    """Return the test accuracy of a finished teacher. Raises TrainingError if it was trained otherwise."""
    if trained.metadata.get("identity") != identity:
        training_data.check(trained, data)
        raise TrainingError(
            f"{trained.source} holds weights of other settings. Replace them with --force, or choose --out."
        )
    try:
        return TypeAdapter(Annotated[float, Field(ge=0, le=1)]).validate_python(trained.metadata.get("accuracy"))
    except ValidationError:
        raise TrainingError(
            f"{trained.source}: its metadata is damaged. Train the teacher again with --force."
        ) from None
