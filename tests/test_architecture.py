"""The arrows between the rooms: what may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import tspipe
from tspipe.cache import Cache

PACKAGE = Path(tspipe.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
STAGES = {"train_teacher", "extract", "train_students", "verify"}
# A room may import those of its own line and of the lines above it.
LAYERS = [
    {"errors"},
    {"files", "plugins", "distributed", "memory", "randomness", "progress", "overlap"},
    {"cache", "preprocess", "losses", "datasets", "networks"},
    {"cached_targets"},
    {"weights", "random_images", "recipe", "run_folder", "pixels", "show", "local_data", "views"},
    {"feature_net", "tally", "training"},
    {"learner", "rows", "teaching"},
    {"board", "floors", "live_teacher", "random_pool", "sharing", "student_config"},
    STAGES | {"figures", "page", "report", "results", "tables"},
    {"teachers"},
    {"bench"},
    {"commands"},
    {"reproduce"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    """The modules a file imports, dotted; also those imported inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    """The file or folder directly in the package that a path belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_its_place() -> None:
    assert {room(path) for path in FILES} - {"__init__"} == set(HEIGHT), "a new file goes into LAYERS"


def test_no_arrow_turns_back() -> None:
    wrong = []
    for path in FILES:
        here = room(path)
        for there in {module.split(".")[1] for module in imports(path) if module.startswith("tspipe.")}:
            if HEIGHT.get(there, 0) > HEIGHT.get(here, len(LAYERS)):
                wrong.append(f"{here} imports {there}")
    assert wrong == []


def test_the_stages_meet_only_in_the_file() -> None:
    for stage in STAGES:
        assert imports(PACKAGE / f"{stage}.py") & {f"tspipe.{other}" for other in STAGES - {stage}} == set()


def test_the_cache_is_numpy_and_h5py_only() -> None:
    for path in (PACKAGE / "cache").glob("*.py"):
        modules = imports(path)
        allowed = {"h5py", "numpy", "tspipe"} | ({"aiohttp", "fsspec"} if path.name == "remote.py" else set())
        assert {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names) <= allowed
        assert {m.split(".")[1] for m in modules if m.startswith("tspipe.")} <= {"cache", "errors", "files"}


def test_reading_a_cache_loads_neither_torch_nor_fsspec() -> None:
    program = (
        "import sys, tspipe.cache, tspipe.cache.transfer\n"
        "print(sorted(sys.modules.keys() & {'aiohttp', 'fsspec', 'torch'}))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_only_distributed_imports_torch_distributed() -> None:
    users = {room(path) for path in FILES if any(m.startswith("torch.distributed") for m in imports(path))}
    assert users <= {"distributed"}


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; from tspipe.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print('torch' in sys.modules, 'h5py' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "False False"


def test_sizes_keep_it_readable() -> None:
    for path in FILES:
        source = path.read_text()
        assert source.count("\n") <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_info_of_a_file_imports_nothing_that_fetches(digits: Cache) -> None:
    program = (
        "import gc, sys; from tspipe.cli import main\n"
        "sys.argv[:] = ['tspipe', 'info', sys.argv[1]]\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, 'tspipe.cache.transfer' in sys.modules, gc.get_freeze_count() > 0)"
    )
    found = subprocess.run([sys.executable, "-c", program, digits.path], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "0 False True"
