"""CIFAR-10: 60,000 colour images of 32×32 in 10 classes, 50,000 for training and 10,000 for testing."""

from pathlib import Path

from tspipe.data.datasets import Images, _archive, _cifar

SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"
LICENSE = "not stated"
CITATION = "Krizhevsky, A. (2009). Learning Multiple Layers of Features from Tiny Images. University of Toronto."

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"  # the publisher's page states this one
MD5 = {  # of the files in it; from torchvision.datasets.CIFAR10
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def load(root: Path, split: str) -> Images:
    """Images (N, 32, 32, 3) uint8 from the python version, unpacked in `root`, or `root` itself the unpacked folder.

    Keys are indices: for training those of the five batches one after the other.

    Raises DatasetError: missing, not unpacked, or a file that is not as published.
    """
    files = [f"{FOLDER}/data_batch_1", "data_batch_1"]
    folder = _archive.find("CIFAR-10", root, files, _archive.FETCH, ARCHIVE)
    return _cifar.load(folder, BATCHES[split], "labels", "batches.meta", "label_names", MD5)


def download(root: Path) -> None:
    """Fetch the published archive (163 MiB) into `root` and unpack it there."""
    _archive.fetch("CIFAR-10", "CIFAR10", root)
