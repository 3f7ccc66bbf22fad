"""Loads a recipe: its TOML file, the recipes that it is based on, and the overrides of the command line."""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tspipe.data import datasets, views
from tspipe.data.random_images import pool
from tspipe.errors import DatasetError, RecipeError
from tspipe.recipes import auto
from tspipe.recipes.schema import Recipe
from tspipe.recipes.settings import settings as all_settings
from tspipe.utils.plugins import is_file, recorded_name, unknown
from tspipe.utils.reading import read_file


def names() -> list[str]:
    """Return the names of tspipe's recipes."""
    folder = resources.files("tspipe") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def default_recipe(dataset: str) -> str:
    """Return the name of the recipe that a dataset has by default: the dataset's name.

    Raises DatasetError for an unknown dataset, RecipeError for a dataset without a recipe.
    """
    name = Path(dataset.partition(":")[0]).stem
    if not is_file(dataset) and name not in (known := datasets.names()):
        raise DatasetError(unknown("dataset", name, known))
    if name not in names():
        raise RecipeError(
            f"There is no recipe for {name}. Name one with --recipe: {', '.join(names())}, or a TOML file."
        )
    return name


def load(
    name: str,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    choose: auto.Choose | None = None,
) -> Recipe:
    """Return a recipe. Precedence, highest first: overrides, flags, facts, the recipe's file, its base.

    A recipe may name a `base`, whose fields it inherits. A recipe with neither `base` nor `dataset`, as `strong`, is
    based on the recipe of the dataset that is asked for.

    Args:
        name: one of `names()`, or the path of a TOML file; or several of these, separated by commas, each of which
            replaces fields of those before.
        overrides: `field.name=value`, as given with `--set`. A value is parsed as JSON if it is JSON.
        flags: values of command-line flags by dotted field name. None keeps the recipe's value.
        facts: fields by section that the metadata of the weights or the manifest of the cache record.
        choose: returns values for the settings in `auto.DEFAULTS` that are `auto`, by dotted name, given the fields of
            the preprocessing that are not. It is called only if there are any; without it, they have the defaults.

    Raises RecipeError for an unknown field (with the nearest known one), a wrong type or a value out of range.
    """
    fields = _fields(name, overrides, flags or {}, facts or {})
    automatic = _automatic(fields)
    for path in automatic:
        _assign(fields, path, auto.DEFAULTS[path])
    recipe = _validated(fields, name)
    if not automatic or choose is None:
        return recipe
    known = {
        field: value for field, value in recipe.preprocess.as_dict().items() if f"preprocess.{field}" not in automatic
    }
    values = choose(known)
    for path in automatic:
        _assign(fields, path, values.get(path, auto.DEFAULTS[path]))
    return _validated(fields, name)


def automatic_settings(name: str, overrides: Iterable[str] = ()) -> list[str]:
    """Return the dotted names of a recipe's settings that are `auto`."""
    return _automatic(_fields(name, overrides, {}, {}))


def _automatic(fields: Mapping[str, Any]) -> list[str]:
    return [path for path in auto.DEFAULTS if _field(fields, path) == "auto"]


