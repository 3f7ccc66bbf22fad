"""The manifest says exactly what the schema allows, in exactly one spelling."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tspipe.cache.layout import MANIFEST_BYTES, Dimensions
from tspipe.cache.manifest import Manifest, decode_manifest, encode_manifest
from tspipe.errors import CacheError, NotACache

SHA = "0123456789abcdef" * 4
MANIFEST: Manifest = {
    "block_rows": 256,
    "compute": {"batch_size": 64, "device": "cpu", "precision": "float32"},
    "dataset": {
        "classes": 200,
        "fingerprint": SHA,
        "license": "…",
        "name": "cub200",
        "rows": {"test": 5794, "train": 5994},
    },
    "features": {"dtype": "<f2", "width": 10240},
    "preprocess": {"crop": 448, "interpolation": "bilinear", "mean": [0.5], "resize": [600, 600], "std": [0.25]},
    "random": {"generator": "mt19937", "rows": 1000, "seed": 0},
    "teacher": {
        "correct": {"test": 5000, "train": 5900},
        "file_sha256": SHA,
        "network": "resnet50",
        "options": {"input_shape": [3, 448, 448], "stem": "auto"},
        "weights_sha256": SHA,
    },
    "views": {"count": 4, "flip": True, "seed": 0, "shift": 4},
}


def changed(path: str, value: object) -> Manifest:
    manifest = copy.deepcopy(MANIFEST)
    *sections, last = path.split(".")
    inner = manifest
    for section in sections:
        inner = inner[section]
    inner[last] = value
    return manifest


def test_round_trip() -> None:
    data = encode_manifest(MANIFEST)
    assert len(data) == MANIFEST_BYTES
    assert decode_manifest(data) == MANIFEST


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("surprise", 1, "manifest has an unknown field 'surprise'."),
        ("block_rows", 0, "manifest.block_rows cannot be 0."),
        ("block_rows", True, "manifest.block_rows cannot be true."),
        ("block_rows", 2.0, "manifest.block_rows cannot be 2.0."),
        ("dataset.rows.train", -1, "manifest.dataset.rows.train cannot be -1."),
        ("dataset.rows.train", 2**60, "manifest.dataset.rows.train cannot be 1152921504606846976."),
        ("dataset.rows", [1, 2], "manifest.dataset.rows is not an object."),
        ("dataset.fingerprint", None, "manifest.dataset.fingerprint cannot be null."),
        ("dataset.name", "../../etc", 'manifest.dataset.name cannot be "../../etc".'),
        ("dataset.name", "folder:..", 'manifest.dataset.name cannot be "folder:..".'),
        ("dataset.name", "mine.py", 'manifest.dataset.name cannot be "mine.py".'),
        ("teacher.network", "./mine.py", 'manifest.teacher.network cannot be "./mine.py".'),
        ("teacher.network", "mine.py", 'manifest.teacher.network cannot be "mine.py".'),
        ("teacher.options", {"a": {"b": {"c": {"d": 1}}}}, None),
        ("features.dtype", ">f2", 'manifest.features.dtype cannot be ">f2".'),
        ("preprocess.std", [0.0], "manifest.preprocess.std cannot be [0.0]."),
        ("preprocess.mean", [1e400], None),
        ("views", {"count": 4}, "manifest.views lacks the field 'flip'."),
        ("views.count", 1, "manifest.views.count cannot be 1."),
        ("views.shift", 2**15, "manifest.views.shift cannot be 32768."),
        (
            "views",
            {"count": 2, "flip": False, "seed": 0, "shift": 0},
            "manifest.views has neither a shift nor a flip.",
        ),
    ],
)
def test_what_the_schema_does_not_allow(path: str, value: object, message: str | None) -> None:
    text = json.dumps(changed(path, value), sort_keys=True, separators=(",", ":"))
    with pytest.raises(NotACache) as refused:
        decode_manifest(text.encode().ljust(MANIFEST_BYTES, b"\0"))
    assert message is None or str(refused.value) == message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "its manifest is not JSON."),
        (b"{" * 60000, "its manifest is not JSON."),
        (b"[" * 60000, "its manifest is not JSON."),
        (b"\xff", "its manifest is not JSON."),
        (b"7", "manifest is not an object."),
        (json.dumps(MANIFEST).encode(), "its manifest is not canonical JSON."),
        (encode_manifest(MANIFEST).rstrip(b"\0").replace(b":256", b':2,"block_rows":256', 1), None),
    ],
)
def test_other_texts(data: bytes, message: str | None) -> None:
    with pytest.raises(NotACache) as refused:
        decode_manifest(data.ljust(MANIFEST_BYTES, b"\0"))
    assert message is None or str(refused.value) == message


@given(data=st.binary(max_size=200), at=st.integers(0, 900))
def test_only_cache_errors_come_out(data: bytes, at: int) -> None:
    whole = bytearray(encode_manifest(MANIFEST))
    whole[at : at + len(data)] = data
    try:
        result = decode_manifest(bytes(whole[:MANIFEST_BYTES]))
    except CacheError:
        return
    assert encode_manifest(result) == bytes(whole[:MANIFEST_BYTES])


def test_too_long_a_manifest() -> None:
    with pytest.raises(CacheError) as refused:
        encode_manifest(changed("dataset.license", "x" * 70000))
    assert str(refused.value) == "The manifest takes 70,784 bytes; the format has room for 65,536."


def test_a_plan_may_lack_what_is_known_only_at_the_end() -> None:
    plan = changed("dataset.fingerprint", None)
    plan["teacher"]["correct"] = None
    assert decode_manifest(encode_manifest(plan), finished=False) == plan


def test_only_training_images_have_views() -> None:
    keys = {"train": 4, "test": 4}
    sizes = Dimensions({"train": 8, "test": 4}, 5, 2, "<f2", 4, 4, keys, views=3, random_rows=6)
    assert sizes.sections == ("train", "test", "random")
    assert sizes.column_rows("train", "features", sizes.block("train", 1)) == slice(12, 24)
    assert sizes.column_rows("train", "labels", sizes.block("train", 1)) == slice(4, 8)
    assert sizes.column_rows("test", "features", sizes.block("test", 0)) == slice(0, 4)
    assert sizes.column_rows("random", "features", sizes.block("random", 1)) == slice(4, 6)
    assert [split for split in sizes.sections if "views" in sizes.columns(split)] == ["train"]
    shapes = {name: shape for name, (_, shape) in sizes.datasets().items()}
    assert (shapes["train_views"], shapes["train_logits"], shapes["train_checksums"]) == ((24, 3), (24, 2), (2, 6, 32))
    assert (shapes["test_features"], shapes["test_checksums"]) == ((4, 5), (1, 5, 32))
    assert sizes.datasets()["random_features"][1] == (6, 5)
    assert Dimensions({"train": 8, "test": 4}, 5, 2, "<f2", 4, 4, keys).sections == ("train", "test")
