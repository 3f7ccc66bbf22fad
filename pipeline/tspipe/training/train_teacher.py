"""Before stage one: train a teacher from scratch, or fine-tune one, on a dataset's training split."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tspipe.data.datasets import Dataset, Images, open_dataset, parse, stem
from tspipe.data.image_loader import Pixels, input_shape
from tspipe.data.preprocess import shift_and_flip
from tspipe.errors import DatasetError, NetworkError, TrainingError
from tspipe.models import feature_net, networks, weights
from tspipe.models.weights import Weights
from tspipe.recipes.schema import Recipe
from tspipe.training import batches, checkpoint, evaluation
from tspipe.training import optimizers as training
from tspipe.utils import timing
from tspipe.utils.device import pick_device
from tspipe.utils.files import lock
from tspipe.utils.memory import keep_freed, memory_bound
from tspipe.utils.progress import progress
from tspipe.utils.rng import seed_torch, stream

_SEED = 0  # a teacher is trained once
_SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ckpt")  # of a checkpoint's name


@dataclass(frozen=True)
class TeacherConfig:
    """What `tspipe teacher` was asked for."""

    recipe: Recipe
    data: Path | None = None
    start: Weights | None = None  # to fine-tune
    out: Path | None = None
    force: bool = False
    download: bool = False


@dataclass(frozen=True)
class TrainedTeacher:
    """Where the weights are, and the test accuracy of the last epoch, whose weights they are."""

    path: Path
    accuracy: float


def checkpoint_path(dataset: str, network: str) -> Path:
    """`checkpoints/<dataset>-<network>.safetensors`; a user's `./mine.py` is `mine`."""
    return Path("checkpoints") / f"{stem(dataset)}-{networks.recorded_name(network).replace(':', '-')}.safetensors"


def find_checkpoint(dataset: str, network: str) -> Path | None:
    """The weights of this teacher in `checkpoints/`: what training wrote, or a file put there under the same name."""
    usual = checkpoint_path(dataset, network)
    return next((path for suffix in _SUFFIXES if (path := usual.with_suffix(suffix)).exists()), None)


def how_to_get(config: TeacherConfig, command: str) -> str:
    """A few sentences on where the teacher's weights are to be had, and what the `command` that trains it costs."""
    recipe, how = config.recipe, config.recipe.teacher
    if (address := networks.published(how.network, parse(recipe.dataset, config.data)[1])) is None:
        return f"Give a file (--weights FILE) or train it: {command}"
    images = open_dataset(recipe.dataset, config.data).train
    flops = _flops(recipe, images) * len(images) * how.epochs
    return (
        f"Published ones are at {address}: give them with --weights FILE, in make WEIGHTS=FILE. Or train it: "
        f"{command} --download. That is {flops:.1e} floating-point operations ({how.epochs} epochs of "
        f"{len(images):,} images): {flops / 1e13 / 3600:.1f} hours for a GPU that does 10 TFLOP/s, "
        f"{flops / 1e11 / 86400:.0f} days for a processor that does 0.1."
    )


