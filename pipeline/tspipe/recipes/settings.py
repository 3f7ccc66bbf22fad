"""The list of all settings, generated from the schema of recipes."""

import itertools
import json
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.text import Text

from tspipe.recipes.schema import Optimisation, Recipe

_TYPES = {"boolean": "true or false", "null": "none", "object": "table"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


class Setting(NamedTuple):
    """One setting of a recipe, as text.

    Attributes:
        name: dotted, as in `--set NAME=VALUE`. `NAME` in it stands for a student's or a loss's name.
        type: the values that it accepts.
        default: as in `--set`; empty for a setting without a default.
        description: a sentence or two.
    """

    name: str
    type: str
    default: str
    description: str


def settings() -> list[Setting]:
    """Return all settings, the top-level ones first."""
    schema = Recipe.model_json_schema()
    return sorted(_walk(schema, schema["$defs"], ""), key=lambda setting: "." in setting.name)


def settings_markdown() -> str:
    """Return all settings as a Markdown table."""
    rows = (
        f"| `{name}` | {kind} | {default and f'`{default}`'} | {description} |"
        for name, kind, default, description in settings()
    )
    return "\n".join(["| setting | values | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def settings_text() -> Text:
    """Return all settings with their defaults and the values that they accept, for a terminal."""
    return _grouped(_entry(one, one.default, one.type) for one in settings())


def recipe_values(recipe: Recipe, automatic: Collection[str] = ()) -> Iterator[tuple[Setting, Any]]:
    """Yield each setting with a recipe's value; `NAME` is replaced by the names that the recipe has settings of.

    The values of `automatic` settings are `auto`.
    """
    fields = recipe.model_dump(mode="json")
    for setting in settings():
        for name, value in _values(fields, setting.name.split(".")):
            yield setting._replace(name=name), "auto" if name in automatic else value


def recipe_text(recipe: Recipe, automatic: Collection[str] = ()) -> Text:
    """Return the values of `recipe_values` for a terminal; those that are not the default are bold and state it."""
    entries = []
    for setting, value in recipe_values(recipe, automatic):
        text = _text(value)
        changed = text != setting.default
        note = f"default {setting.default}" if changed and setting.default else ""
        entries.append(_entry(setting, text, note, "bold" if changed else ""))
    return _grouped(entries)


def _entry(setting: Setting, value: str, note: str, style: str = "") -> Text:
    text = Text(f"{setting.name} = {value}" if value else setting.name, style)
    if note:
        text.append(f"  ({note})", "not bold dim")
    indent = " " * 4
    meaning = textwrap.fill(setting.description, 80, initial_indent=indent, subsequent_indent=indent)
    return text.append(f"\n{meaning}", "not bold")


def _grouped(entries: Iterable[Text]) -> Text:
    """Join entries, with an empty line between sections, such as `teacher`."""
    sections = itertools.groupby(entries, lambda entry: (re.match(r"\w+\.", entry.plain) or [""])[0])
    return Text("\n\n").join(Text("\n").join(entries) for _, entries in sections)


def _values(fields: Any, path: Sequence[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the value at a path with its dotted name; there are several, or none, where the path has `NAME`."""
    if not path:
        yield prefix[1:], fields
    elif path[0] == "NAME":
        for name, value in fields.items():
            yield from (item for item in _values(value, path[1:], f"{prefix}.{name}") if item[1] is not None)
    elif fields is not None:
        yield from _values(fields[path[0]], path[1:], f"{prefix}.{path[0]}")


def _walk(section: Mapping[str, Any], sections: Mapping[str, Any], prefix: str) -> Iterator[Setting]:
    for name, field in section["properties"].items():
        name = f"{prefix}{name}"
        entries = field.get("additionalProperties")
        if isinstance(entries, dict) and not entries.keys().isdisjoint({"$ref", "additionalProperties"}):
            name = f"{name}.NAME"
        if nested := _section(field, sections) or _section(entries, sections):
            yield from _walk(nested, sections, f"{name}.")
        else:
            default = _text(field["default"]) if "default" in field else ""
            yield Setting(name, _type(field), default, field.get("description") or _inherited(name))


def _section(field: Any, sections: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the section that a field's schema refers to, if any."""
    if not isinstance(field, dict):
        return None
    references = [option["$ref"] for option in (field, *field.get("anyOf", ())) if "$ref" in option]
    section: Mapping[str, Any] | None = sections[references[0].rpartition("/")[2]] if references else None
    return section


def _inherited(name: str) -> str:
    """Return the description of a field of `Overrides`, from the recipe's field that it replaces."""
    return f"{Optimisation.model_fields[name.rpartition('.')[2]].description} None keeps the recipe's value."


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if values := field.get("enum") or ([field["const"]] if "const" in field else []):
        return " or ".join(map(str, values))
    if "prefixItems" in field:
        return f"[{', '.join(map(_type, field['prefixItems']))}]"
    if field["type"] == "array":
        return f"list of {_type(field['items'])}s"
    name: str = _TYPES.get(field["type"], field["type"])
    bounds = [f"{sign} {field[bound]:g}" for bound, sign in _BOUNDS.items() if bound in field]
    return f"{name} {' and '.join(bounds)}".strip()


def _text(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
