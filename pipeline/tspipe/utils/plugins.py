"""Datasets, networks and losses by name: one file each, no registry.

A name is either a file in the package's own folder (`lenet5` is `networks/lenet5.py`)
or the path of a Python file of the user's (`./mine.py`). Files that begin with an
underscore are shared code and have no name. A file with a dict `VARIANTS` provides
its keys as names instead of its own (`resnet20` is in `networks/cifar_resnet.py`).
"""

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tspipe.errors import TspipeError

KINDS = {"data.datasets": "dataset", "models.networks": "network", "losses": "loss"}
LIBRARIES = ("hub:", "timm:", "torchvision:")  # prefixes of networks that come from a library


def names(folder: str) -> list[str]:
    """Return the names that a package (`data.datasets`, `models.networks`, `losses`) provides, sorted.

    Neither the package nor its files are imported, so that listing names does not load torch.
    """
    return sorted(_files(folder))


def _files(folder: str) -> dict[str, Path]:
    """Return the file that defines each name."""
    spec = importlib.util.find_spec(f"tspipe.{folder}")
    assert spec is not None
    files = [file for path in spec.submodule_search_locations or () for file in Path(path).glob("[!_]*.py")]
    return {name: file for file in files for name in _names_in(file)}


@functools.cache
def _names_in(file: Path) -> list[str]:
    """Return the names that a file defines: the keys of its dict `VARIANTS`, if it has one, else its own name."""
    try:
        statements = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError):  # reported by `load`, when the file is used
        statements = []
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name("VARIANTS")], value=ast.Dict(keys=keys)):
                return [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    return [file.stem]


def is_file(name: str) -> bool:
    """Return whether a name is the path of a user's Python file."""
    return name.endswith(".py")


def recorded_name(folder: str, name: str) -> str:
    """Return the name that a cache or a checkpoint records: `mine` for a user's `./mine.py`, else the name itself.

    Raises TspipeError for a file with the name of one of tspipe's plug-ins, since the record would be ambiguous.
    """
    if not is_file(name):
        return name
    stem = plain(Path(name).stem)
    if stem in names(folder):
        raise TspipeError(f"{name} has the name of a {KINDS[folder]} of tspipe's. Give the file another name.")
    return stem


def plain(name: str) -> str:
    """Return a name with only letters, digits, `_`, `.`, `+` and `-`, which manifests and file names allow."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", name).lstrip(".+-") or "unnamed"


def load(folder: str, name: str, attribute: str, error: type[TspipeError]) -> ModuleType:
    """Import the file of a name and check that it defines `attribute`; raise `error` if not."""
    if is_file(name):
        module = _load_file(Path(name), error)
    elif name in (known := _files(folder)):
        module = importlib.import_module(f"tspipe.{folder}.{known[name].stem}")
    else:
        raise error(unknown(KINDS[folder], name, known))
    if not hasattr(module, attribute):
        examples = folder.replace(".", "/")
        raise error(f"{name} defines no {attribute!r}; the files in tspipe/{examples}/ are examples.")
    return module


def construct(
    function: functools.partial[Any], label: str, options: Mapping[str, Any], error: type[TspipeError], section: str
) -> Any:
    """Call a plug-in's function, which has tspipe's arguments bound, with the user's options.

    Args:
        label: begins the message of an error.
        section: where a recipe has the options, for the message.

    Raises `error` for unknown, missing and refused options.
    """
    signature = inspect.signature(function.func)
    try:
        # Bound before the call, so that a TypeError raised by the plug-in is not taken for a wrong option.
        signature.bind(*function.args, **function.keywords, **options)
    except TypeError as problem:
        parameters = list(signature.parameters.values())[len(function.args) :]
        known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        known = [name for name in known if name not in function.keywords]
        if unknown_options := [option for option in options if option not in known]:
            available = f"There are: {', '.join(known)}." if known else "It has none."
            raise error(f"{label} has no option {', '.join(map(repr, unknown_options))}. {available}") from None
        raise error(f"{label} cannot be built: {problem}. Set it in {section} of the recipe.") from None
    try:
        return function(**options)
    except (TypeError, ValueError) as problem:
        if not options:
            raise
        raise error(refused_options(label, options, problem)) from problem


def refused_options(label: str, options: Mapping[str, Any], problem: Exception) -> str:
    """Return the message for options that a plug-in does not accept."""
    values = ", ".join(f"{option}={value!r}" for option, value in options.items())
    return f"{label} cannot be built with {values}: {problem}."


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name: the known names, the nearest first.

    >>> unknown("loss", "tss", ["xent", "ts"])
    "Unknown loss 'tss'. There are: ts, xent."
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    ordered = near + [other for other in known if other not in near]
    return f"Unknown {kind} {name!r}. There are: {', '.join(ordered)}."


def _load_file(path: Path, error: type[TspipeError]) -> ModuleType:
    if not path.is_file():
        raise error(f"There is no file {path}.")
    # Kept in sys.modules under a name made from the path, so that worker processes can unpickle its objects.
    name = f"tspipe_user_{path.stem}_{zlib.crc32(bytes(path.resolve())):08x}"
    if name in sys.modules:  # once per process: editing the file must not change a run in progress
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise error(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as cause:
        del sys.modules[name]
        raise error(f"{path} fails when imported: {type(cause).__name__}: {cause}") from cause
    return module
