"""Where a teacher's weights come from: a file, what an earlier training left, or training now."""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tspipe.errors import NetworkError
from tspipe.models import networks, weights
from tspipe.models.weights import Weights
from tspipe.training import train_teacher
from tspipe.training.train_teacher import TeacherConfig
from tspipe.utils.console import say


def obtain(config: TeacherConfig, dataset: str, given: Path | None, train: bool, command: str) -> Weights:
    """A teacher's weights: those `given`, else its checkpoint, else, where `train` allows it, newly trained ones.

    Args:
        config: how to train it.
        dataset: its name as a cache states it.
        command: what trains it, for the message of the NetworkError where it may not be trained, or where trained
            weights are published.
    """
    network = config.recipe.teacher.network
    path = given or train_teacher.find_checkpoint(dataset, network)
    if path is None:
        path = train_teacher.checkpoint_path(dataset, network)
        if networks.published(network, dataset) or not train:
            raise NetworkError(
                f"There are no weights for {network} on {dataset}: {path} does not exist. "
                + train_teacher.how_to_get(config, command)
            )
        say(f"{network} has no weights for {dataset} yet, so it is trained first.")
        train_and_say(replace(config, out=path))
    found = weights.read(path)
    check_network(found, network)
    return found


def say_which(found: Weights, network: str, dataset: str) -> None:
    """Say which teacher runs over a dataset, with which weights."""
    say(f"Teacher {network} with the weights {found.source} (SHA-256 {found.sha256[:12]}…) over {dataset}")


def command(dataset: str, flags: Mapping[str, Any], settings: Iterable[str]) -> str:
    """The command that trains a teacher, of the flags that are given."""
    words = ["tspipe", "teacher", "--dataset", dataset]
    words += [word for flag, value in flags.items() if value for word in (flag, str(value))]
    words += [word for setting in settings for word in ("--set", setting)]
    return shlex.join(words)


def train_and_say(config: TeacherConfig) -> None:
    """Train a teacher, and say what came of it."""
    trained = train_teacher.train_teacher(config)
    say(f"Test accuracy {100 * trained.accuracy:.2f} %. The weights are in {trained.path}")


def check_network(found: Weights, network: str) -> None:
    """Weights that tspipe wrote say of which network they are; raises NetworkError for another."""
    stated = found.metadata.get("network")
    if "identity" in found.metadata and stated != networks.recorded_name(network):
        raise NetworkError(f"{found.source} holds the weights of {stated}, not of {network}: use --teacher {stated}")


def facts(found: Weights | None) -> dict[str, dict[str, Any]]:
    """What a checkpoint of tspipe's says of itself, by section of the recipe; nothing of any other file."""
    if found is None or "preprocess" not in found.metadata:
        return {}
    try:
        stated = {"preprocess": dict(json.loads(found.metadata["preprocess"]))}
        if "options" in found.metadata:
            stated["teacher"] = {"options": dict(json.loads(found.metadata["options"]))}
    except (TypeError, ValueError):
        raise NetworkError(f"{found.source}: its metadata is damaged. Train it again with `tspipe teacher`.") from None
    return stated
