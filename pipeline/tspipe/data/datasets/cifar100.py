"""CIFAR-100: 60,000 colour images of 32×32 in 100 fine classes, 50,000 for training and 10,000 for testing."""

from pathlib import Path

from tspipe.data.datasets import Images, _archive
from tspipe.data.datasets.cifar10 import CITATION, LICENSE, SOURCE, load_batches

__all__ = ["CITATION", "LICENSE", "SOURCE", "download", "load"]

FOLDER = "cifar-100-python"
ARCHIVE = "cifar-100-python.tar.gz"
MD5 = {  # of the files in it; from torchvision.datasets.CIFAR100
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}


def load(root: Path, split: str) -> Images:
    """Return images as for CIFAR-10, with the 100 fine labels."""
    # `meta` is looked for, because a folder of anything may hold a `train`.
    folder = _archive.find("CIFAR-100", root, [f"{FOLDER}/meta", "meta"], _archive.FETCH, ARCHIVE)
    return load_batches(folder, [split], "meta", MD5, prefix="fine_")


def download(root: Path) -> None:
    """Fetch the published archive (161 MiB) into `root` and unpack it there."""
    _archive.fetch("CIFAR-100", "CIFAR100", root)
