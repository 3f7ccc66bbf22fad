"""Flags that several commands share. Nothing here imports a stage, so that `tspipe --help` answers at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tspipe.utils import plugins


def _plugin_names(package: str) -> Callable[[str], list[str]]:
    """Return a shell completion for the names in a package of plug-ins."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in plugins.names(package) if name.startswith(incomplete)]

    return complete


def _recipe_names(incomplete: str) -> list[str]:
    folder = Path(__file__).parents[1] / "recipes"
    return sorted(path.stem for path in folder.glob("*.toml") if path.stem.startswith(incomplete))


NETWORKS, LOSSES, DATASETS = map(_plugin_names, ("models.networks", "losses", "data.datasets"))

Dataset = Annotated[
    str,
    typer.Option(help="A name (see tspipe list datasets), folder:PATH, or a file ./mine.py.", autocompletion=DATASETS),
]
Data = Annotated[Path | None, typer.Option(help="The dataset's folder (default: data/<name>).", show_default=False)]
Teacher = Annotated[
    str | None,
    typer.Option(help="The network (default: the recipe's).", show_default=False, autocompletion=NETWORKS),
]
Download = Annotated[
    bool, typer.Option("--download", help="Download the dataset and pretrained weights if they are missing.")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A recipe's name or TOML file (default: the dataset's).",
        show_default=False,
        autocompletion=_recipe_names,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe setting (see tspipe list settings); repeatable.",
        show_default=False,
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Epochs (default: the recipe's).", show_default=False)]
Seeds = Annotated[int | None, typer.Option(help="Number of seeds (default: the recipe's).", show_default=False)]
Students = Annotated[
    list[str] | None,
    typer.Option(
        "--student",
        help="A network; repeatable (default: the recipe's).",
        show_default=False,
        autocompletion=NETWORKS,
    ),
]
CacheToTrainOn = Annotated[str, typer.Option("--cache", help="The feature cache.", metavar="FILE|URL")]
File = Annotated[Path, typer.Argument(help="A feature cache.", show_default=False)]
FileOrUrl = Annotated[str, typer.Argument(metavar="FILE|URL", help="A feature cache.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
StoreImages = Annotated[
    bool, typer.Option("--images", help="Store the pixels too, so that stage two needs no dataset.")
]
RandomPool = Annotated[
    int | None,
    typer.Option(metavar="P", min=1, help="Label P random images too, to train without a teacher.", show_default=False),
]
Views = Annotated[
    int | None,
    typer.Option(metavar="V", help="Store V shifted and flipped views of each training image.", show_default=False),
]
TrainTeacher = Annotated[
    bool, typer.Option("--train-teacher", help="First train the teacher if it has no weights and none are published.")
]