def _flops(recipe: Recipe, images: Images) -> float:
    """Floating-point operations to train on one image, as PyTorch counts them, two for each multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    shape, classes, count = input_shape(images, recipe.preprocess), len(images.classes), 2
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = networks.build(recipe.teacher.network, classes, shape, recipe.teacher.options)
        _loss(network, torch.empty(count, *shape), torch.zeros(count, dtype=torch.int64)).backward()
    total: int = counter.get_total_flops()
    return total / count


def train_teacher(config: TeacherConfig) -> TrainedTeacher:
    """Train the recipe's teacher and write its weights, with preprocess and accuracy in the file's metadata.

    A run that was killed goes on from its last checkpoint and, on the CPU, ends with the same weights; one that
    is finished is left as it is. Raises TrainingError when the loss is no longer a number, or when the name is
    taken by weights of other settings and `force` is not set.
    """
    recipe, how = config.recipe, config.recipe.teacher
    device = pick_device(recipe.device)
    keep_freed()
    dataset = open_dataset(recipe.dataset, config.data, download=config.download)
    if len(dataset.train) < how.batch_size:
        raise DatasetError(
            f"{dataset.name} has {len(dataset.train):,} training images, too few for a batch of {how.batch_size}. "
            f"Give a smaller one: --set teacher.batch_size={max(2, len(dataset.train) // 4)}"
        )
    start = _start(config)
    path = config.out or checkpoint_path(dataset.name, how.network)
    identity = _identity(recipe, dataset, start)
    if path.exists() and not config.force:
        return _finished(path, identity)
    shape = input_shape(dataset.train, recipe.preprocess)
    try:
        network, options = _network(recipe, shape, len(dataset.train.classes), start)
    except NetworkError as problem:
        if config.start or not start:
            raise
        raise NetworkError(
            f"{start.source}, with which training {how.network} begins, does not fit it as it is built here. Begin "
            "with random weights: --set teacher.pretrained=false"
        ) from problem
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path, TrainingError):
        part = path.with_name(path.name + ".part")
        if config.force:
            part.unlink(missing_ok=True)
        memory = recipe.memory or memory_bound(device)
        whole = replace(recipe.preprocess, crop=None) if how.random_crop else recipe.preprocess
        train = Pixels(dataset.train, whole, "train", memory // 2, device)
        test = Pixels(dataset.test, recipe.preprocess, "test", memory // 2, device)
        _fit(network, recipe, dataset, train, part, identity)
        accuracy = _accuracy(network, recipe, dataset, test)
        metadata = {
            "accuracy": f"{accuracy:.4f}",
            "classes": json.dumps(list(dataset.train.classes)),
            "dataset": dataset.name,
            "identity": identity,
            "network": networks.recorded_name(how.network),
            "options": json.dumps(options, sort_keys=True),
            "preprocess": json.dumps(recipe.preprocess.as_dict(), sort_keys=True),
        }
        weights.save(path, network, metadata)
        part.unlink(missing_ok=True)
    return TrainedTeacher(path, accuracy)


def _start(config: TeacherConfig) -> Weights | None:
    """What training starts from: the user's weights, those that the network names, or none."""
    how = config.recipe.teacher
    if config.start or not how.pretrained or not (name := networks.pretrained(how.network)):
        return config.start
    return weights.pretrained(name, how.network, download=config.download)


