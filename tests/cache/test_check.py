"""What is not a sound, finished cache is refused before any row is read, in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from tspipe.cache import Cache, open_cache
from tspipe.cache.check import identify
from tspipe.errors import CacheDamaged, CacheError, CacheIncomplete, CacheMismatch, NotACache


@pytest.fixture
def copy(digits: Cache, tmp_path: Path) -> Path:
    """A sound cache to spoil."""
    return Path(shutil.copy(digits.path, tmp_path / "digits.h5"))


def message(path: Path, error: type[CacheError]) -> str:
    with pytest.raises(error) as refused:
        open_cache(path)
    assert type(refused.value) is error
    text = str(refused.value)
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def overwrite(path: Path, name: str, data: bytes, at: int = 0) -> None:
    with h5py.File(path, "r") as file:
        offset = file[name].id.get_offset()
    with path.open("r+b") as raw:
        raw.seek(offset + at)
        raw.write(data)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(NotACache) as refused:
        open_cache(tmp_path / "none.h5")
    assert str(refused.value) == (
        f"There is no file {tmp_path}/none.h5. Make the cache first: tspipe cache --dataset NAME"
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x89HDF"])
def test_not_hdf5(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(content)
    assert message(path, NotACache) == "it is not an HDF5 file, so not a tspipe cache."


def test_another_hdf5_file(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((3, 2))
    wanted = "it is an HDF5 file, but not a tspipe cache (root attributes `format` and `version`)."
    assert message(path, NotACache) == wanted


def test_a_newer_version_says_which_tspipe_reads_it(copy: Path) -> None:
    with h5py.File(copy, "r+") as file:
        file.attrs.modify("version", np.int64(2))
    assert message(copy, NotACache) == (
        "it has format version 2; this tspipe reads version 1. A newer tspipe may read it: pip install --upgrade tspipe"
    )


def test_unfinished(copy: Path) -> None:
    overwrite(copy, "id", bytes(64))
    assert message(copy, CacheIncomplete) == (
        "it is not finished. Run the command that makes it again: it goes on where it stopped."
    )


def test_cut_short_and_grown(copy: Path) -> None:
    data = copy.read_bytes()
    copy.write_bytes(data[:-1])
    size = len(data)
    again = "Get it again from where it came from."
    assert message(copy, NotACache) == f"it was cut short: {size - 1:,} bytes, not {size:,}. {again}"
    copy.write_bytes(data + b"\0")
    assert message(copy, NotACache) == f"it was grown: {size + 1:,} bytes, not {size:,}. {again}"


@pytest.mark.parametrize("name", ["manifest", "train_checksums", "id"])
def test_what_the_id_covers_cannot_change(copy: Path, name: str) -> None:
    data = b"1" if name != "manifest" else b'{"block_rows":255'
    overwrite(copy, name, data, at=0)
    assert message(copy, CacheDamaged) == "its id is not that of its manifest and checksums. Get the file again."


def test_labels_outside_the_classes(copy: Path) -> None:
    overwrite(copy, "test_labels", (10).to_bytes(8, "little"), at=16)
    assert message(copy, CacheDamaged) == "test_labels has labels outside its 10 classes."


def soft_link(file: h5py.File) -> None:
    file["more"] = h5py.SoftLink("/train_features")


def external_link(file: h5py.File) -> None:
    del file["train_features"]
    file["train_features"] = h5py.ExternalLink("other.h5", "/features")


def second_name(file: h5py.File) -> None:
    file["more"] = file["train_features"]


def group(file: h5py.File) -> None:
    del file["train_features"]
    file.create_group("train_features")


def unknown(file: h5py.File) -> None:
    file.create_dataset("notes", data=np.zeros(3, "u1"))


def missing(file: h5py.File) -> None:
    del file["test_keys"]


def replaced(**options: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        data = file["train_features"][()]
        del file["train_features"]
        file.create_dataset("train_features", data=data.astype(options.pop("dtype", data.dtype)), **options)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (soft_link, "'more' is a soft or external link; a cache has hard links only."),
        (external_link, "'train_features' is a soft or external link; a cache has hard links only."),
        (second_name, "'train_features' overlaps another dataset."),
        (group, "'train_features' is not a dataset."),
        (unknown, "it holds 'notes', which the format does not know."),
        (missing, "the dataset 'test_keys' is missing."),
        (
            replaced(chunks=(10, 84)),
            "'train_features' is chunked, compact or virtual; a cache's datasets are contiguous.",
        ),
        (replaced(dtype=">f2"), "'train_features' has a type the format does not use."),
        (replaced(dtype="<f4"), "'train_features' is <f4 (1000, 84); its manifest says <f2 (1000, 84)."),
        (replaced(shape=(500, 168)), "'train_features' is <f2 (500, 168); its manifest says <f2 (1000, 84)."),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_the_format_does_not_use_is_refused(copy: Path, change: Callable[[h5py.File], None], said: str) -> None:
    with h5py.File(copy, "r+") as file:
        change(file)
    assert message(copy, NotACache) == said


def test_external_storage(copy: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 64)
    with h5py.File(copy, "r+") as file:
        del file["id"]
        file.create_dataset("id", shape=(64,), dtype="u1", external=[(str(secret), 0, 64)])
    assert message(copy, NotACache) == "'id' keeps its bytes in another file."


def forge(path: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest and make the id fit it, as someone who means harm would."""
    with h5py.File(path, "r") as file:
        manifest = json.loads(file["manifest"][()].tobytes().rstrip(b"\0"))
        checksums = [file[f"{split}_checksums"][()].tobytes() for split in ("train", "test")]
    change(manifest)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode().ljust(65536, b"\0")
    overwrite(path, "manifest", text)
    overwrite(path, "id", identify(text, checksums))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("options", {"x": float("nan")}, 'manifest.teacher.options cannot be {"x": NaN}.'),
        ("options", {"x": 10**9}, 'manifest.teacher.options cannot be {"x": 1000000000}.'),
        ("options", {"x": [[1]]}, 'manifest.teacher.options cannot be {"x": [[1]]}.'),
        ("network", "evil.py", 'manifest.teacher.network cannot be "evil.py".'),
    ],
)
def test_a_forged_teacher_is_refused(copy: Path, field: str, value: object, said: str) -> None:
    forge(copy, lambda manifest: manifest["teacher"].update({field: value}))
    assert message(copy, NotACache) == said


