"""Where a teacher's weights come from: a file, an earlier training, or training now."""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from tspipe.data.datasets import Images, open_dataset, parse
from tspipe.data.image_loader import find_broken, input_shape
from tspipe.data.preprocess import Preprocess
from tspipe.errors import DatasetError, NetworkError, TrainingError
from tspipe.models import networks
from tspipe.models import weights as weight_files
from tspipe.models.weights import Weights
from tspipe.recipes import auto
from tspipe.recipes.schema import Recipe
from tspipe.training import train_teacher, training_data
from tspipe.training.teacher_epochs import teacher_loss
from tspipe.training.train_teacher import TeacherConfig, TrainedTeacher
from tspipe.utils.console import echo, pluralize
from tspipe.utils.distributed import Group
from tspipe.utils.plugins import is_file
from tspipe.utils.progress import remark_once, warn


def needs_training(config: TeacherConfig, dataset: str, file: Path | None, train: bool, command: str) -> bool:
    """Whether the teacher has no weights, neither in `file` nor in its checkpoint, and `train` is set.

    Args:
        config: how to train the teacher.
        dataset: the dataset's name, as a cache states it.
        command: the command that trains the teacher, for the message of the NetworkError that is raised if there are
            no weights and it may not be trained, or if trained weights are published.
    """
    network = config.recipe.teacher.network
    if file or train_teacher.find_checkpoint(dataset, network):
        return False
    if networks.published(network, dataset) or not train:
        path = train_teacher.checkpoint_path(dataset, network)
        raise NetworkError(
            f"There are no weights for {network} on {dataset}: {path} does not exist. {_how_to_get(config, command)}"
        )
    return True


def _how_to_get(config: TeacherConfig, command: str) -> str:
    """Say where the teacher's weights are published, and what training with `command` costs."""
    recipe, settings = config.recipe, config.recipe.teacher
    if (address := networks.published(settings.network, parse(recipe.dataset, config.data).name)) is None:
        return f"Give a file (--weights FILE) or train the teacher: {command}"
    images = open_dataset(recipe.dataset, config.data, split=recipe.split).train
    flops = flops_per_image(recipe, images) * len(images) * settings.epochs
    return (
        f"They are published at {address}: give the file with --weights FILE, or to make as WEIGHTS=FILE. Or train the "
        f"teacher: {command} --download. That takes {flops:.1e} floating-point operations ({settings.epochs} epochs of "
        f"{len(images):,} images): {flops / 1e13 / 3600:.1f} hours on a GPU at 10 TFLOP/s, "
        f"{flops / 1e11 / 86400:.0f} days on a CPU at 0.1 TFLOP/s."
    )


