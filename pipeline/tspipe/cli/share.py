"""The commands that share caches, and the list of what there is."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from tspipe.cli import options
from tspipe.errors import CacheDamaged
from tspipe.utils.console import echo, quote

if TYPE_CHECKING:
    from tspipe.cache import Cache
    from tspipe.cache.verify import Damage


class StudentInputs(NamedTuple):
    """What stage two may need beside a cache, as words of its command line; None for what it need not be told.

    Attributes:
        data: the folder of the dataset's images.
        dataset: the Python file of the dataset.
        teacher: the Python file of the teacher's network, or its name if that is one of torch.hub.
        more: further words.
    """

    data: str | None = None
    recipe: str | None = None
    dataset: str | None = None
    teacher: str | None = None
    more: Sequence[str] = ()


def push(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A cache, a student, an export, or a run folder.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="A folder, or an address: s3://, gs://, hf://.")],
    student: Annotated[
        str | None, typer.Option(help="Which student of a run folder: a name or a pattern (default: the best).")
    ] = None,
    force: options.Force = False,
) -> None:
    """Publish a cache, a student or an export, with its SHA-256 beside it."""
    from tspipe.cache import open_cache, transfer
    from tspipe.utils.progress import byte_progress

    if file.suffix != ".h5":
        _push_model(file, url, student, force)
        return
    opened = open_cache(file)
    check_intact(file)
    with byte_progress(f"pushing {file.name}", lambda: 2 * opened.size) as moved:  # written, and read back
        pushed = transfer.push(file, url, moved, force=force)
    echo(f"{'Pushed to' if pushed.new else 'Already at'} {pushed.address}: id {opened.id[:12]}")
    _print_contents(opened)
    needs, command = _receiver(opened, pushed.address)
    for line in needs:
        echo(f"  {line}")
    echo(f"Its SHA-256 is in a file beside it. Next: {command}")


def _push_model(source: Path, url: str, student: str | None, force: bool) -> None:
    from tspipe.deploy import model_card, publish
    from tspipe.deploy.student import find_students
    from tspipe.utils.progress import byte_progress

    file = find_students(source, student)[0] if source.is_dir() else source
    facts = publish.read_facts(file)
    files = publish.files_of(file, facts)
    size = 2 * sum(path.stat().st_size for path in files)
    with byte_progress(f"pushing {file.name}", lambda: size) as moved:
        pushed = publish.push_files(files, url, moved, force=force)
    echo(f"{'Pushed to' if pushed.new else 'Already at'} {pushed.address}: SHA-256 {pushed.sha256[:12]}")
    echo(f"  The receiver needs {', '.join(publish.needs(file, facts))}.")
    if card := publish.push_card(facts, pushed, force=force):
        echo(f"  {card}")
    echo(f"Its SHA-256 is in a file beside it. Next: {model_card.command(pushed.address, file, facts)}")


def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="The address of a cache, a student or an export.")],
    out: Annotated[
        Path | None, typer.Option(help="A file or folder (default: cache/, or this folder for models).")
    ] = None,
    force: options.Force = False,
) -> None:
    """Download a cache, a student or an export and check it; an interrupted pull resumes."""
    from tspipe.cache import address, open_cache, transfer
    from tspipe.utils.progress import byte_progress

    name = address.file_name(url)
    is_cache = name.endswith(address.CACHE_SUFFIX)
    out = out or Path("cache" if is_cache else ".")
    out = out / name if out.suffix != Path(name).suffix or out.is_dir() else out
    with byte_progress(f"pulling {out.name}", lambda: transfer.remote_size(url)) as moved:
        pulled = transfer.pull(url, out, moved, force=force)
    done = "Pulled" if pulled.new else "Already have"
    if not is_cache:
        _show_pulled_model(url, out, f"{done} {out}", pulled.published, force)
        return
    opened = open_cache(out)
    checked = "its SHA-256 matches" if pulled.published else "no SHA-256 is published; its own checksums match"
    echo(f"{done} {out}: id {opened.id[:12]}, {checked}")
    _print_contents(opened)
    needs, command = _receiver(opened, str(out))
    for line in needs:
        echo(f"  {line}")
    echo(f"Next: {command}")


def _show_pulled_model(url: str, out: Path, done: str, published: bool, force: bool) -> None:
    """Pull the Python file of a standalone export, too, and print what the model needs. Nothing of it is run."""
    from tspipe.cache import address, transfer
    from tspipe.deploy import model_card, publish
    from tspipe.deploy.facts import ExportFacts

    echo(f"{done}: {'its SHA-256 matches' if published else 'no SHA-256 is published'}")
    facts = publish.read_facts(out)
    if out.suffix == ".safetensors" and isinstance(facts, ExportFacts):
        source = out.with_suffix(".py")
        transfer.pull(address.beside(url, ".py"), source, lambda count: None, force=force)
        echo(f"Pulled {source}, which is code: read it before you run it")
    echo(f"  You need {', '.join(publish.needs(out, facts))}.")
    echo(f"Next: {model_card.command(str(out), out, facts)}")


def _receiver(opened: "Cache", address: str) -> tuple[list[str], str]:
    """Return what training from a cache needs besides the file, a line each, and the command that trains from it."""
    from tspipe.data import datasets
    from tspipe.models import networks

    name, network = opened.manifest["dataset"]["name"], opened.manifest["teacher"]["network"]
    own_dataset = name.partition(":")[0] not in datasets.names()
    inputs = StudentInputs(
        data="FOLDER" if own_dataset or name.startswith("folder") else None,
        recipe="folder" if own_dataset else None,
        dataset=f"./{name}.py" if own_dataset else None,
    )
    lines = ["Training needs no dataset: the pixels are in the file."]
    if not opened.has_images:
        lines = [f"Training needs the dataset {name}, whose images are not in the file."]
    own_network, is_portable = networks.is_user_network(network), "program_sha256" in opened.manifest["teacher"]
    if opened.manifest["random"]:
        lines.append("Random images come from the pool in the file, without the teacher.")
    elif not opened.has_teacher:
        lines.append("Random images need the teacher's weights, which are not in the file, and are left out.")
    elif is_portable and (own_network or network.startswith("hub:")):
        lines.append("Random images need no file of the teacher: the cache has its operations.")
    elif own_network:
        lines.append(f"Random images need the teacher's file (--teacher ./{network}.py), and are left out without it.")
    elif network.startswith("hub:"):
        lines.append(f"Random images need the code of {network}, which runs only with --trust-remote-code.")
    elif networks.is_from_library(network):
        library = opened.manifest["teacher"].get("library", network.partition(":")[0])  # `timm 1.0.31`
        lines.append(f"Random images need {library}, for the teacher {network}.")
    return lines, student_command(opened, address, inputs)


def student_command(opened: "Cache", address: str, inputs: StudentInputs) -> str:
    """Return the command that trains from a cache, with those of the inputs that the file does not hold."""
    from tspipe.models import networks

    words, network = ["tspipe", "student", "--cache", address], opened.manifest["teacher"]["network"]
    if inputs.data and not opened.has_images:
        words += ["--data", inputs.data]
    if inputs.recipe:
        words += ["--recipe", inputs.recipe]
    if inputs.dataset and not opened.has_images:
        words += ["--set", f"dataset={inputs.dataset}"]
    if opened.manifest["random"]:
        words += ["--set", "random_source=pool"]
    elif not opened.has_teacher:
        words += ["--random-images", "0"]
    elif "program_sha256" not in opened.manifest["teacher"]:
        if inputs.teacher:
            words += ["--trust-remote-code"] if network.startswith("hub:") else ["--teacher", inputs.teacher]
        elif networks.is_user_network(network):
            words += ["--random-images", "0"]
    return " ".join(map(quote, [*words, *inputs.more]))


def list_(
    what: Annotated[str, typer.Argument(metavar="datasets|networks|losses|recipes|settings|random-kinds|caches")],
    folder: Annotated[Path, typer.Argument(help="The folder of the caches.")] = Path("cache"),
    cache: Annotated[
        str | None, typer.Option(help="Score each kind of random images with this cache's teacher.")
    ] = None,
    data: options.Data = None,
    settings: options.Settings = None,
) -> None:
    """List datasets, networks, losses, recipes, settings, kinds of random images, or the caches in a folder."""
    from tspipe.utils import plugins

    packages = {package.rpartition(".")[2]: package for package in plugins.KINDS}
    if what in packages:
        libraries = ["timm:NAME", "torchvision:NAME"] if what == "networks" else []
        print(*plugins.names(packages[what]), *libraries, sep="\n")
    elif what == "recipes":
        from tspipe.recipes.load import names

        print(*names(), sep="\n")
    elif what == "settings":
        from tspipe.recipes.settings import settings_text
        from tspipe.utils.console import stdout_console

        stdout_console().print(settings_text())
    elif what == "random-kinds":
        _list_random_kinds(cache, data, settings)
    elif what == "caches":
        from tspipe.cli import render

        render.show_caches(folder)
    else:
        raise typer.BadParameter(
            f"{what!r}: choose from {', '.join(packages)}, recipes, settings, random-kinds, caches"
        )


def recipe(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A recipe's name or TOML file, or several: cifar10,strong.",
            autocompletion=options.RECIPES,
        ),
    ],
    settings: options.Settings = None,
    json_: options.Json = False,
) -> None:
    """Show every setting of a recipe: its value, its default, its meaning."""
    import json

    from tspipe.recipes import load
    from tspipe.recipes.settings import recipe_text, recipe_values
    from tspipe.utils.console import stdout_console

    chosen, automatic = load.load(name, settings or ()), load.automatic_settings(name, settings or ())
    if json_:
        rows = [
            {
                "setting": setting.name,
                "value": value,
                "default": setting.default,
                "values": setting.type,
                "meaning": setting.description,
            }
            for setting, value in recipe_values(chosen, automatic)
        ]
        print(json.dumps(rows, indent=2))
    else:
        stdout_console().print(recipe_text(chosen, automatic))


def _list_random_kinds(cache: str | None, data: Path | None, settings: list[str] | None) -> None:
    from tspipe.data.random_images import KINDS

    if cache is None:
        print(*KINDS, sep="\n")
        return
    from tspipe.cache import open_cache
    from tspipe.cli.render import show_scores
    from tspipe.extraction.score_kinds import score_kinds
    from tspipe.extraction.verify import VerifyConfig
    from tspipe.recipes.load import recipe_for_cache

    opened = open_cache(local_path(cache))
    chosen, default_folder = recipe_for_cache(cache, opened.manifest, None, settings, {})
    show_scores(score_kinds(opened, VerifyConfig(chosen, data or default_folder)), opened.classes)


def local_path(cache: str) -> Path:
    """Return the path of a cache or a model; one at a URL is downloaded once, and kept while it is unchanged there."""
    from tspipe.cache import address, transfer
    from tspipe.utils.progress import byte_progress, warn

    if not address.is_url(cache):
        return Path(cache)
    name = address.without_secrets(cache)
    with byte_progress(f"fetching {address.file_name(cache)}", lambda: transfer.remote_size(cache)) as moved:
        fetched = transfer.fetch(cache, moved)
    if fetched.status == "fetched":
        warn(f"Fetched {name} to {fetched.path}")
    elif fetched.status == "unchanged":
        warn(f"{name} is unchanged: using the copy {fetched.path}")
    else:
        warn(f"Using the copy of {name}: {fetched.problem.split('. ')[0]}.")
    return fetched.path


def find_damage(file: Path) -> list["Damage"]:
    """Compare every byte with its checksum."""
    from tspipe.cache import verify
    from tspipe.utils.progress import byte_progress

    with byte_progress(f"reading {file.name}", lambda: file.stat().st_size) as moved:
        return verify.find_damage(file, moved)


def check_intact(file: Path) -> None:
    """Raise CacheDamaged unless every byte matches its checksum."""
    from tspipe.cache.verify import explain

    if damage := find_damage(file):
        raise CacheDamaged(explain(file, damage))


def _print_contents(opened: "Cache") -> None:
    from tspipe.cache.transfer import describe_contents

    for line in describe_contents(opened):
        echo(f"  It contains {line}.")
