"""What a hostile manifest may say, and what text of a hostile file reaches the terminal."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from conftest import Result
from forging import Change, forge, forge_text, move, overwrite, refusal, resize, stretch
from pets import plan, write
from tspipe.cache import open_cache
from tspipe.cache.manifest import decode_manifest, encode_manifest
from tspipe.cli.render import show_cache
from tspipe.data.random_images.score import label_shares
from tspipe.errors import NotACache
from tspipe.utils.console import printable


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A sound cache to spoil."""
    path = tmp_path / "pets.h5"
    write(path, plan({"train": 10, "test": 3}), b"weights")
    return path


def changed(where: str, value: object) -> Change:
    """An attack that puts a value into the manifest and makes the id fit."""

    def put(manifest: dict) -> None:
        *sections, last = where.split(".")
        for section in sections:
            manifest = manifest[section]
        manifest[last] = value

    return lambda path: forge(path, put)


def without(section: str, field: str) -> Change:
    return lambda path: forge(path, lambda manifest: manifest[section].pop(field))


MANIFESTS: list[tuple[Change, str]] = [
    *(
        (lambda path, text=text: forge_text(path, text), "its manifest is not JSON.")
        for text in (b"", b"hello", b"\xff\xfe", b"{'a': 1}", b"[" * 65536, b'{"a":' * 10000, b"1" * 65536)
    ),
    (lambda path: forge_text(path, b"[]"), "manifest is not an object."),
    (lambda path: forge_text(path, b'{"x":1}'), "manifest lacks the field 'block_rows'."),
    (changed("teacher.command", "rm"), "manifest.teacher has an unknown field 'command'."),
    (changed("x" * 500, 1), f"manifest has an unknown field '{'x' * 60}'."),
    (without("features", "width"), "manifest.features lacks the field 'width'."),
    (changed("features", [1]), "manifest.features is not an object."),
    (changed("dataset.split", None), "manifest.dataset.split is not an object."),
    (changed("dataset.split", {"fraction": 0.2}), "manifest.dataset.split lacks the field 'seed'."),
    (changed("dataset.split", {"fraction": 1, "seed": 0}), "manifest.dataset.split.fraction cannot be 1."),
    (changed("dataset.split", {"fraction": 0.2, "seed": -1}), "manifest.dataset.split.seed cannot be -1."),
    (changed("block_rows", "4"), 'manifest.block_rows cannot be "4".'),
    (changed("block_rows", True), "manifest.block_rows cannot be true."),
    (changed("block_rows", 4.0), "manifest.block_rows cannot be 4.0."),
    (changed("block_rows", 0), "manifest.block_rows cannot be 0."),
    (changed("dataset.rows.train", -10), "manifest.dataset.rows.train cannot be -10."),
    (changed("dataset.rows.train", 2**63), "manifest.dataset.rows.train cannot be 9223372036854775808."),
    (changed("dataset.classes", 2**21), "manifest.dataset.classes cannot be 2097152."),
    (changed("dataset.license", ["x"]), 'manifest.dataset.license cannot be ["x"].'),
    (changed("features.width", -1), "manifest.features.width cannot be -1."),
    (changed("preprocess.mean", []), "manifest.preprocess.mean cannot be []."),
    (changed("preprocess.mean", [float("nan")]), "manifest.preprocess.mean cannot be [NaN]."),
    (changed("preprocess.std", [0]), "manifest.preprocess.std cannot be [0]."),
    (changed("preprocess.std", [1, 1]), "manifest.preprocess has a mean and a std of different lengths."),
    (changed("preprocess.resize", [2**20, 1]), "manifest.preprocess.resize cannot be [1048576, 1]."),
    (changed("teacher.correct.test", 4), "manifest.teacher.correct.test is 4 of 3 images."),
    (changed("teacher.weights_sha256", "../x"), 'manifest.teacher.weights_sha256 cannot be "../x".'),
    # Of another number of rows or features than the file holds.
    (changed("dataset.rows.train", 11), "'train_features' is <f2 (10, 5); its manifest says <f2 (11, 5)."),
    (changed("dataset.rows.train", 2**36), "'train_features' is <f2 (10, 5); its manifest says <f2 (68719476736, 5)."),
    (changed("features.width", 6), "'train_features' is <f2 (10, 5); its manifest says <f2 (10, 6)."),
    (changed("dataset.classes", 3), "'classes' is |S4 (2,); its manifest says |S4 (3,)."),
    (changed("random", {"generator": "mt19937", "rows": 1, "seed": 0}), "the dataset 'random_features' is missing."),
    (changed("views", {"count": 2, "flip": True, "seed": 0, "shift": 1}), "the dataset 'train_views' is missing."),
    # A teacher that names code, or takes what no network takes.
    *(
        (changed("teacher.network", name), f'manifest.teacher.network cannot be "{name}".')
        for name in (
            "evil.py", "./evil", "../evil", "torchvision:evil.py", "torchvision:../evil", "timm:evil.py",
            "timm:../evil", "hub:evil", "os:system", "..",
        )
    ),
    (changed("teacher.options", {"x": 65537}), 'manifest.teacher.options cannot be {"x": 65537}.'),
    (changed("teacher.options", {"x": 1e300}), 'manifest.teacher.options cannot be {"x": 1e+300}.'),
    (changed("teacher.options", {"x": float("nan")}), 'manifest.teacher.options cannot be {"x": NaN}.'),
    (changed("teacher.options", {"x": [[1]]}), 'manifest.teacher.options cannot be {"x": [[1]]}.'),
    # Names from which a path is derived.
    *(
        (changed("dataset.name", name), f'manifest.dataset.name cannot be "{name}".')
        for name in ("..", "../pets", "a/../b", "/etc", "folder:..", "folder:../x", "folder:", ".hidden", "pets.py")
    ),
    (changed("dataset.name", "a\0b"), 'manifest.dataset.name cannot be "a\\u0000b".'),
    (changed("dataset.name", "\x1b[2J"), 'manifest.dataset.name cannot be "\\u001b[2J".'),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "message"), MANIFESTS)