def _network(
    recipe: Recipe, shape: tuple[int, int, int], num_classes: int, start: Weights | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network to train and the options it was built with; a last layer for other classes begins anew."""
    how = recipe.teacher
    tensors, seen = networks.adapt(how.network, dict(start.tensors)) if start else ({}, {})
    options = {**how.options, **seen}
    seed_torch(_SEED, "weights")
    network = networks.build(how.network, num_classes, shape, options)
    if start:
        own = network.state_dict()
        tensors = networks.complete(how.network, tensors, own) or _with_new_head(network, recipe, tensors, shape)
        weights.load_into(network, tensors, how.network, start.source)
    return network, options


def _with_new_head(
    network: nn.Module, recipe: Recipe, tensors: dict[str, Tensor], shape: tuple[int, int, int]
) -> dict[str, Tensor]:
    """A file's weights, the last layer's being the network's own where the file's are for other classes."""
    own = network.state_dict()
    path, _ = feature_net.last_linear(network, recipe.teacher.network, feature_net.probe_images(shape))
    head = [key for key in own if key.rpartition(".")[0] == path and key in tensors]
    if any(tensors[key].shape[1:] != own[key].shape[1:] for key in head):
        return tensors
    return {**tensors, **{key: own[key] for key in head if len(own[key]) != len(tensors[key])}}


def _fit(network: nn.Module, recipe: Recipe, dataset: Dataset, train: Pixels, part: Path, identity: str) -> None:
    """Train all epochs, with checkpoints in `part`, going on from one that is there."""
    how = recipe.teacher
    optimizer = training.make_optimizer(how, network.parameters(), train.device)
    labels = torch.from_numpy(dataset.train.labels).to(train.device)
    clock, start, first = timing.Clock(recipe.checkpoint_seconds), 0, 0
    if found := checkpoint.load_checkpoint(part):
        if found[1]["identity"] != identity:
            raise TrainingError(
                f"{part} is a checkpoint of other settings. Give those to go on with it, or delete it to begin again."
            )
        checkpoint.unpack(found[0], network, optimizer)
        start, first = found[1]["epoch"], found[1]["batch"]
    what, done = f"teacher {how.network}", start * len(train) + first * how.batch_size
    with progress(what, how.epochs * len(train), "images", done) as advance:

        def after(epoch: int, batch: int, images: int, loss: Tensor) -> None:
            advance(images, f"{what}, epoch {epoch + 1}/{how.epochs}")
            if clock.due():
                _check_loss(loss, recipe, epoch)
                position = {"identity": identity, "epoch": epoch, "batch": batch + 1}
                checkpoint.save_checkpoint(part, checkpoint.pack(network, optimizer), position)

        for epoch in range(start, how.epochs):
            training.set_learning_rate(optimizer, how, epoch)
            loss = _epoch(network, optimizer, recipe, train, labels, epoch, first, after)
            _check_loss(loss, recipe, epoch)
            first = 0


def _epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    train: Pixels,
    labels: Tensor,
    epoch: int,
    first: int,
    after: Callable[[int, int, int, Tensor], None],
) -> Tensor:
    """An epoch's batches from number `first` on; the summed loss, on the device."""
    how, total = recipe.teacher, torch.zeros((), device=train.device)
    order = batches.order(_SEED, epoch, len(train), how.batch_size)[first:]
    network.train()
    for batch, (rows, pixels) in enumerate(zip(order, train.batches(order), strict=True), first):
        pixels = _augmented(pixels, recipe, epoch, batch)
        seed_torch(_SEED, "dropout", epoch, batch)
        loss = _loss(network, recipe.preprocess.normalise(pixels), labels[rows.to(labels.device)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        after(epoch, batch, len(rows), total)
    return total


def _loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, or the sum of the losses that a network like NTS-Net has of its own."""
    if callable(own := getattr(network, "losses", None)):
        return torch.stack(list(own(images, labels).values())).sum()
    return F.cross_entropy(network(images), labels)


def _augmented(pixels: Tensor, recipe: Recipe, epoch: int, batch: int) -> Tensor:
    """Images (n, C, H, W) moved, mirrored and cropped as the recipe has it.

    A crop at a random place is one in the middle of an image that was moved.
    """
    how, count = recipe.teacher, len(pixels)
    crop = recipe.preprocess.crop if how.random_crop else None
    room = np.array([extent - crop if crop else 0 for extent in pixels.shape[2:]])
    middle = room // 2
    least, most = middle - room - how.shift, middle + how.shift
    if (most > least).any() or how.flip:
        draw = stream(_SEED, "views", epoch, batch)
        moves, flips = draw.integers(least, most + 1, (count, 2)), draw.integers(0, 1 + how.flip, (count, 1))
        views = torch.from_numpy(np.concatenate([moves, flips], axis=1))
        pixels = shift_and_flip(pixels, views.to(pixels.device))
    if crop is None:
        return pixels
    top, left = middle
    return pixels[:, :, top : top + crop, left : left + crop]


def _check_loss(loss: Tensor, recipe: Recipe, epoch: int) -> None:
    if not torch.isfinite(loss):
        raise TrainingError(
            f"The teacher's loss is no longer a number in epoch {epoch + 1}. The last checkpoint is kept. "
            f"A smaller learning rate may help: --set teacher.lr={recipe.teacher.lr / 10:g}"
        )


def _accuracy(network: nn.Module, recipe: Recipe, dataset: Dataset, test: Pixels) -> float:
    network.eval()
    labels = torch.from_numpy(dataset.test.labels).to(test.device)
    tested = test.batches(batches.in_turn(len(test), recipe.test_batch_size))
    (correct,) = evaluation.count_correct([network], tested, labels.split(recipe.test_batch_size), recipe.preprocess)
    return correct / len(test)


def _identity(recipe: Recipe, dataset: Dataset, start: Weights | None) -> str:
    """A digest of what the weights follow from: a run goes on only from a checkpoint of the same."""
    parts = [recipe.teacher.model_dump(), recipe.preprocess.as_dict(), dataset.name, len(dataset.train)]
    text = json.dumps([*parts, start.sha256 if start else None], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(path: Path, identity: str) -> TrainedTeacher:
    metadata = weights.read(path).metadata
    if metadata.get("identity") != identity:
        raise TrainingError(f"{path} holds weights of other settings. Replace them with --force, or choose --out.")
    return TrainedTeacher(path, float(metadata["accuracy"]))
