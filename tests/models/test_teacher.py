"""The teacher in an untrusted cache: whatever its weights and options are, no code runs and nothing is downloaded."""

import hashlib
import json
import resource
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from forging import move, overwrite, resize, stretch
from pets import CLASSES, plan, write
from tspipe.cache import Cache, open_cache
from tspipe.errors import CacheDamaged, CacheMismatch, NetworkError, TspipeError
from tspipe.models import feature_net, loading, networks, teacher
from tspipe.recipes import load as recipes

SHAPE = (1, 16, 16)
SOURCE = "the teacher's weights in pets.h5"
DAMAGED = f"{SOURCE} is damaged, or not a file of weights. Download it again and compare its checksum."
NAME = "Name the network that they belong to: --teacher NAME"


def initial_weights(network: str = "lenet5", shape: tuple[int, int, int] = SHAPE) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return networks.build(network, len(CLASSES), shape).state_dict()


def load_teacher(
    tmp_path: Path,
    data: bytes | dict[str, Tensor],
    network: str = "lenet5",
    options: dict | None = None,
    shape: tuple[int, int, int] = SHAPE,
    width: int = 84,
) -> feature_net.FeatureNet:
    """Load the teacher of a cache with these weights, whose id and SHA-256 are correct."""
    data = data if isinstance(data, bytes) else safetensors.torch.save(data)
    manifest = plan({"train": 3, "test": 1}, width=width)
    manifest["teacher"].update(
        network=network,
        options={"input_shape": list(shape), **(options or {})},
        weights_sha256=hashlib.sha256(data).hexdigest(),
    )
    write(tmp_path / "pets.h5", manifest, data)
    recipe = recipes.load("digits")
    return teacher.load_teacher(open_cache(tmp_path / "pets.h5"), recipe, shape, torch.device("cpu"))


def error_message(
    error: type[TspipeError], function: Callable[..., object], *arguments: object, **options: object
) -> str:
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert type(caught.value) is error
    return str(caught.value)


def header(content: object, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], size: int, dtype: str = "F32") -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


def test_a_valid_teacher_is_loaded(tmp_path: Path) -> None:
    assert load_teacher(tmp_path, initial_weights()).width == 84


@pytest.mark.parametrize(
    "data",
    [
        b"in place of weights",
        b"\x80\x04K\x01.",
        b"PK\x03\x04" + bytes(100),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
        header(b"[" * 50_000),
        header({"__metadata__": {"a": 1}}),
        header(tensor([4], 16), bytes(8)),
        header(tensor([2**40], 2**42), bytes(8)),
        header(tensor([2**62, 2**62], 0)),
        header(tensor([0, 2**63], 0)),
        header(tensor([0, *[2**32] * 8], 0)),
        header(tensor([-1], 4), bytes(4)),
        header(tensor([1], 4, "F32; import os"), bytes(4)),
        header({**tensor([1], 4), "b": tensor([1], 4)["a"]}, bytes(4)),
    ],
    ids=range(16),
)  # fmt: skip
def test_bytes_that_are_not_weights(tmp_path: Path, data: bytes) -> None:
    assert error_message(NetworkError, load_teacher, tmp_path, data) == DAMAGED


def test_weights_of_another_sha256(tmp_path: Path) -> None:
    load_teacher(tmp_path, initial_weights())
    path = tmp_path / "pets.h5"
    overwrite(path, "teacher_weights", b"\1", at=5000)
    message = error_message(CacheDamaged, open_cache(path).teacher_weights)
    assert message == f"{path}: the teacher's weights are not those of the manifest. Get the file again."


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"features.0.weight": torch.zeros(6, 1, 3, 3)},
            "1 key of another shape (features.0.weight (6, 1, 3, 3), not (6, 1, 5, 5)). " + NAME,
        ),
        ({"more\x1b": torch.zeros(1)}, "1 key not in the network (more\x1b). " + NAME),
        (
            {"classifier.0.weight": torch.zeros(120, 16, dtype=torch.int64)},
            "1 key without floating-point numbers (classifier.0.weight torch.int64). Save them as float32.",
        ),
        (
            {"classifier.0.weight": torch.zeros(120, 16, dtype=torch.complex64)},
            "1 key without floating-point numbers (classifier.0.weight torch.complex64). Save them as float32.",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor], problem: str) -> None:
    assert (
        error_message(NetworkError, load_teacher, tmp_path, {**initial_weights(), **change})
        == f"{SOURCE} does not fit lenet5: {problem}"
    )


def test_shapes_of_no_network() -> None:
    """For weights that do not fit, tspipe looks for one of its networks with these channels and classes."""
    tensors = {"a": torch.empty(1, 2**40, 0, 1), "b": torch.empty(2**62, 0)}
    message = error_message(NetworkError, loading.check_fit, torch.nn.Flatten(), tensors, "lenet5", "w.pt")
    assert message == f"w.pt does not fit lenet5: 2 keys not in the network (a, b). {NAME}"


