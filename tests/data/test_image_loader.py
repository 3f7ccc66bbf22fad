"""Broken images: all of them are known before the teacher starts, and can be left out."""

from pathlib import Path

import numpy as np

from shared import make_folder
from tspipe.data.datasets import open_dataset
from tspipe.data.image_loader import find_broken


def test_every_broken_image_is_known_from_its_header(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "photos")
    (folder / "train/a/03.png").write_bytes(b"<html>")
    (folder / "train/b/00.png").write_bytes(b"")
    (folder / "train/b/07.png").unlink()
    (folder / "train/b/07.png").symlink_to("nothing")
    images = open_dataset(f"folder:{folder}").train
    broken = find_broken(images, "train")
    assert broken == {
        3: f"{folder}/train/a/03.png is not an image that Pillow knows.",
        8: f"{folder}/train/b/00.png is not an image that Pillow knows.",
        15: f"{folder}/train/b/07.png does not exist.",
    }
    sound = images.without(broken)
    assert find_broken(sound, "train") == {}
    assert list(sound.keys) == [
        f"{name}/{i:02}.png" for name in "ab" for i in range(8) if f"{name}{i}" not in ("a3", "b0", "b7")
    ]
    assert sound.labels.tolist() == [0] * 7 + [1] * 6
    np.testing.assert_array_equal(sound.read(7), images.read(9))


def test_a_dataset_in_memory_has_no_headers() -> None:
    digits = open_dataset("digits").train
    assert find_broken(digits, "train") == {}
    part = digits.without([0, 2])
    assert len(part) == 998
    np.testing.assert_array_equal(part.read(1), digits.read(3))
