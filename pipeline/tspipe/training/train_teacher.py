"""Before stage one: train a teacher from scratch, or fine-tune one, on a dataset's training split."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from tspipe.data.datasets import Dataset, open_dataset, stem
from tspipe.data.image_loader import input_shape
from tspipe.errors import DatasetError, NetworkError, TrainingError
from tspipe.models import chance, feature_net, loading, networks, weights
from tspipe.models.probe import check_trainable, probe_images
from tspipe.models.weights import Weights
from tspipe.recipes.schema import Recipe
from tspipe.training import teacher_epochs, training_data
from tspipe.training.checkpoint import Checkpointer
from tspipe.training.run_folder import Row
from tspipe.training.teacher_epochs import TeacherTraining, load_split
from tspipe.utils.device import pick_device
from tspipe.utils.files import lock, remove_stale_lock
from tspipe.utils.memory import keep_freed_memory
from tspipe.utils.progress import warn
from tspipe.utils.rng import seed_torch

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
    """A trained teacher.

    Attributes:
        path: the file of the weights, which are those of the last epoch.
        accuracy: their test accuracy.
        remark: why it classifies no better than by guessing, if so.
        metrics: those of each epoch, if it was trained now; see `teacher_epochs.TeacherTraining.rows`.
    """

    path: Path
    accuracy: float
    remark: str | None
    metrics: Sequence[Row] = ()


def checkpoint_path(dataset: str, network: str) -> Path:
    """Return `checkpoints/<dataset>-<network>.safetensors`; a network file `./mine.py` is `mine`."""
    return Path("checkpoints") / f"{stem(dataset)}-{networks.file_stem(network)}.safetensors"


def metrics_path(weights: Path) -> Path:
    """Return the file with the metrics of the training of these weights: `NAME.metrics.csv` beside them."""
    return weights.with_name(f"{weights.stem}.metrics.csv")


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
    tested = {f"test_{k}": v for k, v in training_data.describe(dataset.test, "test").items() if k != "classes"}
    identity = _identity(recipe, dataset.name, data, start)
    checkpointer = Checkpointer(path.with_name(path.name + ".part"), recipe.checkpoint_seconds, identity)
    if path.exists() and not config.force:
        trained = weights.read(path)
        accuracy = _recorded_accuracy(trained, identity, data)
        remark, suspicious = None, chance.is_suspicious(accuracy, dataset.test.labels)
        if suspicious or not trained.metadata.items() >= tested.items():  # of another test split
            network, *_ = _build_network(config, input_shape(dataset.train, recipe.preprocess), dataset, start)
            loading.load_into(network, trained.tensors, settings.network, trained.source)
            network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            test = load_split(dataset.test, "test", recipe, device)
            accuracy = teacher_epochs.accuracy(network, test, recipe)
            remark = teacher_epochs.chance_remark(network, test, recipe, accuracy)
        checkpointer.delete()  # it remains if a process was killed at the very end
        remove_stale_lock(path)
        return TrainedTeacher(path, accuracy, remark)
    network, options, new = _build_network(config, input_shape(dataset.train, recipe.preprocess), dataset, start)
    warn(_describe_start(settings.network, start, new))
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path, TrainingError):
        if config.force:
            checkpointer.delete()
        training = TeacherTraining(network, recipe, dataset, metrics_path(path), device)
        training.fit(checkpointer)
        accuracy = training.rows[-1]["test_accuracy"]
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
    remark = teacher_epochs.chance_remark(network, training.test, recipe, accuracy)
    return TrainedTeacher(path, accuracy, remark, training.rows)


def published_weights(recipe: Recipe) -> str | None:
    """Return the weights, as `networks.pretrained` names them, that a teacher starts from without a file, if any."""
    network = recipe.teacher.network
    published = networks.imagenet(network) if recipe.teacher.pretrained == "imagenet" else None
    return networks.pretrained(network) or published


def _start_weights(config: TeacherConfig) -> Weights | None:
    """Return the weights that training starts from: the user's, those that the network names, or none."""
    settings = config.recipe.teacher
    if config.start or not settings.pretrained or not (name := published_weights(config.recipe)):
        return config.start
    return weights.pretrained(name, settings.network, download=config.download)


def _build_network(
    config: TeacherConfig, shape: tuple[int, int, int], dataset: Dataset, start: Weights | None
) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """Return the network, the options that it was built with, and the keys that keep their initial weights.

    Those are the last layer's where `start` is for other classes; without `start`, none are listed.
    """
    settings = config.recipe.teacher
    try:
        spec = loading.NetworkSpec(settings.network, len(dataset.train.classes), shape, settings.options)
        tensors, options = loading.adapt(spec, start.tensors, start.sha256) if start else ({}, dict(settings.options))
        seed_torch(teacher_epochs.SEED, "weights")
        network = networks.build(settings.network, spec.num_classes, shape, options)
        if not hasattr(network, "losses"):
            check_trainable(network, settings.network, probe_images(shape))
        initial = network.state_dict()
        if start:
            completed = networks.complete(settings.network, tensors, initial)
            tensors = completed or _with_new_head(network, settings.network, tensors, initial, shape)
            loading.load_into(network, tensors, settings.network, start.source)
        return network, options, [key for key in initial if tensors.get(key) is initial[key]]
    except NetworkError as problem:
        if config.start or not start:
            raise
        raise NetworkError(
            f"{start.source}, from which the training of {settings.network} starts, does not fit the network as it is "
            "built here. Start from random weights: --set teacher.pretrained=false"
        ) from problem


def _describe_start(network: str, start: Weights | None, new: list[str]) -> str:
    """Say which weights training starts from, and which layers have initial weights in their place."""
    if start is None:
        return f"Training {network} from random weights."
    choice = f"{start.choice}; " if start.choice else ""
    layers = list(dict.fromkeys(key.rpartition(".")[0] for key in new))
    listed = ", ".join([*layers[:3], *([f"{len(layers) - 3} more"] if len(layers) > 3 else [])])
    loaded = f"{listed} is reinitialised, every other layer is loaded" if layers else "every layer is loaded"
    return f"Fine-tuning {network} from {start.source} ({choice}SHA-256 {start.sha256[:12]}): {loaded}."


def _with_new_head(
    network: nn.Module, name: str, tensors: dict[str, Tensor], state: dict[str, Tensor], shape: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Return a file's weights, with the last layer's of the initial `state` where the file is for other classes."""
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
