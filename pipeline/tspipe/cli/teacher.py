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
) -> None:
    """Train or fine-tune a teacher."""
    from tspipe.experiments import report
    from tspipe.models import networks
    from tspipe.models import weights as weight_files
    from tspipe.recipes import load as recipes
    from tspipe.training import teacher_weights as teachers
    from tspipe.training.train_teacher import TeacherConfig

    flags = {"dataset": dataset, "teacher.network": teacher, "teacher.epochs": epochs, "split.fraction": split}
    name = recipe or recipes.default_recipe(dataset)
    chosen = recipes.load(name, settings or (), flags)
    start = weight_files.read(weights, chosen.teacher.weights_key) if weights else None
    network = chosen.teacher.network
    same = start if start and start.metadata.get("network") == networks.recorded_name(network) else None
    chosen = recipes.load(name, settings or (), flags, teachers.recorded_settings(same, network))
    trained = teachers.train_and_report(TeacherConfig(chosen, data, start, out, force, download))
    report.show_teacher(trained, network, dataset)
