"""Stage one on real images with a published checkpoint, if both are in the folder `shared` beside the repository."""

import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tspipe.cache import open_cache

SHARED = Path(__file__).parents[3] / "shared" / "data"
IMAGES, WEIGHTS = SHARED / "cifar10-jpeg.tar.xz", SHARED / "resnet56-cifar10.th"
PER_CLASS = 40


@pytest.mark.skipif(not (IMAGES.exists() and WEIGHTS.exists()), reason="needs CIFAR-10 and the published ResNet-56")
def test_a_published_resnet56_on_jpegs_of_cifar10(tspipe: Callable, tmp_path: Path) -> None:
    """Its accuracy on all 10,000 test images is 0.832. The test uses 400 of them, 40 of each class."""
    counts: Counter[str] = Counter()
    with tarfile.open(IMAGES, "r|xz") as archive:
        for member in archive:
            split, _, label = str(Path(member.name).parent).partition("/")
            if member.isfile() and counts[f"{split}/{label}"] < (PER_CLASS if split == "test" else 1):
                archive.extract(member, tmp_path / "cifar", filter="data")
                counts[f"{split}/{label}"] += 1
            if sum(counts.values()) == 10 * (PER_CLASS + 1):
                break
    made = tspipe("cache", "--dataset", "folder:cifar", "--recipe", "cifar10", "--weights", WEIGHTS)
    assert made.code == 0, made.err
    manifest = open_cache("cache/cifar.h5").manifest
    assert manifest["dataset"]["rows"] == {"test": 10 * PER_CLASS, "train": 10}
    assert manifest["teacher"]["options"]["shortcut"] == "A"
    # Five standard errors of an accuracy of 0.832 on 400 images are 0.093.
    assert abs(manifest["teacher"]["correct"]["test"] / 400 - 0.832) < 0.093
