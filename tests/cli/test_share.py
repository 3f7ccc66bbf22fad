"""The commands on cache files, as a person meets them: diff, push, pull, list caches, and a cache at a URL."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import Result
from pets import plan, rows_of, write
from shared import TEACHER, make_folder
from tspipe.cache import (
    SPLITS,
    Cache,
    CacheWriter,
    Dimensions,
    Manifest,
    open_cache,
)
from tspipe.cache.transfer import describe_contents
from tspipe.cli import share

Tspipe = Callable[..., Result]


def changed(path: Path, change: Callable[[str, dict], None], rows: dict[str, int], manifest: Manifest) -> Path:
    """Write the cache of pets with other rows; longer keys fit too."""
    sizes = Dimensions(rows, 5, 2, "<f2", 4, 4, dict.fromkeys(SPLITS, 6))
    with CacheWriter(path, manifest, sizes, ["cat", "dög"]) as writer:
        for split in SPLITS:
            columns = rows_of(split, range(rows[split]), 5)
            change(split, columns)
            for block in writer.missing(split):
                local = slice(sizes.block(split, block).start, sizes.block(split, block).stop)
                writer.write_block(split, block, {name: column[local] for name, column in columns.items()})
        writer.finish()
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    write(tmp_path / "pets.h5", plan({"train": 10, "test": 3}))
    return tmp_path / "pets.h5"


def test_equal_caches_do_not_differ(tspipe: Tspipe, pets: Path, tmp_path: Path) -> None:
    other = shutil.copy(pets, tmp_path / "other.h5")
    assert tspipe("diff", pets, other) == Result(0, "They hold the same.\n", "")


def test_diff_names_rows_by_key(tspipe: Tspipe, pets: Path, tmp_path: Path) -> None:
    def change(split: str, columns: dict) -> None:
        if split == "train":
            for column in columns.values():
                column[[4, 5]] = column[[5, 4]]
            columns["keys"][9] = b"new"
            columns["digests"][0] ^= 1
            columns["labels"][1] ^= 1
            columns["features"][0] += 100  # of another image, so not compared
            columns["features"][2, 3] += 0.25
            columns["logits"][3] = columns["logits"][3][::-1].copy()

    other = changed(tmp_path / "other.h5", change, {"train": 10, "test": 2}, plan({"train": 10, "test": 2}))
    result = tspipe("diff", pets, other)
    assert (result.code, result.err) == (1, "")
    one, two = (open_cache(path).manifest for path in (pets, other))
    apart = np.abs(np.diff(open_cache(pets).train.logits[3])).item()
    lines = [line for line in result.out.splitlines() if ": " in line]
    assert lines == [
        "train: 1 images only in A, first 'tr9'",
        "train: 1 images only in B, first 'new'",
        "train: 1 keys of another image, first 'tr0'",
        "train: 1 keys of another label, first 'tr1'",
        "train: 2 of 9 common images in another order",
        "train: features of 8 unchanged images differ by up to 0.25",
        f"train: logits of 8 unchanged images differ by up to {apart:.2g}, 1 in their argmax",
        "test: 1 images only in A, first 'te2'",
    ]
    assert "dataset.rows.test" in result.out
    assert one["dataset"]["fingerprint"][:12] in result.out
    assert two["dataset"]["fingerprint"][:12] in result.out


def test_diff_of_other_networks(tspipe: Tspipe, pets: Path, digits: Cache) -> None:
    result = tspipe("diff", pets, digits.path)
    assert result.code == 1
    assert "train: features of different widths\n" in result.out
    assert "teacher in the file" in result.out
    assert next(line for line in result.out.splitlines() if line.startswith("preprocess.mean")).split() == [
        "preprocess.mean", "0.5", "0.305",
    ]  # fmt: skip


def test_push_and_pull(tspipe: Tspipe, digits: Cache, tmp_path: Path) -> None:
    team = tmp_path / "team"
    result = tspipe("push", digits.path, team)
    assert (result.code, result.err) == (0, "")
    weights = digits.manifest["teacher"]["weights_sha256"][:12]
    carried = (
        "  It contains features of digits; its licence: CC BY 4.0.\n"
        f"  It contains the teacher's weights (lenet5, {weights}); their licence is their publisher's.\n"
    )
    assert result.out == (
        f"Pushed to {team}/digits.h5: id {digits.id[:12]}\n{carried}"
        "  Training needs the dataset digits, whose images are not in the file.\n"
        f"Its SHA-256 is in a file beside it. Next: tspipe student --cache {team}/digits.h5\n"
    )
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "digits.h5.sha256"], cwd=team, check=True, capture_output=True)
    result = tspipe("pull", f"file://{team}/digits.h5")
    assert (result.code, result.err) == (0, "")
    assert result.out == (
        f"Pulled cache/digits.h5: id {digits.id[:12]}, its SHA-256 matches\n{carried}"
        "  Training needs the dataset digits, whose images are not in the file.\n"
        "Next: tspipe student --cache cache/digits.h5\n"
    )
    assert Path("cache/digits.h5").read_bytes() == digits.path.read_bytes()
    assert tspipe("pull", team / "digits.h5").out.startswith("Already have cache/digits.h5")


@pytest.mark.parametrize(
    ("network", "program", "line"),
    [
        ("mine", {}, "Random images need the teacher's file (--teacher ./mine.py), and are left out without it."),
        ("mine", {"program_sha256": "0"}, "Random images need no file of the teacher: the cache has its operations."),
        ("hub:a/b@c:d", {}, "Random images need the code of hub:a/b@c:d, which runs only with --trust-remote-code."),
    ],
)
def test_what_the_receiver_of_another_network_needs(
    digits: Cache, network: str, program: dict, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(digits.manifest, "teacher", {**digits.manifest["teacher"], "network": network, **program})
    lines, command = share._receiver(digits, "x.h5")
    assert lines[1:] == [line]
    assert ("--random-images 0" in command) is ("left out" in line)
    assert describe_contents(digits)[2:] == (
        ["the teacher's operations, which run without its Python file"] * bool(program)
    )


def test_a_damaged_cache_is_not_pushed(tspipe: Tspipe, digits: Cache, tmp_path: Path) -> None:
    path = Path(shutil.copy(digits.path, tmp_path / "digits.h5"))
    data = bytearray(path.read_bytes())
    data[digits.train.features.offset] ^= 1
    path.write_bytes(data)
    result = tspipe("push", path, tmp_path / "team")
    assert result.code == 1
    assert result.says(f"{path} is damaged: train_features, rows 0 to 255. …")
    assert not (tmp_path / "team").exists()


def test_without_a_published_sha256_every_byte_is_verified(tspipe: Tspipe, digits: Cache, tmp_path: Path) -> None:
    path = Path(shutil.copy(digits.path, tmp_path / "there.h5"))
    expected = "no SHA-256 is published; its own checksums match\n"
    assert expected in tspipe("pull", path, "--out", "here.h5").out
    data = bytearray(path.read_bytes())
    data[digits.train.features.offset] ^= 1
    path.write_bytes(data)
    result = tspipe("pull", path, "--out", "second.h5")
    assert result.code == 1
    assert result.error.startswith(f"{path} arrived damaged: train_features, rows 0 to 255.")
    assert not Path("second.h5").exists()


def test_a_student_of_a_url(tspipe: Tspipe, digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    shutil.copy(digits.path, tmp_path / "digits.h5")
    url = f"file://{tmp_path}/digits.h5"
    settings = [f"--set={setting}" for setting in (*TEACHER, "epochs=1", "seeds=1", "random_images=0")]
    command = ["student", "--cache", url, "--student", "lenet5", *settings]
    result = tspipe(*command)
    assert result.code == 0
    (copy,) = (tmp_path / "home" / "tspipe").rglob("digits.h5")
    assert result.err.splitlines()[0] == f"Fetched {url} to {copy}"
    assert tspipe(*command).err.splitlines()[0] == f"{url} is unchanged: using the copy {copy}"
    (tmp_path / "digits.h5").unlink()
    assert tspipe(*command).err.splitlines()[0] == (f"Using the copy of {url}: There is no file {url}.")


def test_info_of_a_url_equals_info_of_the_file(tspipe: Tspipe, digits: Cache) -> None:
    assert tspipe("info", f"file://{digits.path}") == tspipe("info", digits.path)


def test_list_caches(tspipe: Tspipe, digits: Cache, pets: Path, tmp_path: Path) -> None:
    team = tmp_path / "team"
    (team / "old").mkdir(parents=True)
    shutil.copy(digits.path, team / "digits.h5")
    shutil.copy(pets, team / "old" / "pets.h5")
    (team / "old" / "broken.h5").write_bytes(b"HDF5?")
    result = tspipe("list", "caches", team)
    assert (result.code, result.err) == (0, "")
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[0] == ["name", "id", "dataset", "teacher", "test", "%", "images", "d", "dtype", "size"]
    accuracy = f"{100 * digits.manifest['teacher']['correct']['test'] / 797:.2f}"
    size = f"{digits.size / 1024:.1f}"
    assert lines[1] == [
        "digits.h5", digits.id[:12], "digits", "lenet5", accuracy, "1,797", "84", "f16", size, "KiB",
    ]  # fmt: skip
    assert lines[2][:4] == ["old/pets.h5", open_cache(pets).id[:12], "pets", "lenet5"]
    expected = f"{team}/old/broken.h5: it is not an HDF5 file, so not a tspipe cache."
    assert "".join("".join(result.out.splitlines()[3:]).split()) == expected.replace(" ", "")  # lines may end anywhere
    assert max(map(len, result.out.splitlines())) <= 80


def test_list_caches_of_an_empty_folder(tspipe: Tspipe) -> None:
    Path("cache").mkdir()
    assert tspipe("list", "caches").out == "There are no caches in cache. Make one: tspipe cache --dataset NAME\n"
    assert tspipe("list", "caches", "nowhere").error == (
        "nowhere is not a folder. Name the folder of the caches: tspipe list caches FOLDER"
    )


@pytest.fixture
def photos(tspipe: Tspipe) -> Path:
    """Make `photos/` with two classes and its cache, `cache/photos.h5`, in the current folder."""
    import torch

    from tspipe.models import networks, weights

    torch.manual_seed(0)
    weights.save(Path("w.safetensors"), networks.build("lenet5", 2, (3, 16, 16)), {})
    make_folder(Path("photos"))
    command = "cache --dataset folder:photos --teacher lenet5 --weights w.safetensors --out cache/photos.h5"
    assert tspipe(*command.split()).code == 0
    return Path("photos")


STUDENT = "student --cache cache/photos.h5 --data photos --student lenet5 --random-images 0 --seeds 1 --epochs 1"


def test_trusted_data_are_not_compared_and_the_run_records_it(tspipe: Tspipe, photos: Path) -> None:
    command = [*STUDENT.split(), "--set=batch_size=4"]
    (photos / "train/a/03.png").write_bytes((photos / "train/b/00.png").read_bytes())
    result = tspipe(*command)
    assert result.code == 1
    assert result.error.startswith("photos.h5 is not of these data: at train index 3, the pixels of 'a/03.png' differ")
    assert not Path("runs").exists()
    result = tspipe(*command, "--trust-data")
    assert (result.code, result.error) == (0, "")
    assert "The images were not compared with those of the cache (--trust-data).\n" in result.out
    (run,) = Path("runs").iterdir()
    assert json.loads((run / "config.json").read_text())["config"]["trust_data"] is True


def test_even_trusted_data_need_a_row_for_each_image(tspipe: Tspipe, photos: Path) -> None:
    (photos / "train/a/03.png").unlink()
    result = tspipe(*STUDENT.split(), "--set=batch_size=4", "--trust-data")
    assert result.code == 1
    assert result.error == (
        "photos.h5 has 16 + 8 images of 2 classes, the dataset 15 + 8 images of 2 classes: --trust-data skips the "
        "comparison of images, but cannot do without their rows."
    )


def test_a_cache_with_its_images_needs_no_dataset(tspipe: Tspipe, photos: Path) -> None:
    """Students trained on pixels in the cache equal those trained on the folder, bit for bit."""
    resized = "--set=preprocess.resize=[24,24] --set=preprocess.crop=16"
    command = (
        f"cache --dataset folder:photos --teacher lenet5 --weights w.safetensors --images --views 0 {resized}".split()
    )
    result = tspipe(*command, "--out", "cache/with.h5")
    assert (result.code, result.error) == (0, "")
    assert tspipe(*[part for part in command if part != "--images"], "--out", "cache/without.h5").code == 0
    cache = open_cache("cache/with.h5")
    assert cache.train.images is not None
    assert cache.train.images.shape == (16, 16, 16, 3)
    students = []
    for name, more in (("without", ["--data", "photos"]), ("with", []), ("with", ["--set=memory=1"])):
        out = f"runs/{len(students)}"
        flags = ["--student", "lenet5", "--random-images", "3", "--seeds", "1", "--epochs", "1", "--set=batch_size=4"]
        result = tspipe("student", "--cache", f"cache/{name}.h5", *flags, *more, "--out", out)
        assert (result.code, result.error) == (0, "")
        students.append(weights_of(Path(out)))
    assert all(students[0][name].equal(other[name]) for other in students[1:] for name in other)
    assert tspipe("verify", "cache/with.h5", "photos", "--data", "--teacher", "9").code == 0
    result = tspipe(*[part for part in command if part != "--images"], "--out", "cache/with.h5")
    assert result.error == (
        "cache/with.h5 is another cache: images is True, not False. Move it away, replace it (tspipe cache "
        "--force) or write another (--out)."
    )


def test_the_command_that_push_prints_works_at_the_receiver(
    tspipe: Tspipe, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is a user's own network, whose file the receiver does not have; nor has he the photos."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("home").absolute()))
    Path("mine.py").write_text("from tspipe.models.networks.lenet5 import build\n")
    command = (
        "cache --dataset folder:photos --teacher ./mine.py --weights w.safetensors --images --views 0 --out with.h5"
    )
    sizes = ("--set=preprocess.resize=[16,16]", "--set=preprocess.crop=none")
    assert tspipe(*command.split(), *sizes).code == 0
    pushed = tspipe("push", "with.h5", f"file://{Path('team').absolute()}")
    assert "Training needs no dataset: the pixels are in the file." in pushed.out
    assert "Random images need the teacher's file (--teacher ./mine.py), and are left out without it." in pushed.out
    words = pushed.out.splitlines()[-1].partition("Next: tspipe ")[2].split()
    Path("receiver").mkdir()
    monkeypatch.chdir("receiver")
    result = tspipe(*words, "--student", "lenet5", "--seeds", "1", "--epochs", "1", "--set=batch_size=4")
    assert (result.code, result.error) == (0, "")
    (run,) = Path("runs").iterdir()
    assert weights_of(run)


def weights_of(run: Path) -> dict:
    import safetensors.torch

    (path,) = run.glob("student-*-seed0.safetensors")
    return safetensors.torch.load_file(path)


def test_damaged_pixels_are_found_and_repaired(tspipe: Tspipe, photos: Path) -> None:
    command = "cache --dataset folder:photos --teacher lenet5 --weights w.safetensors --images --out cache/with.h5"
    assert tspipe(*command.split(), "--set=compute.block_rows=4").code == 0
    path = Path("cache/with.h5")
    original = path.read_bytes()
    images = open_cache(path).train.images
    assert images is not None
    data = bytearray(original)
    data[images.offset + 6 * images.row_bytes] ^= 1
    path.write_bytes(data)
    assert tspipe("verify", path).says(f"{path} is damaged: train_images, rows 4 to 7. …")
    assert tspipe("verify", path, "photos", "--repair").code == 0
    assert path.read_bytes() == original


@pytest.mark.parametrize(
    "url",
    [
        "https://me:qq/zz@host/x.h5",
        "https://me:qq?zz@host/x.h5",
        "https://me:qq#zz@host/x.h5",
        "https://me:1/qq:zz@host/x.h5",
        "https://me:qq:zz",
        "https://host:qq:zz/x.h5",
        "https:/me:qq:zz@host/x.h5",
        "https:me:qq:zz@host/x.h5",
        "https//me:qq:zz@host/x.h5",
        "https:\\\\me:qq:zz@host/x.h5",
        " https://me:qq:zz@host/x.h5",
        "me:qq:zz@https://host/x.h5",
        "me:qq:zz@host/x.h5",
        "s3://key:qq/zz@bucket/x.h5",
        "ss3://me:qq:zz@host/x.h5",
        "//me:qq:zz@host/x.h5",
        "//u:qqzz@host/x.h5",
        "u:qqzz@host/x.h5",
        "http:///u:qqzz@host/x.h5",
    ],
)
def test_a_malformed_address_is_never_repeated(tspipe: Tspipe, digits: Cache, tmp_path: Path, url: str) -> None:
    for command in (
        ["info", url],
        ["pull", url],
        ["push", digits.path, url],
        ["student", "--cache", url],
        ["verify", url],
        ["diff", url, url],
    ):
        result = tspipe(*command)
        assert result.code == 1, command
        assert not re.search("qq|zz", result.out + result.err), command
