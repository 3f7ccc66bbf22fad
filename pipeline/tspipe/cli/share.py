"""The commands that share caches, and the list of what there is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tspipe.cli import options
from tspipe.errors import CacheDamaged
from tspipe.utils.console import echo, quote

if TYPE_CHECKING:
    from tspipe.cache import Cache
    from tspipe.cache.verify import Damage


def push(
    file: options.File,
    url: Annotated[str, typer.Argument(metavar="URL", help="A folder, or an address: s3://, gs://, hf://.")],
    force: options.Force = False,
) -> None:
    """Publish a cache for a team, with its SHA-256 beside it."""
    from tspipe.cache import open_cache, transfer
    from tspipe.utils.progress import byte_progress

    opened = open_cache(file)
    check_intact(file)
    with byte_progress(f"pushing {file.name}", lambda: 2 * opened.size) as moved:  # written, and read back
        pushed = transfer.push(file, url, moved, force=force)
    echo(f"{'Pushed to' if pushed.new else 'Already at'} {pushed.address}: id {opened.id[:12]}")
    _print_contents(opened)
    echo(f"Its SHA-256 is in a file beside it. Next: tspipe student --cache {quote(pushed.address)}")


def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="The address of a cache.")],
    out: Annotated[Path | None, typer.Option(help="A file or folder (default: cache/).")] = None,
    force: options.Force = False,
) -> None:
    """Download a cache and check it; an interrupted pull resumes."""
    from tspipe.cache import address, open_cache, transfer
    from tspipe.utils.progress import byte_progress

    out = out or Path("cache")
    out = out / address.file_name(url) if out.suffix != ".h5" or out.is_dir() else out
    with byte_progress(f"pulling {out.name}", lambda: transfer.remote_size(url)) as moved:
        pulled = transfer.pull(url, out, moved, force=force)
    opened = open_cache(out)
    checked = "its SHA-256 matches" if pulled.published else "no SHA-256 is published; its own checksums match"
    echo(f"{'Pulled' if pulled.new else 'Already have'} {out}: id {opened.id[:12]}, {checked}")
    _print_contents(opened)
    echo(f"Next: tspipe student --cache {quote(out)}")


def list_(
    what: Annotated[str, typer.Argument(metavar="datasets|networks|losses|recipes|settings|caches")],
    folder: Annotated[Path, typer.Argument(help="The folder of the caches.")] = Path("cache"),
) -> None:
    """List datasets, networks, losses, recipes, recipe settings, or the caches in a folder."""
    from tspipe.utils import plugins

    packages = {package.rpartition(".")[2]: package for package in plugins.KINDS}
    if what in packages:
        libraries = ["timm:NAME", "torchvision:NAME"] if what == "networks" else []
        print(*plugins.names(packages[what]), *libraries, sep="\n")
    elif what == "recipes":
        from tspipe.recipes.load import names

        print(*names(), sep="\n")
    elif what == "settings":
        from tspipe.recipes.settings import settings_table
        from tspipe.utils.console import stdout_console

        stdout_console().print(settings_table())
    elif what == "caches":
        from tspipe.cli import render

        render.show_caches(folder)
    else:
        raise typer.BadParameter(f"{what!r}: choose from {', '.join(packages)}, recipes, settings, caches")


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
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every setting of a recipe: its value, its default, its meaning."""
    import json

    from tspipe.recipes import load
    from tspipe.recipes.settings import recipe_table, recipe_values
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
        stdout_console().print(recipe_table(chosen, automatic))


def local_path(cache: str) -> Path:
    """Return the path of a cache; one at a URL is downloaded once, and kept while the remote file is unchanged."""
    from tspipe.cache import address, transfer
    from tspipe.utils.progress import byte_progress

    if not address.is_url(cache):
        return Path(cache)
    name = address.without_secrets(cache)
    with byte_progress(f"fetching {address.file_name(cache)}", lambda: transfer.remote_size(cache)) as moved:
        fetched = transfer.fetch(cache, moved)
    if fetched.status == "fetched":
        echo(f"Fetched {name} to {fetched.path}")
    elif fetched.status == "unchanged":
        echo(f"{name} is unchanged: using the copy {fetched.path}")
    else:
        echo(f"Using the copy of {name}: {fetched.problem.split('. ')[0]}.")
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