def test_manifest(cache: Path, attack: Change, message: str) -> None:
    attack(cache)
    assert refusal(cache) == message


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (changed("random", None), "it holds 'random_checksums', which is not in the format."),
        (changed("random.rows", 7), "'random_features' is <f2 (6, 5); its manifest says <f2 (7, 5)."),
        (changed("random.rows", 0), "manifest.random.rows cannot be 0."),
        (changed("random.seed", -1), "manifest.random.seed cannot be -1."),
        (changed("random.seed", 2**63), "manifest.random.seed cannot be 9223372036854775808."),
        (changed("random.generator", "../x"), 'manifest.random.generator cannot be "../x".'),
        (changed("random.state", [1]), "manifest.random has an unknown field 'state'."),
        (without("random", "rows"), "manifest.random lacks the field 'rows'."),
    ],
)
def test_a_pool_that_the_manifest_does_not_describe(tmp_path: Path, attack: Change, message: str) -> None:
    write(tmp_path / "pool.h5", plan({"train": 10, "test": 3}, pool=6))
    attack(tmp_path / "pool.h5")
    assert refusal(tmp_path / "pool.h5") == message


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (changed("views", None), "it holds 'train_views', which is not in the format."),
        (changed("views.count", 3), "'train_features' is <f2 (20, 5); its manifest says <f2 (30, 5)."),
        (changed("views.count", 1), "manifest.views.count cannot be 1."),
        (changed("views.shift", -1), "manifest.views.shift cannot be -1."),
        (changed("views.flip", 1), "manifest.views.flip cannot be 1."),
    ],
)
def test_views_that_the_manifest_does_not_describe(tmp_path: Path, attack: Change, message: str) -> None:
    write(tmp_path / "views.h5", plan({"train": 10, "test": 3}, views=2))
    attack(tmp_path / "views.h5")
    assert refusal(tmp_path / "views.h5") == message


