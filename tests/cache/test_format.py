"""cache/README.md is enough: a reader that knows nothing but it, h5py and numpy, reads and checks all of a cache."""

import hashlib
import json
import re
from pathlib import Path

import h5py
import numpy as np

from tspipe.cache import Cache
from tspipe.data import datasets

SPECIFICATION = (Path(__file__).parents[2] / "cache" / "README.md").read_text()


def test_a_reader_written_from_the_specification(digits: Cache) -> None:
    with h5py.File(digits.path, "r") as file:
        assert (file.attrs["format"], file.attrs["version"]) == (b"tspipe-cache", 1)
        held = {name: file[name][()] for name in file}
    # The table of datasets is complete.
    listed = re.findall(r"^\| `(\w+)` \| [ufiS]", SPECIFICATION, re.MULTILINE)
    train = [name for name in listed if name.startswith("train_") and name in held]
    in_order = ["manifest", "id", "classes", *train, *(f"test{name[5:]}" for name in train), "teacher_weights"]
    assert held.keys() == set(in_order)
    # The manifest has the fields that are described, and no others.
    encoded = held["manifest"].tobytes()
    manifest = json.loads(encoded.rstrip(b"\0"))
    section = SPECIFICATION.split("## Manifest")[1].split("##")[0]
    assert manifest.keys() == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", section, re.MULTILINE))))
    # Checksums, per block and column, then the id.
    for split in ("train", "test"):
        columns = [name for name in in_order if name.startswith(f"{split}_") and not name.endswith("_checksums")]
        rows = manifest["block_rows"]
        for block, sums in enumerate(held[f"{split}_checksums"]):
            for name, checksum in zip(columns, sums, strict=True):
                part = held[name][block * rows : (block + 1) * rows]
                assert hashlib.sha256(part.tobytes()).digest() == checksum.tobytes()
    sums = b"".join(held[f"{split}_checksums"].tobytes() for split in ("train", "test"))
    assert hashlib.sha256(encoded + sums).hexdigest() == held["id"].tobytes().decode() == digits.id
    # What the manifest says of the rest.
    described = [held[f"{split}_{column}"] for split in ("train", "test") for column in ("labels", "keys", "digests")]
    digest = hashlib.sha256(b"".join(part.tobytes() for part in (held["classes"], *described)))
    assert digest.hexdigest() == manifest["dataset"]["fingerprint"]
    assert hashlib.sha256(held["teacher_weights"]).hexdigest() == manifest["teacher"]["weights_sha256"]
    correct = int((held["test_logits"].argmax(1) == held["test_labels"]).sum())
    assert correct == manifest["teacher"]["correct"]["test"]
    assert held["train_features"].shape == (manifest["dataset"]["rows"]["train"], manifest["features"]["width"])
    # A digest is of the image as the dataset has it.
    image = datasets.open_dataset("digits").train.read(5)
    shape = np.array(image.shape, "<i8").tobytes()
    assert hashlib.sha256(shape + image.tobytes()).digest()[:8] == held["train_digests"][5].tobytes()