def flops_per_image(recipe: Recipe, images: Images) -> float:
    """Return the floating-point operations of training on one image: two per multiply-add, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    shape, num_classes, count = input_shape(images, recipe.preprocess), len(images.classes), 2
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = networks.build(recipe.teacher.network, num_classes, shape, recipe.teacher.options)
        inputs, labels = torch.empty(count, *shape), torch.zeros(count, dtype=torch.int64)
        teacher_loss(network, inputs, labels)[0].backward()
    total: int = counter.get_total_flops()
    return total / count


def train_on_rank_zero(config: TeacherConfig, dataset: str, group: Group) -> TrainedTeacher | None:
    """Train a teacher on rank 0, into its checkpoint; the other ranks wait for as long as rank 0 lives."""
    trained = None
    if not group.rank:
        network = config.recipe.teacher.network
        echo(f"There are no weights for {network} on {dataset} yet, so the teacher is trained first.")
        trained = train_and_report(replace(config, out=train_teacher.checkpoint_path(dataset, network)))
    group.barrier()
    return trained


def read_weights(config: TeacherConfig, dataset: str, file: Path | None, *, skip_broken: bool = False) -> Weights:
    """Read a teacher's weights from `file`, else from its checkpoint.

    Raises TrainingError if tspipe trained those of the checkpoint on other data, which are those without broken images
    if `skip_broken` is set; for a file, the user decides.
    """
    network, recipe = config.recipe.teacher.network, config.recipe
    path = file or train_teacher.find_checkpoint(dataset, network) or train_teacher.checkpoint_path(dataset, network)
    weights = weight_files.read(path, recipe.teacher.weights_key)
    check_network(weights, network)
    if file is None and "pixels_sha256" in weights.metadata:
        images = open_dataset(recipe.dataset, config.data, download=config.download, split=recipe.split).train
        try:
            training_data.check(weights, training_data.describe(images))
        except DatasetError as problem:
            if skip_broken:
                _check_without_broken(weights, images)
                return weights
            raise DatasetError(
                f"{problem} The teacher was trained with this image. Mend it, or use the teacher as it is: --weights "
                f"{path}"
            ) from problem
    return weights


def _check_without_broken(weights: Weights, images: Images) -> None:
    """Raise TrainingError, after a list of broken images, if the weights were trained on other data than the rest."""
    broken = find_broken(replace(images, check_header=images.read), "train")
    if len(broken) == len(images):
        raise DatasetError(f"No image of the train split can be decoded. The first: {broken[0]}")
    try:
        training_data.check(weights, training_data.describe(images.without(broken)))
    except TrainingError as difference:
        for problem in broken.values():
            warn(problem)
        raise TrainingError(
            f"Without {pluralize(len(broken), 'broken image')}, listed above, the data are not those that "
            f"{weights.source} was trained on. Mend what is broken, or use the teacher as it is: --weights "
            f"{weights.source}"
        ) from difference


def print_teacher(weights: Weights, network: str, dataset: str, file: Path | None) -> None:
    """Print which teacher runs over a dataset, and with which weights; `file` is the one that the user has named."""
    choice = f"{weights.choice}; " if weights.choice else ""
    echo(f"Teacher {network} with the weights {weights.source} ({choice}SHA-256 {weights.sha256[:12]}…) over {dataset}")
    if file is None and "pixels_sha256" not in weights.metadata:
        warn(f"{weights.source} does not record on which data it was trained, so they are not compared with {dataset}.")


def teacher_command(dataset: str, flags: Mapping[str, Any], settings: Iterable[str]) -> str:
    """Return the command that trains a teacher with these flags, except those that are not set."""
    words = ["tspipe", "teacher", "--dataset", dataset]
    words += [word for flag, value in flags.items() if value for word in (flag, str(value))]
    words += [word for setting in settings for word in ("--set", setting)]
    return shlex.join(words)


def train_and_report(config: TeacherConfig) -> TrainedTeacher:
    """Train a teacher; print its test accuracy and where its weights are."""
    trained = train_teacher.train_teacher(config)
    echo(f"Test accuracy {100 * trained.accuracy:.2f} %. The weights are in {trained.path}")
    if trained.remark:
        settings = config.recipe.teacher
        warn(
            f"The teacher {trained.remark}. Likely reasons: labels of other images, a learning rate "
            f"({settings.lr:g}) that is too high or too low, or too few epochs ({settings.epochs})."
        )
    return trained


def check_network(weights: Weights, network: str) -> None:
    """Raise NetworkError if the file was written by tspipe for another network."""
    recorded = weights.metadata.get("network")
    if "identity" in weights.metadata and recorded != networks.recorded_name(network):
        raise NetworkError(
            f"{weights.source} holds the weights of {recorded}, not of {network}: use --teacher {recorded}"
        )


def load_recipe(
    load: Callable[..., Recipe], weights: Weights | None, config: TeacherConfig, choices: Mapping[str, Any] = {}
) -> Recipe:
    """Return the recipe of a teacher, with what its weights record and what `auto` stands for.

    Args:
        load: `recipes.load.load` with its first three arguments.
        weights: those of the teacher, or that its training starts from; None for those that the network names.
        config: has the recipe without all this, and says where the data are.
        choices: values for `auto`, in place of those that follow from the images.
    """
    network = config.recipe.teacher.network
    fit = weights if weights and weights.metadata.get("network") in (None, networks.recorded_name(network)) else None

    def choose(known: Mapping[str, Any]) -> dict[str, Any]:
        recipe, published = config.recipe, train_teacher.published_weights(config.recipe)
        available = weights is None and _are_available(published, config)
        stated = auto.IMAGENET if weights and is_file(network) else {}
        if available or networks.is_from_library(network):
            stated = networks.preprocess(network) or weight_files.stated_preprocess(published)
        images = open_dataset(recipe.dataset, config.data, download=config.download, split=recipe.split).train
        values = auto.settings(images, known, stated, pretrained=available or weights is not None)
        return {**values, "teacher.pretrained": "imagenet" if available else False, **choices}

    return load(recorded_settings(fit, network), choose)


def _are_available(published: str | None, config: TeacherConfig) -> bool:
    """Return whether published weights are on this machine or may be fetched; remark on it if not."""
    network = config.recipe.teacher.network
    try:
        return bool(published and weight_files.pretrained(published, network, download=config.download))
    except weight_files.AbsentWeights as problem:
        remark_once(network, f"{problem}. For now {network} starts from random weights, which need many more images.")
        return False


def recorded_settings(weights: Weights | None, network: str) -> dict[str, dict[str, Any]]:
    """Return the recipe settings that come with the weights, by section.

    They are those that tspipe recorded in the file, else the preprocessing that timm states for a network of its own.
    """
    if weights is None or "preprocess" not in weights.metadata:
        return {"preprocess": stated} if (stated := networks.preprocess(network)) else {}
    try:
        settings = {"preprocess": dict(json.loads(weights.metadata["preprocess"]))}
        TypeAdapter(Preprocess).validate_python(settings["preprocess"])
        if "options" in weights.metadata:
            settings["teacher"] = {"options": dict(json.loads(weights.metadata["options"]))}
    except (TypeError, ValueError, RecursionError):
        raise NetworkError(
            f"{weights.source}: its metadata is damaged. Train the teacher again with `tspipe teacher`."
        ) from None
    return settings
