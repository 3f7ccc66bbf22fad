"""CIFAR-100: 60,000 colour images of 32×32 in 100 fine classes, 50,000 for training and 10,000 for testing."""

from pathlib import Path

from tspipe.data.datasets import Images, _archive, _cifar

SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"
LICENSE = "not stated"
CITATION = "Krizhevsky, A. (2009). Learning Multiple Layers of Features from Tiny Images. University of Toronto."

FOLDER = "cifar-100-python"
ARCHIVE = "cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"  # the publisher's page states this one
MD5 = {  # of the files in it; from torchvision.datasets.CIFAR100
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}


def load(root: Path, split: str) -> Images:
    """Images (N, 32, 32, 3) uint8 from the python version, unpacked in `root`, or `root` itself the unpacked folder.

    Labels are the 100 fine ones, keys the indices.

    Raises DatasetError: missing, not unpacked, or a file that is not as published.
    """
    # `meta` is looked for, because a folder of anything may hold a `train`.
    folder = _archive.find("CIFAR-100", root, [f"{FOLDER}/meta", "meta"], _archive.FETCH, ARCHIVE)
    return _cifar.load(folder, [split], "fine_labels", "meta", "fine_label_names", MD5)


def download(root: Path) -> None:
    """Fetch the published archive (161 MiB) into `root` and unpack it there."""
    _archive.fetch("CIFAR-100", "CIFAR100", root)
