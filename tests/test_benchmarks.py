"""The benchmarks that are programs of their own: they run on a small cache."""

import importlib.util
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from shared import make_folder, small
from tspipe.cache import Cache
from tspipe.extraction.extract import Contents, extract


def load_benchmark(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("images", [False, True])
def test_stage_one_is_timed_from_decoded_images_and_from_files(
    images: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files are decoded also for a cache that holds pixels."""
    folder, stage_one = tmp_path / "shapes", load_benchmark("stage_one")
    cache = extract(replace(small(folder), contents=Contents(images)))
    assert cache is not None
    capsys.readouterr()
    times, longest = stage_one.measure(str(cache.path), str(folder), 0.1)
    assert list(times) == ["ours", "teacher", "ours, files", "decoding"]
    assert all(min(seconds) > 0 for seconds in times.values())
    assert longest.keys() == {"stage one", "from files"}
    assert set(longest.values()) <= {"decoding", "teacher", "writing"}
    assert capsys.readouterr().err == ""
    folder.rename(tmp_path / "elsewhere")
    if images:
        assert list(stage_one.measure(str(cache.path), str(folder), 0.1)[0]) == ["ours", "teacher"]
        assert capsys.readouterr().err == (
            f"Stage one is not timed from files. There is no train split in {folder}: looked for {folder}/train. The "
            "layout is train/CLASS/IMAGE and test/CLASS/IMAGE. Name it with --data FOLDER.\n"
        )


def test_a_killed_push_ends_as_an_undisturbed_one(digits: Cache, tmp_path: Path) -> None:
    """As long as the kill comes before the end of this short command."""
    kills = load_benchmark("kills")
    shutil.copy(digits.path, tmp_path / "pool.h5")
    count, finished, equal, missing, left_over = kills.run_scenario(kills.push(tmp_path), tmp_path / "push", 1)
    assert finished == equal == count
    assert missing == left_over == 0


def test_packed_images_are_unpacked_as_they_were(tmp_path: Path) -> None:
    """A piece has some of the classes; a changed pixel is noticed."""
    pack_images, folder = load_benchmark("pack_images"), make_folder(tmp_path / "shapes")
    pack_images.pack(folder, str(tmp_path / "piece"))
    for number, name in enumerate(("a", "b")):
        for split in ("train", "test"):
            pack_images.unpack_class(tmp_path / "again", str(tmp_path / f"piece-{number}.zip"), f"{split}/{name}")
    images = sorted(path.relative_to(folder) for path in folder.glob("*/*/*.png"))
    for image in images:
        assert np.array_equal(Image.open(folder / image), Image.open(tmp_path / "again" / image)), image
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as piece:
        piece.writestr("train/a.json", json.dumps({"names": ["1.png"], "shape": pixels.shape, "sha256": "0"}))
        piece.writestr("train/a.pixels", pack_images.encode(pixels))
    with pytest.raises(SystemExit, match="train/a has other pixels than were packed"):
        pack_images.unpack_class(tmp_path / "again", str(tmp_path / "bad.zip"), "train/a")
