"""The data that a teacher was trained on, as the metadata of its weights describe them."""

import hashlib
import json
import shlex
from collections.abc import Mapping

from tspipe.cache.layout import digest
from tspipe.data.datasets import Images
from tspipe.data.image_loader import read_ahead
from tspipe.errors import TrainingError
from tspipe.models.weights import Weights, class_difference, recorded_classes
from tspipe.utils.progress import progress

_BATCH = 256  # images


def describe(images: Images, split: str = "train") -> dict[str, str]:
    """Return the metadata that identify a split; all images are read.

    `classes` is the class names as JSON, `labels_sha256` covers each image's key and label, `pixels_sha256` its pixels.
    """
    labels = zip(images.keys, images.labels.tolist(), strict=True)
    pixels, count = hashlib.sha256(), len(images)
    with progress(f"comparing {split}", count, "images") as advance:
        batches = (range(i, min(i + _BATCH, count)) for i in range(0, count, _BATCH))
        for digests in read_ahead(lambda i: digest(images.read(i)), batches):
            pixels.update(b"".join(digests))
            advance(len(digests), f"comparing {split}")
    return {
        "classes": json.dumps(list(images.classes)),
        "labels_sha256": hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest(),
        "pixels_sha256": pixels.hexdigest(),
    }


def check(trained: Weights, data: Mapping[str, str]) -> None:
    """Raise TrainingError, naming what differs, if the weights were trained on other data than `describe` returned."""
    kinds = {"classes": "class names", "labels_sha256": "images or labels", "pixels_sha256": "pixels"}
    differing = [field for field in kinds if trained.metadata.get(field, data[field]) != data[field]]
    if not differing:
        return
    what = f"the {kinds[differing[0]]} differ"
    flags = shlex.join(["--weights", trained.source])
    if differing[0] == "classes":
        classes, recorded = json.loads(data["classes"]), recorded_classes(trained)
        difference = None if recorded is None else class_difference(recorded, classes)
        what = f"{difference} of this dataset" if difference else "the class names in its metadata cannot be read"
        flags += " --set teacher.any_classes=true"
    raise TrainingError(
        f"{trained.source} was trained on other data: {what}. Train the teacher anew (tspipe teacher --force, with the "
        f"same flags), or use it as it is: add {flags} to the flags of tspipe cache."
    )