@pytest.mark.parametrize("shape", [[1, 60000, 60000], ["a", "b", "c"], None])
def test_a_forged_input_shape_takes_no_memory(copy: Path, tmp_path: Path, shape: object) -> None:
    from tspipe import recipe as recipes
    from tspipe.train_students import StudentConfig, train_students

    forge(copy, lambda manifest: manifest["teacher"]["options"].update(input_shape=shape))
    facts = {"preprocess": open_cache(copy).manifest["preprocess"]}
    with pytest.raises(CacheMismatch) as refused:
        train_students(StudentConfig(recipes.load("digits", facts=facts), open_cache(copy), out=tmp_path / "run"))
    assert str(refused.value) == (f"digits.h5: its teacher takes images of {shape}, its dataset's are of [1, 16, 16].")


def test_text_of_the_file_is_escaped(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tspipe.show import show_cache

    overwrite(copy, "classes", b"\x1b")
    forge(copy, lambda manifest: manifest["dataset"].update(license="[red]free[/red]\nid   fake"))
    show_cache(open_cache(copy))
    shown = capsys.readouterr().out
    assert "10 classes: \\x1b, 1, 2, 3, 4, …" in shown
    assert "licence     [red]free[/red]\\nid   fake" in shown


def test_a_file_replaced_while_in_use_is_noticed(copy: Path) -> None:
    cache = open_cache(copy)
    copy.write_bytes(copy.read_bytes())
    with pytest.raises(CacheError) as refused:
        cache.train.features.load()
    assert str(refused.value) == f"{copy} was replaced while it was in use. Run the command again."
