"""The import structure: packages in order, and who may import torch, h5py and torch.distributed."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import tspipe
from tspipe.cache import Cache

PACKAGE = Path(tspipe.__file__).parent
# A package imports itself and those to its right.
ORDER = [
    "cli",
    "experiments",
    "deploy",
    "training",
    "extraction",
    "losses",
    "models",
    "recipes",
    "data",
    "cache",
    "utils",
    "errors",
]


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, inside functions as well."""
    modules = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def test_imports_run_downwards_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if package in ("__init__", "__main__"):
            continue
        allowed = set(ORDER[ORDER.index(package) :]) - ({"extraction"} if package == "training" else set())
        used = {module.split(".")[1] for module in imports(path) if module.startswith("tspipe.")}
        assert used <= allowed, path
        modules = {module.split(".")[0] for module in imports(path)}
        assert package != "cache" or "torch" not in modules, path
        assert package == "cache" or "h5py" not in modules, path
        assert path.stem == "distributed" or not any(m.startswith("torch.distributed") for m in imports(path)), path


def test_the_documentation_shows_the_same_order() -> None:
    page = (Path(__file__).parents[1] / "docs/architecture.md").read_text()
    assert re.findall(r"^    ([a-z]+)(?:/|  )", page, re.MULTILINE) == ORDER


def test_the_documentation_lists_every_module() -> None:
    page = (Path(__file__).parents[1] / "docs/architecture.md").read_text()
    entries = dict(re.findall(r"^- \*\*([a-z_/]+)\*\*: (.*?)(?=^- |^## )", page, re.MULTILINE | re.DOTALL))
    folders = [path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    for folder in folders:
        listed = re.findall(r"`(\w+)`", entries.pop(str(folder.relative_to(PACKAGE))))
        assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__"), folder
    assert not entries


def test_names_say_what_a_thing_is() -> None:
    vague = {"said", "told", "found", "wanted", "mine", "there", "here"}
    root = Path(__file__).parents[1]
    for path in (path for folder in ("pipeline", "tests", "benchmarks") for path in (root / folder).rglob("*.py")):
        for node in ast.walk(parse(path)):
            names = {getattr(node, field, None) for field in ("id", "arg", "attr", "name")}
            assert not {name for name in names if isinstance(name, str)} & vague, f"{path}: {ast.unparse(node)}"


def test_classes_of_stage_two_are_small() -> None:
    for path in (PACKAGE / "training").glob("*.py"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 150, f"{path.name}: {node.name}"
                assert len(attributes(node)) <= 8, f"{path.name}: {node.name}"


def attributes(node: ast.ClassDef) -> set[str]:
    """Return the fields of a class, and what its methods set on self."""
    fields = {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
    stored = {
        name.attr
        for name in ast.walk(node)
        if isinstance(name, ast.Attribute) and isinstance(name.ctx, ast.Store) and ast.unparse(name.value) == "self"
    }
    return fields | stored


def test_reading_a_cache_loads_neither_torch_nor_fsspec() -> None:
    program = (
        "import sys, tspipe.cache, tspipe.cache.transfer\n"
        "print(sorted(sys.modules.keys() & {'aiohttp', 'fsspec', 'torch'}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; from tspipe.cli.app import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print('torch' in sys.modules, 'h5py' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False False"


def test_files_classes_and_functions_are_short() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        assert path.read_text().count("\n") <= 400, path
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 150, f"{path.name}: {node.name}"


def test_info_of_a_local_file_imports_no_transfer_code(digits: Cache) -> None:
    program = (
        "import gc, sys; from tspipe.cli.app import main\n"
        "sys.argv[:] = ['tspipe', 'info', sys.argv[1]]\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, 'tspipe.cache.transfer' in sys.modules, gc.get_freeze_count() > 0)"
    )
    result = subprocess.run([sys.executable, "-c", program, digits.path], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 False True"


def test_text_files_have_an_encoding() -> None:
    """Otherwise they would have that of the locale."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                assert node.args or any(word.arg == "encoding" for word in node.keywords), ast.unparse(node)
