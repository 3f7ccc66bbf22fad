"""A tiny cache computed by arithmetic: five features, two classes, and a teacher in name only."""

from pathlib import Path

import numpy as np

from tspipe.cache import SPLITS, CacheWriter, Dimensions, Manifest

CLASSES = ["cat", "dög"]


def plan(
    rows: dict[str, int],
    *,
    width: int = 5,
    dtype: str = "<f2",
    block_rows: int = 4,
    pool: int = 0,
    views: int = 0,
) -> Manifest:
    sha256 = "0" * 64
    return {
        "block_rows": block_rows,
        "compute": {"batch_size": 2, "device": "cpu", "precision": "float32"},
        "dataset": {"classes": 2, "fingerprint": None, "license": "CC0", "name": "pets", "rows": rows},
        "features": {"dtype": dtype, "width": width},
        "preprocess": {"crop": None, "interpolation": "bilinear", "mean": [0.5], "resize": None, "std": [0.25]},
        "random": {"generator": "mt19937", "rows": pool, "seed": 0} if pool else None,
        "teacher": {
            "correct": None,
            "file_sha256": sha256,
            "network": "lenet5",
            "options": {"input_shape": [1, 2, 2]},
            "weights_sha256": sha256,
        },
        "views": {"count": views, "flip": True, "seed": 0, "shift": 1} if views else None,
    }


def dimensions(manifest: Manifest, weights: bytes = b"") -> Dimensions:
    return Dimensions(
        rows=manifest["dataset"]["rows"],
        width=manifest["features"]["width"],
        classes=2,
        feature_dtype=manifest["features"]["dtype"],
        block_rows=manifest["block_rows"],
        class_bytes=4,
        key_bytes=dict.fromkeys(SPLITS, 6),
        weights_bytes=len(weights),
        views=manifest["views"] and manifest["views"]["count"],
        random_rows=manifest["random"] and manifest["random"]["rows"],
    )


def rows_of(split: str, images: range, width: int, views: int = 1) -> dict[str, np.ndarray]:
    """Return the rows of these images, by arithmetic that gives the same values on every machine."""
    i = np.array(images)[:, None] + 100 * (*SPLITS, "random").index(split)
    inputs = (i + 7 * np.arange(views)).reshape(-1, 1)
    return {
        "features": (37 * inputs + 11 * np.arange(width)) % 101 / np.float32(8) - 6,
        "logits": (53 * inputs + 29 * np.arange(2)) % 89 / np.float32(16) - 2,
        "views": np.stack([inputs % 3 - 1, inputs % 5 % 3 - 1, inputs % 2], axis=1)[:, :, 0].astype(np.int16),
        "labels": i[:, 0] * 5 % 7 % 2,
        "keys": np.array([f"{split[:2]}{n}".encode() for n in images]),
        "digests": (i * np.arange(1, 9) * 19 % 251).astype(np.uint8),
    }


def write(path: Path, manifest: Manifest, weights: bytes = b"", stop_after: int | None = None) -> list[tuple[str, int]]:
    """Write a cache, or only its next `stop_after` blocks; return the blocks that were written."""
    sizes = dimensions(manifest, weights)
    done = []
    with CacheWriter(path, manifest, sizes, CLASSES, weights) as writer:
        for split in sizes.sections:
            for block in writer.missing(split):
                if len(done) == stop_after:
                    return done
                images, views = sizes.block(split, block), sizes.views_of(split)
                writer.write_block(split, block, rows_of(split, images, sizes.width, views))
                done.append((split, block))
        writer.finish()
    return done
