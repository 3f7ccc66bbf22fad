"""Loads a recipe: its TOML file, what it is laid upon, and the settings of the command line."""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tspipe.data.preprocess import Preprocess
from tspipe.data.views import Views
from tspipe.errors import DatasetError, RecipeError
from tspipe.recipes.schema import Compute, Features, Recipe, Student, Teacher
from tspipe.utils.plugins import is_file, unknown
from tspipe.utils.plugins import names as plugin_names

if TYPE_CHECKING:
    from tspipe.recipes.schema import Recipe


def names() -> list[str]:
    """The recipes that come with tspipe."""
    folder = resources.files("tspipe") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def default_recipe(spec: str) -> str:
    """The recipe a dataset has when none is named: that of its name.

    Raises DatasetError for an unknown dataset, RecipeError for one without a recipe.
    """
    name = Path(spec.partition(":")[0]).stem
    if not is_file(spec) and name not in (known := plugin_names("data.datasets")):
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
) -> Recipe:
    """The recipe of this name, or at this path (`mine.toml`), with overrides applied on top.

    A recipe may say upon which `base` it is laid: fields that it does not state are those of the base. One that states
    neither that nor a dataset, as `strong`, is laid upon the recipe of the dataset that is asked for.

    Args:
        name: one of `names()`, or the path of a TOML file; of several, between commas, each is laid upon those before.
        facts: fields by section that the weights or the cache state themselves; they go before the recipe, and
            after overrides and flags.
        overrides: `field.name=value` texts, as given with `--set`; a value is read as JSON where it is JSON.
        flags: values of command-line flags by dotted field name; those that are None leave the recipe's.

    Raises RecipeError in one sentence: unknown field (the nearest named), wrong type, out of range.
    """
    asked = [(path, value) for path, value in (flags or {}).items() if value is not None]
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"--set {override}: write it as field=value, for example --set lr=0.01")
        asked.append((path.strip(), _value(value.strip())))
    fields = _fields(name, dict(asked).get("dataset"))
    for section, stated in (facts or {}).items():
        fields[section] = {**fields.get(section, {}), **stated}
    for path, value in asked:
        _put(fields, path, value)
    try:
        return Recipe(**fields)
    except ValidationError as problem:
        raise RecipeError(_sentence(problem, name)) from None


def _fields(name: str, dataset: str | None, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """What recipes say, each laid upon those before it and the first upon its base; `above`: whose base this is."""
    fields: dict[str, Any] = {}
    for part in name.split(","):
        try:
            own = tomllib.loads(_text(part))
        except tomllib.TOMLDecodeError as problem:
            raise RecipeError(f"The recipe {part} is not TOML: {problem}.") from None
        base = own.pop("base", None)
        if not fields and base is None and dataset and "dataset" not in own:
            base = default_recipe(dataset)
        if not isinstance(base, str | None):
            raise RecipeError(f"The recipe {part} has a base that is no name: {base!r}.")
        if base in (*above, part):
            raise RecipeError(f"The recipe {part} is its own base.")
        fields = _laid_upon(_fields(base, None, (*above, part)) if base else fields, own)
    return fields


def _laid_upon(fields: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with others in their place, section by section; an empty section empties it."""
    laid = dict(fields)
    for name, value in others.items():
        sections = isinstance(value, dict) and isinstance(laid.get(name), dict)
        laid[name] = _laid_upon(laid[name], value) if sections and value else value
    return laid


def _text(name: str) -> str:
    try:
        if name.endswith(".toml"):
            return Path(name).read_text(encoding="utf-8")
        if name in names():
            return (resources.files("tspipe") / "recipes" / f"{name}.toml").read_text()
    except (OSError, UnicodeDecodeError) as problem:
        raise RecipeError(
            f"The recipe {name} cannot be read: {getattr(problem, 'strerror', 'not UTF-8')}."
        ) from problem
    raise RecipeError(unknown("recipe", name, names()))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def _put(fields: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise RecipeError(f"--set {path}: {section!r} is a single value, not a section.")
    fields[last] = value


def _sentence(problem: ValidationError, name: str) -> str:
    first = problem.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(str(first["loc"][-1]), _known_fields(), n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"The recipe {name} has no field {where!r}.{hint}"
    if first["type"] == "missing":
        return f"The recipe {name} lacks the field {where!r}."
    if first["type"] == "value_error":
        return f"The recipe {name}: {f'{where}: ' if where else ''}{str(first['ctx']['error']).rstrip('.')}."
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"The recipe {name}: {where} cannot be {json.dumps(first['input'], default=str)}: {message}."


def _known_fields() -> list[str]:
    sections = (Recipe, Teacher, Features, Compute, Views, Student)
    return [*(field for section in sections for field in section.model_fields), *Preprocess.__dataclass_fields__]


def recipe_for_cache(
    file: str, manifest: dict[str, Any], recipe: str | None, settings: list[str] | None, flags: dict[str, Any]
) -> tuple["Recipe", Path]:
    """The recipe for a cache's dataset, preprocess and views, and where that dataset usually lies."""
    from tspipe.data import datasets, views
    from tspipe.recipes import load as recipes

    dataset: str = manifest["dataset"]["name"]
    if recipe is None and dataset.partition(":")[0] not in datasets.names():
        raise RecipeError(
            f"{file} is of the dataset {dataset!r}, which is not one of tspipe's. Name its file and a recipe: "
            f"--set dataset=./{dataset}.py --recipe NAME"
        )
    facts = {"preprocess": manifest["preprocess"], **views.facts(manifest)}
    chosen = recipes.load(
        recipe or recipes.default_recipe(dataset), settings or (), {"dataset": dataset, **flags}, facts
    )
    return chosen, Path("data") / datasets.stem(dataset)
