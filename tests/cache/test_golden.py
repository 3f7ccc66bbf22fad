"""A version-1 file that was written once and stays readable for ever."""

import hashlib
from pathlib import Path

import numpy as np

from pets import plan, write
from tspipe.cache import open_cache

GOLDEN = Path(__file__).parent / "golden-v1.h5"
ROWS = {"train": 10, "test": 3}
WEIGHTS = b"in place of weights"


def golden_plan() -> dict:
    manifest = plan(ROWS)
    manifest["teacher"]["weights_sha256"] = hashlib.sha256(WEIGHTS).hexdigest()
    return manifest


def test_it_is_read() -> None:
    cache = open_cache(GOLDEN)
    assert cache.id == "55ab4f8ba2ec126fdd6186a1ef32c9139b947012867cb0c003fd7424da5c0359"
    assert cache.classes == ["cat", "dög"]
    assert cache.manifest["teacher"]["correct"] == {"test": 3, "train": 4}
    assert cache.train.features.dtype == np.dtype("<f2")
    assert cache.train.features[[0, 9]].tolist() == [
        [-6.0, -4.625, -3.25, -1.875, -0.5],
        [-2.25, -0.875, 0.5, 1.875, 3.25],
    ]
    assert cache.test.logits[1].tolist() == [-1.1875, 0.625]
    assert cache.train.labels.tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert cache.test.keys[:].tolist() == [b"te0", b"te1", b"te2"]
    assert cache.test.digests[2].tolist() == [181, 111, 41, 222, 152, 82, 12, 193]
    assert cache.teacher_weights() == WEIGHTS


def test_it_is_written_again_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "again.h5", golden_plan(), WEIGHTS)
    assert (tmp_path / "again.h5").read_bytes() == GOLDEN.read_bytes()
