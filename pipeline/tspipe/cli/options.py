"""Flags that several commands share. Nothing here imports a stage, so that `tspipe --help` answers at once."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tspipe.utils import plugins

# What `tspipe cache` says of the number of views, from the measurements in docs/results.md.
VIEWS_ADVICE = "As many views as epochs equal new crops and flips in every epoch."


def _completion(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """Return a shell completion for these names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def _recipe_names() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parents[1].glob("recipes/*.toml"))


def _explain_settings(values: list[str] | None) -> list[str] | None:
    """Say where settings are explained, for `--set help`, even without the flags that the command requires."""
    if values and "help" in values:
        print(
            "tspipe recipe NAME shows every setting with its value, default and meaning, as in: tspipe recipe digits\n"
            "Override one with --set setting=value, as in: --set teacher.lr=0.01"
        )
        raise typer.Exit
    return values


# Panels of --help
_CONTENTS, _COMMON = "Contents of the file", "Settings, downloads and trust"
NETWORKS, LOSSES, DATASETS = (
    _completion(partial(plugins.names, package)) for package in ("models.networks", "losses", "data.datasets")
)

Dataset = Annotated[
    str,
    typer.Option(help="A name (see tspipe list datasets), folder:PATH, or a file ./mine.py.", autocompletion=DATASETS),
]
Data = Annotated[
    Path | None, typer.Option(help="The dataset's folder (default: data/<name>; of photos PATH, or <name>).")
]
Split = Annotated[
    float | None,
    typer.Option(
        metavar="FRACTION", help="Hold back this share of each class for testing, if the folder has no test split."
    ),
]
Teacher = Annotated[str | None, typer.Option(help="The network (default: the recipe's).", autocompletion=NETWORKS)]
TeacherFile = Annotated[
    str | None,
    typer.Option("--teacher", help="The Python file of the teacher's network, if it is yours: ./mine.py."),
]
Arms = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Train some of the arms alone, own, alone-random, taught and random."),
]
Download = Annotated[
    bool,
    typer.Option(
        "--download", help="Download the dataset and pretrained weights if they are missing.", rich_help_panel=_COMMON
    ),
]
RECIPES = _completion(_recipe_names)


def _trust_remote_code(value: bool) -> bool:
    if value:
        from tspipe.models import networks

        networks.trust_remote_code()
    return value


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Fetch and run the code of networks hub:OWNER/REPO@COMMIT:NAME.",
        callback=_trust_remote_code,
        rich_help_panel=_COMMON,
    ),
]
Unlabelled = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="A folder of additional images without labels.")
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="A recipe's name or TOML file (default: the dataset's).", autocompletion=RECIPES, rich_help_panel=_COMMON
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe's setting (--set help says which there are); repeatable.",
        is_eager=True,
        callback=_explain_settings,
        rich_help_panel=_COMMON,
    ),
]
TeacherWeights = Annotated[Path | None, typer.Option(help="The teacher's weights (default: its file in checkpoints/).")]
CacheOut = Annotated[
    Path | None,
    typer.Option(
        help="Output file (default: cache/<dataset>.h5; with a teacher other than the recipe's, "
        "cache/<dataset>-<network>.h5)."
    ),
]
PortableTeacher = Annotated[
    bool,
    typer.Option(
        "--portable-teacher",
        help="Store the teacher's operations, so that it runs without its Python file.",
        rich_help_panel=_CONTENTS,
    ),
]
StoreImages = Annotated[
    bool,
    typer.Option(
        "--images", help="Store the pixels too, so that stage two needs no dataset.", rich_help_panel=_CONTENTS
    ),
]
RandomPool = Annotated[
    int | None,
    typer.Option(
        metavar="P", min=1, help="Label P random images too, to train without a teacher.", rich_help_panel=_CONTENTS
    ),
]
StoredViews = Annotated[
    int | None,
    typer.Option(
        metavar="V",
        help=f"Store V shifted and flipped views of each training image. {VIEWS_ADVICE}",
        rich_help_panel=_CONTENTS,
    ),
]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out images that are broken.", rich_help_panel=_CONTENTS)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs (default: the recipe's).")]
Students = Annotated[
    list[str] | None,
    typer.Option("--student", help="A network; repeatable (default: the recipe's).", autocompletion=NETWORKS),
]
Losses = Annotated[
    list[str] | None,
    typer.Option(
        "--loss",
        help="A loss (see tspipe list losses), all, or a file ./mine.py; repeatable.",
        autocompletion=LOSSES,
    ),
]
Match = Annotated[
    str | None,
    typer.Option(metavar="METHOD", help="Keep the students' native feature width: linear, autoencoder or none."),
]
CacheToTrainOn = Annotated[str, typer.Option("--cache", help="The feature cache.", metavar="FILE|URL")]
File = Annotated[Path, typer.Argument(help="A feature cache.")]
FileOrUrl = Annotated[str, typer.Argument(metavar="FILE|URL", help="A feature cache.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
TrainTeacher = Annotated[
    bool, typer.Option("--train-teacher", help="First train the teacher if it has no weights and none are published.")
]
