"""The commands on cache files: what is in them, are they sound, how do they differ, and how a team shares them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tspipe.errors import CacheDamaged

if TYPE_CHECKING:
    from tspipe.cache import Cache
    from tspipe.cache.verify import Damage

RecipeName = Annotated[str | None, typer.Option("--recipe", help="A recipe's name or TOML file; else the dataset's.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field of the recipe; repeatable.")
]
File = Annotated[Path, typer.Argument(help="A feature cache.", show_default=False)]
FileOrUrl = Annotated[str, typer.Argument(metavar="FILE|URL", help="A feature cache.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace another file of that name.")]


def info(file: FileOrUrl) -> None:
    """What is in a cache, in one screen; of a URL only the head is read."""
    from tspipe.cache import open_cache
    from tspipe.cache.remote import is_url
    from tspipe.cli.render import show_cache

    if is_url(file):
        from tspipe.cache.transfer import peek

        show_cache(peek(file))
    else:
        show_cache(open_cache(file))


def verify(
    file: File,
    folder: Annotated[
        Path | None, typer.Argument(help="Where its dataset lies; else data/<name>.", show_default=False)
    ] = None,
    data: Annotated[bool, typer.Option("--data", help="Compare every image of the dataset with the cache.")] = False,
    teacher: Annotated[int, typer.Option(metavar="N", min=0, help="Run the teacher again on N random images.")] = 0,
    repair: Annotated[bool, typer.Option("--repair", help="Put back the damaged rows, computed again.")] = False,
    weights: Annotated[
        Path | None, typer.Option(help="The teacher's, where the cache has none or damaged ones.", show_default=False)
    ] = None,
    recipe: RecipeName = None,
    settings: Settings = None,
) -> None:
    """Is every byte of a cache what was written?"""
    from tspipe.cache import open_cache
    from tspipe.cache.inspect import inspect
    from tspipe.recipes.load import recipe_for_cache
    from tspipe.utils.console import size

    damage = _find_damage(file)
    if damage and not repair:
        raise _damaged(file, damage)
    if data or teacher or damage:
        from tspipe.extraction import verify as stage
        from tspipe.models import weights as weight_files

        manifest = inspect(file, identified=False).manifest
        chosen, usual = recipe_for_cache(str(file), manifest, recipe, settings, {})
        config = stage.VerifyConfig(chosen, folder or usual, weight_files.read(weights) if weights else None)
    while damage:
        stage.repair(file, damage, config)
        say("Put back: " + "; ".join(part.where for part in damage))
        before, damage = damage, _find_damage(file)  # behind some damage other damage may have been hidden
        if damage == before:
            raise _damaged(file, damage)
    opened = open_cache(file)
    images = sum(opened.manifest["dataset"]["rows"].values())
    say(f"{file} is what was written: {images:,} images, {size(file.stat().st_size)}, id {opened.id[:12]}")
    if data:
        say(f"All {stage.match_data(opened, config):,} images are those of the dataset here.")
    if teacher:
        stage.show(stage.compare_teacher(opened, config, teacher))


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A feature cache, or its URL.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", help="Another to compare it with.", show_default=False)],
) -> None:
    """What differs between two caches; exit code 0 where nothing does, else 1."""
    from tspipe.cache import open_cache
    from tspipe.cache.diff import compare
    from tspipe.cli.render import show_diff

    found = compare(open_cache(local(first)), open_cache(local(second)))
    show_diff(found)
    if not found.same:
        raise typer.Exit(1)


def push(
    file: File,
    url: Annotated[
        str, typer.Argument(metavar="URL", help="A folder, or an address: s3://, gs://, hf://.", show_default=False)
    ],
    force: Force = False,
) -> None:
    """Put a cache where a team finds it, with its SHA-256 beside it."""
    from tspipe.cache import open_cache, transfer
    from tspipe.utils.progress import moving

    opened = open_cache(file)
    _sound(file)
    with moving(f"pushing {file.name}", lambda: 2 * opened.size) as moved:  # there, and read back
        pushed = transfer.push(file, url, moved, force=force)
    say(f"{pushed.address} {'has the file now' if pushed.new else 'had the file already'}: id {opened.id[:12]}")
    _say_carried(opened)
    say(f"Beside it lies its SHA-256. Next: tspipe student --cache {pushed.address}")


def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where somebody pushed it.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="A file, or a folder to put it into.", show_default=False)] = None,
    force: Force = False,
) -> None:
    """Fetch a cache and check it; an interrupted pull goes on where it stopped."""
    from tspipe.cache import open_cache, transfer
    from tspipe.utils.progress import moving

    out = out or Path("cache")
    out = out / transfer.file_name(url) if out.suffix != ".h5" or out.is_dir() else out
    with moving(f"pulling {out.name}", lambda: transfer.remote_size(url)) as moved:
        pulled = transfer.pull(url, out, moved, force=force)
    if not pulled.stated:
        _sound(out)
    opened = open_cache(out)
    checked = "its SHA-256 is the one stated" if pulled.stated else "no SHA-256 is stated; its own checksums are right"
    say(f"{out} {'is here now' if pulled.new else 'was here already'}: id {opened.id[:12]}, {checked}")
    _say_carried(opened)
    say(f"Next: tspipe student --cache {out}")


def list_(
    what: Annotated[str, typer.Argument(metavar="datasets|networks|losses|recipes|caches", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Where caches are looked for.")] = Path("cache"),
) -> None:
    """The datasets, networks, losses and recipes there are, or the caches in a folder."""
    from tspipe.cli.render import show_caches
    from tspipe.recipes import load as recipes
    from tspipe.utils import plugins

    if what == "caches":
        show_caches(folder)
        return
    packages = {package.rpartition(".")[2]: package for package in plugins.KINDS}
    if what != "recipes" and what not in packages:
        raise typer.BadParameter(f"{what!r}: choose from datasets, networks, losses, recipes, caches")
    for name in recipes.names() if what == "recipes" else plugins.names(packages[what]):
        print(name)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of finished runs.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="A folder; else the run's own, or one in reports/.", show_default=False)
    ] = None,
) -> None:
    """Tables, figures and one HTML file of finished runs."""
    from tspipe.experiments import report as reports
    from tspipe.experiments.results import open_run

    reports.make([open_run(path) for path in {path.resolve(): path for path in runs}.values()], out)


def local(cache: str) -> Path:
    """The path of a cache; one at a URL is fetched once and kept, and used again while the remote is unchanged."""
    from tspipe.cache import transfer
    from tspipe.utils.progress import moving

    if not transfer.is_url(cache):
        return Path(cache)
    name = transfer.without_secrets(cache)
    with moving(f"fetching {transfer.file_name(cache)}", lambda: transfer.remote_size(cache)) as moved:
        found = transfer.fetch(cache, moved)
    if found.how == "fetched":
        say(f"Fetched {name} to {found.path}")
    elif found.how == "unchanged":
        say(f"{name} is unchanged: using the copy {found.path}")
    else:
        reason = found.problem.split(". ")[0]
        say(f"Using the copy of {name}: {reason}.")
    if not found.stated:
        _sound(found.path)
    return found.path


def say(text: str) -> None:
    """Print a line now, harmless for a terminal whatever is in it."""
    from tspipe.utils import console

    console.say(text)


def _say_carried(opened: "Cache") -> None:
    from tspipe.cache.transfer import carried

    for line in carried(opened):
        say(f"  It carries {line}.")


def _find_damage(file: Path) -> list["Damage"]:
    from tspipe.cache.verify import find_damage
    from tspipe.utils.progress import moving

    with moving(f"reading {file.name}", lambda: file.stat().st_size) as moved:
        return find_damage(file, moved)


def _damaged(file: Path, damage: list["Damage"]) -> CacheDamaged:
    from tspipe.cache.verify import explain

    return CacheDamaged(explain(file, damage))


def _sound(file: Path) -> None:
    """Raise CacheDamaged unless every byte is what was written."""
    if damage := _find_damage(file):
        raise _damaged(file, damage)