def _fields(
    name: str, overrides: Iterable[str], flags: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the fields of a recipe before they are checked; the arguments are those of `load`."""
    assignments = [(path, value) for path, value in flags.items() if value is not None]
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise RecipeError(f"--set {override}: write it as field=value, for example --set lr=0.01")
        assignments.append((path.strip(), _parse_value(text.strip())))
    fields = _read(name, dict(assignments).get("dataset"))
    for section, recorded in facts.items():
        fields[section] = {**fields.get(section, {}), **recorded}
    for path, value in assignments:
        _assign(fields, path, value)
    return fields


def _validated(fields: Mapping[str, Any], name: str) -> Recipe:
    try:
        return Recipe(**fields)
    except ValidationError as error:
        raise RecipeError(_message(error, name)) from None


def recipe_for_cache(
    file: str,
    manifest: dict[str, Any],
    recipe: str | None,
    settings: Iterable[str] | None,
    flags: Mapping[str, Any],
    *,
    pretrained: Callable[[Recipe], bool] = lambda _: False,
) -> tuple[Recipe, Path]:
    """Return the recipe for a cache's dataset, preprocessing and views, and the default folder of the dataset.

    Errors name the cache as `file`. Without `recipe`, it is that of the dataset. `settings` are `overrides` of `load`,
    and `flags` are its flags. If `epochs` is `auto`, `pretrained` says whether all students start from weights.
    """
    dataset: str = manifest["dataset"]["name"]
    if recipe is None and dataset.partition(":")[0] not in datasets.names():
        raise RecipeError(
            f"{file} is of the dataset {dataset!r}, which is not one of tspipe's. Name its file and a recipe: "
            f"--set dataset=./{dataset}.py --recipe NAME"
        )
    network, requested = manifest["teacher"]["network"], flags.get("teacher.network")
    if requested and recorded_name("models.networks", requested) != network:
        raise RecipeError(
            f"The teacher of {file} is {network!r}, not {requested!r}. Leave out --teacher, or give the file of this "
            f"network: --teacher ./{network}.py"
        )
    facts = {"preprocess": manifest["preprocess"], **views.facts(manifest)}
    name, flags = recipe or default_recipe(dataset), {"dataset": dataset, **flags}
    choose = partial(auto.for_students, manifest["dataset"]["rows"]["train"])
    chosen = load(name, settings or (), flags, facts, choose)
    if chosen.random_source == "pool":
        flags = {**pool.facts(manifest), **flags}
        chosen = load(name, settings or (), flags, facts, choose)
    if "epochs" in _automatic(_fields(name, settings or (), flags, facts)) and pretrained(chosen):
        chosen = load(name, settings or (), flags, facts, partial(choose, pretrained=True))
    return chosen, datasets.default_folder(dataset)


def _read(name: str, dataset: str | None, parents: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields of recipes separated by commas; `parents` are the recipes whose base this is."""
    fields: dict[str, Any] = {}
    for part in name.split(","):
        try:
            overrides = tomllib.loads(_text(part))
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"The recipe {part} is not TOML: {error}.") from None
        base = overrides.pop("base", None)
        if not fields and base is None and dataset and "dataset" not in overrides:
            base = default_recipe(dataset)
        if not isinstance(base, str | None):
            raise RecipeError(f"The recipe {part} has a base that is not a name: {base!r}.")
        if base in (*parents, part):
            raise RecipeError(f"The recipe {part} is its own base.")
        fields = _merge(_read(base, None, (*parents, part)) if base else fields, overrides)
    return fields


def _merge(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Replace fields, section by section. An empty section removes all fields of it."""
    merged = dict(fields)
    for name, value in overrides.items():
        both_sections = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both_sections and value else value
    return merged


def _text(name: str) -> str:
    try:
        if name.endswith(".toml"):
            return read_file(Path(name)).decode()
        if name in names():
            return (resources.files("tspipe") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {name} cannot be read: {getattr(error, 'strerror', 'not UTF-8')}.") from error
    raise RecipeError(unknown("recipe", name, names()))


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def _assign(fields: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise RecipeError(f"--set {path}: {section!r} is a single value, not a section.")
    fields[last] = value


def _nearest(path: str) -> str:
    """Return a question that names the settings nearest to an unknown one, or where they are listed."""
    section, _, field = path.rpartition(".")
    names = [setting.name for setting in all_settings()]
    names += {name.rpartition(".")[0] for name in names}  # sections
    if not (near := [name for name in names if name.rpartition(".")[2] == field and "NAME" not in name]):
        in_section = re.sub(r"^(students|losses)\.[^.]+$", r"\1.NAME", section)
        fields = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == in_section]
        near = [f"{section}.{one}".lstrip(".") for one in difflib.get_close_matches(field, fields, n=1, cutoff=0.5)]
    near = near or difflib.get_close_matches(path, names, n=1, cutoff=0.6)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else "All are listed by: tspipe list settings"


def _field(fields: Mapping[str, Any], path: str) -> Any:
    for part in path.split("."):
        fields = fields.get(part, {}) if isinstance(fields, Mapping) else {}
    return fields


def _message(error: ValidationError, name: str) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"The recipe {name} has no field {path!r}. {_nearest(path)}"
    if first["type"] == "missing":
        remedy = f" Put a dataset's recipe before it: cifar10,{name}" if path == "dataset" else ""
        return f"The recipe {name} lacks the field {path!r}.{remedy}"
    if first["type"] == "value_error":
        return f"The recipe {name}: {f'{path}: ' if path else ''}{str(first['ctx']['error']).rstrip('.')}."
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"The recipe {name}: {path} cannot be {json.dumps(first['input'], default=str)}: {reason}."
