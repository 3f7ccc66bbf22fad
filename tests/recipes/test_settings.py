"""The list of settings: complete, described, and consistent with the schema."""

import json
import subprocess
import sys
import tomllib
from importlib import resources

import pytest

from tspipe.recipes import load
from tspipe.recipes.settings import Setting, settings, settings_markdown

BY_NAME = {setting.name: setting for setting in settings()}
WITH_DEFAULT = [s for s in settings() if s.default and "NAME" not in s.name and not s.name.startswith("paper.")]


def paths(fields: dict, prefix: str = "") -> list[str]:
    """Return the dotted names of the values in a recipe's file, as the list of settings has them."""
    names = []
    for key, value in fields.items():
        name = prefix + ("NAME" if prefix in ("students.", "losses.", "paper.accuracy.") else key)
        nested = isinstance(value, dict) and value and name not in BY_NAME
        names += paths(value, f"{name}.") if nested else [name]
    return names


def test_settings() -> None:
    assert len(BY_NAME) == len(settings())
    assert BY_NAME["teacher.momentum"] == Setting(
        "teacher.momentum", "number ≥ 0 and < 1", "0.9", "The momentum of SGD."
    )
    assert BY_NAME["students.NAME.lr"] == Setting(
        "students.NAME.lr", "number > 0 or none", "none", "The initial learning rate. None keeps the recipe's value."
    )
    assert BY_NAME["dataset"].default == ""
    assert BY_NAME["mse_weight"].type == "number ≥ 0 or auto"


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.name)
def test_every_setting_has_a_description(setting: Setting) -> None:
    assert setting.description[0].isupper() or setting.description.startswith("(height")
    assert setting.description.endswith(".")
    assert "|" not in "".join(setting)


@pytest.mark.parametrize("setting", WITH_DEFAULT, ids=lambda setting: setting.name)
def test_every_default_can_be_set(setting: Setting) -> None:
    value = load.load("digits", [f"{setting.name}={setting.default}"]).model_dump(mode="json")
    for part in setting.name.split("."):
        value = value[part]
    text = value if isinstance(value, str) else json.dumps(value)
    assert text == setting.default.replace("none", "null")


@pytest.mark.parametrize("name", load.names())
def test_every_field_of_a_recipe_is_listed(name: str) -> None:
    fields = tomllib.loads((resources.files("tspipe") / "recipes" / f"{name}.toml").read_text())
    emptied = {"alone", "students"}  # sections that a recipe removes from its base
    assert set(paths(fields)) <= BY_NAME.keys() | emptied | {"base"}


def test_listing_them_imports_neither_torch_nor_h5py() -> None:
    program = (
        "import sys; from tspipe.cli.app import app\n"
        "app(['list', 'settings'], standalone_mode=False)\n"
        "print(sorted(sys.modules.keys() & {'torch', 'h5py'}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "The momentum of SGD." in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_markdown() -> None:
    lines = settings_markdown().splitlines()
    assert len(lines) == len(settings()) + 2
    assert all(line.count("|") == 5 for line in lines)
    assert "| `lr` | number > 0 | `0.001` | The initial learning rate. |" in lines
    assert "| `dataset` | string |  | A dataset's name, folder:PATH, or the path of a Python file. |" in lines
