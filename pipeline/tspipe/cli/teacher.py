"""`tspipe teacher`."""

from pathlib import Path
from typing import Annotated

import typer

from tspipe.cli import options


def teacher(
    dataset: options.Dataset,
    teacher: options.Teacher = None,
    weights: Annotated[Path | None, typer.Option(help="Weights to fine-tune.")] = None,
    data: options.Data = None,
    split: options.Split = None,
    out: Annotated[
        Path | None, typer.Option(help="Output file (default: checkpoints/<dataset>-<network>.safetensors).")
    ] = None,
    epochs: options.Epochs = None,
    recipe: options.Recipe = None,
    settings: options.Settings = None,
    force: Annotated[bool, typer.Option("--force", help="Replace weights of other settings.")] = False,
    download: options.Download = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Train or fine-tune a teacher."""
    from dataclasses import replace
    from functools import partial

    from tspipe.data import datasets
    from tspipe.experiments import report
    from tspipe.models import weights as weight_files
    from tspipe.recipes import load as recipes
    from tspipe.training import teacher_weights as teachers
    from tspipe.training.train_teacher import TeacherConfig

    flags = {"dataset": dataset, "teacher.network": teacher, "teacher.epochs": epochs, "split.fraction": split}
    load = partial(recipes.load, recipe or recipes.default_recipe(dataset), settings or (), flags)
    chosen = load()
    start = weight_files.read(weights, chosen.teacher.weights_key) if weights else None
    config = TeacherConfig(chosen, data, start, out, force, download)
    trained = teachers.train_and_report(replace(config, recipe=teachers.load_recipe(load, start, config)))
    report.show_teacher(trained, chosen.teacher.network, datasets.parse(dataset, data).name)