def test_too_few_weights(tmp_path: Path) -> None:
    state = initial_weights()
    del state["classifier.4.bias"]
    problem = "1 key missing (classifier.4.bias)"
    assert (
        error_message(NetworkError, load_teacher, tmp_path, state) == f"{SOURCE} does not fit lenet5: {problem}. {NAME}"
    )
    assert error_message(NetworkError, load_teacher, tmp_path / "none", header({})).startswith(
        f"{SOURCE} does not fit lenet5: 10 keys"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_other_floating_point_types_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    network = load_teacher(tmp_path, {key: value.to(dtype) for key, value in initial_weights().items()})
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_weights_that_do_not_match_the_rows(tmp_path: Path, value: float) -> None:
    network = load_teacher(tmp_path, {key: torch.full_like(t, value) for key, t in initial_weights().items()})
    cache = open_cache(tmp_path / "pets.h5")
    message = error_message(CacheMismatch, teacher.check_teacher, network, cache, torch.ones(3, *SHAPE))
    assert message.startswith(
        "pets.h5: the teacher built from this file computes other features than its rows hold, by up to "
    )


def test_a_network_of_another_width(tmp_path: Path) -> None:
    message = error_message(CacheMismatch, load_teacher, tmp_path, initial_weights(), width=5)
    assert message == "pets.h5: its teacher has 84 features, its rows have 5."


@pytest.mark.parametrize("network", ["mine", "os", "networks.lenet5", "_stem", "cifar_resnet"])
def test_a_file_that_only_the_cache_names_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{network}.py").write_text("raise SystemExit('imported')")
    assert error_message(NetworkError, load_teacher, tmp_path, initial_weights(), network) == (
        f"The teacher of pets.h5 is {network!r}, which is not one of tspipe's networks. "
        f"Name its file: --teacher ./{network}.py (of tspipe verify: --set teacher.network=./{network}.py)"
    )


RGB = (3, 64, 64)


@pytest.mark.parametrize(
    "network", ["fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "raft_small", "get_model", "quantized_resnet18"]
)
def test_only_classifiers_of_torchvision(tmp_path: Path, network: str) -> None:
    message = error_message(NetworkError, load_teacher, tmp_path, b"", f"torchvision:{network}", shape=RGB)
    assert message.startswith(f"Unknown torchvision network {network!r}. There are: ")


@pytest.mark.parametrize("network", ["resnet18", "googlenet", "mobilenet_v3_small"])
@pytest.mark.parametrize(
    "options",
    [
        {"weights": "DEFAULT"},
        {"weights": "IMAGENET1K_V1"},
        {"pretrained": True},
        {"pretrained": "https://example.org/w.pth"},
        {"weights_backbone": "DEFAULT", "pretrained_backbone": True},
        {"num_classes": 65536},
        {"norm_layer": "os.system"},
    ],
    ids=lambda options: "-".join(map(str, options.items())),
)
def test_options_download_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, options: dict) -> None:
    connections = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", connections.append)
    monkeypatch.setattr(socket.socket, "connect", connections.append)
    error_message(NetworkError, load_teacher, tmp_path, initial_weights(), f"torchvision:{network}", options, RGB)
    assert not connections


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("torchvision:resnet18", {"width_per_group": 65536, "groups": 65536}),
        ("torchvision:mobilenet_v2", {"width_mult": 65536.0}),
        ("torchvision:densenet121", {"bn_size": 65536}),
        ("torchvision:vit_h_14", {"image_size": 65534}),
    ],
)
def test_a_huge_network_takes_no_memory(tmp_path: Path, network: str, options: dict) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = error_message(
        NetworkError, load_teacher, tmp_path, safetensors.torch.save(initial_weights()), network, options, RGB
    )
    assert "does not fit" in message or "cannot be built with" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def test_weights_of_a_tebibyte_of_holes_are_not_read(tmp_path: Path) -> None:
    load_teacher(tmp_path, initial_weights())
    path = tmp_path / "pets.h5"
    resize(path, 2**41)
    stretch(path, "teacher_weights", 2**40, 1)
    move(path, "teacher_weights", 2**30)
    message = error_message(
        NetworkError, teacher.load_teacher, open_cache(path), recipes.load("digits"), SHAPE, torch.device("cpu")
    )
    assert message == f"{SOURCE} take 1,099,511,627,776 bytes, more than the 14,946 weights of lenet5 need."


def test_a_teacher_no_better_than_chance_is_remarked_on(digits: Cache) -> None:
    assert teacher.accuracy_warning(digits) is None
    labels, logits = np.array([0, 1] * 10), np.eye(2, dtype=np.float32)[[0, 1, 1, 0] * 5]
    test = SimpleNamespace(labels=labels, logits=SimpleNamespace(load=lambda: logits))
    cache = SimpleNamespace(test=test, manifest={"teacher": {"correct": {"test": 10}}})
    warning = teacher.accuracy_warning(cast(Cache, cache))
    assert warning is not None
    assert warning.startswith("The teacher classifies 50.00% of the test images correctly, and guesses may reach ")
    cache.manifest["teacher"]["correct"]["test"] = 15
    assert teacher.accuracy_warning(cast(Cache, cache)) is None