def test_a_deep_manifest_does_not_exhaust_the_stack() -> None:
    """Of some depth it can be parsed, but not printed in a message."""
    text = encode_manifest(plan({"train": 1, "test": 1}))
    for depth in range(900, 1000):
        deep = text.replace(b'"block_rows":4', b'"block_rows":' + b"[" * depth + b"]" * depth)
        with pytest.raises(NotACache):
            decode_manifest(deep[:65536], finished=False)


def test_holes_that_agree_with_the_manifest_take_no_memory(cache: Path) -> None:
    """A file of a tebibyte of holes takes a few kilobytes on the disk."""
    rows = 2**33
    resize(cache, 2**40)
    for i, (column, size) in enumerate({"features": 10, "logits": 8, "labels": 8, "keys": 6, "digests": 8}.items()):
        stretch(cache, f"test_{column}", rows, size)
        move(cache, f"test_{column}", (i + 1) * 2**37)
    stretch(cache, "train_checksums", 1, 160)
    stretch(cache, "test_checksums", 512, 160)
    move(cache, "test_checksums", 2**30)

    def agree(manifest: dict) -> None:
        manifest.update(block_rows=2**24)
        manifest["dataset"]["rows"]["test"] = rows

    forge(cache, agree)
    assert refusal(cache) == "'test_labels' has 68,719,476,736 bytes; the format allows 1,073,741,824."


def test_what_is_harmless_is_read(cache: Path) -> None:
    """An object header in two parts; class names that are no UTF-8, or the same twice: they are matched by position."""
    with h5py.File(cache, "r+") as file:
        for name in ("train_labels", "classes"):
            file[name].attrs["x"] = np.zeros(100)
            del file[name].attrs["x"]
    overwrite(cache, "classes", b"\xff\xfe\0\0" * 2)
    assert open_cache(cache).classes == ["\ufffd\ufffd"] * 2


# The terminal

HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\r\n\x9b31m[bold red]free[/] [link=https://x]y[/link] \u202eexe.gpj\u200b :skull: \ud800"
)
ESCAPED = (
    r"\x1b]0;owned\x07\x1b[2J\r\n\x9b31m[bold red]free[/] [link=https://x]y[/link] \u202eexe.gpj\u200b :skull: \ud800"
)


def is_printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_plain() -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable("dög ‖ 犬 → ×") == "dög ‖ 犬 → ×"
    assert printable("x" * 5000 + "remedy") == "x" * 1000 + " … " + "x" * 994 + "remedy"


def test_a_cache_full_of_hostile_text_is_shown_in_one_screen(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overwrite(cache, "classes", b"\x1b[2J[/]\n")
    forge(cache, lambda manifest: manifest["dataset"].update(license=HOSTILE * 9))
    show_cache(open_cache(cache))
    output = capsys.readouterr().out
    assert is_printable(output)
    assert "dataset     pets, 2 classes: \\x1b[2J, [/]\\n" in output
    assert r"licence     \x1b]0;owned\x07\x1b[2J\r\n\x9b31m[bold red]free[/]" in output
    assert len(output.splitlines()) < 25


def test_long_names_are_shown_short(cache: Path) -> None:
    assert label_shares({"x" * 4096: 3, HOSTILE: 1}) == (
        f"The teacher's labels for random images: {'x' * 30} … {'x' * 30} (75%), {printable(HOSTILE, 60)} (25%)"
    )


def name_of_a_dataset(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file[HOSTILE[:-2].replace("/", "")] = np.zeros(3, "u1")


@pytest.mark.parametrize(
    "attack",
    [
        name_of_a_dataset,
        changed("dataset.name", HOSTILE),
        changed("teacher.network", HOSTILE),
        changed("teacher.options", {HOSTILE: [HOSTILE * 9]}),
        lambda path: forge(path, lambda manifest: manifest.update({HOSTILE: 1})),
        lambda path: path.rename(path.with_name(HOSTILE[:-2].replace("/", ""))),
    ],
)
def test_an_error_shows_hostile_text_escaped(cache: Path, tspipe: Callable[..., Result], attack: Change) -> None:
    attack(cache)
    (path,) = cache.parent.iterdir()
    result = tspipe("info", path)
    assert result.code in (0, 1)
    assert is_printable(result.out + result.err)
