"""The teacher in a foreign cache: whatever its weights and options are, no code, no download, no memory taken."""

import hashlib
import json
import resource
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from forging import move, overwrite, resize, stretch
from pets import CLASSES, plan, write
from tspipe.cache import Cache, open_cache
from tspipe.errors import CacheDamaged, CacheMismatch, NetworkError, TspipeError
from tspipe.models import feature_net, networks, weights
from tspipe.models import teacher as teachers
from tspipe.recipes import load as recipes
from tspipe.training import targets as targets_module
from tspipe.training.targets import TargetLoader

SHAPE = (1, 16, 16)
SOURCE = "the teacher's weights in pets.h5"
DAMAGED = f"{SOURCE} is damaged, or no file of weights. Download it again and compare its checksum."
NAME = "Name the network that they belong to: --teacher NAME"


def sound(network: str = "lenet5", shape: tuple[int, int, int] = SHAPE) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return networks.build(network, len(CLASSES), shape).state_dict()


def load(
    tmp_path: Path,
    data: bytes | dict[str, Tensor],
    network: str = "lenet5",
    options: dict | None = None,
    shape: tuple[int, int, int] = SHAPE,
    width: int = 84,
) -> feature_net.FeatureNet:
    """The teacher of a cache that has these weights, with an id and a SHA-256 that fit them."""
    data = data if isinstance(data, bytes) else safetensors.torch.save(data)
    manifest = plan({"train": 3, "test": 1}, width=width)
    manifest["teacher"].update(
        network=network,
        options={"input_shape": list(shape), **(options or {})},
        weights_sha256=hashlib.sha256(data).hexdigest(),
    )
    write(tmp_path / "pets.h5", manifest, data)
    recipe = recipes.load("digits")
    return teachers.load_teacher(open_cache(tmp_path / "pets.h5"), recipe, shape, torch.device("cpu"))


def refusal(error: type[TspipeError], function: Callable[..., object], *arguments: object, **options: object) -> str:
    with pytest.raises(error) as refused:
        function(*arguments, **options)
    assert type(refused.value) is error
    return str(refused.value)


def header(content: object, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], size: int, dtype: str = "F32") -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


def test_a_sound_one_is_loaded(tmp_path: Path) -> None:
    assert load(tmp_path, sound()).width == 84


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
def test_bytes_that_are_no_weights(tmp_path: Path, data: bytes) -> None:
    assert refusal(NetworkError, load, tmp_path, data) == DAMAGED


def test_weights_of_another_sha256(tmp_path: Path) -> None:
    load(tmp_path, sound())
    path = tmp_path / "pets.h5"
    overwrite(path, "teacher_weights", b"\1", at=5000)
    said = refusal(CacheDamaged, open_cache(path).teacher_weights)
    assert said == f"{path}: the teacher's weights are not those of the manifest. Get the file again."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"features.0.weight": torch.zeros(6, 1, 3, 3)},
            "1 key has another shape (features.0.weight (6, 1, 3, 3), not (6, 1, 5, 5)). " + NAME,
        ),
        ({"more\x1b": torch.zeros(1)}, "1 key is not in the network (more\x1b). " + NAME),
        (
            {"classifier.0.weight": torch.zeros(120, 16, dtype=torch.int64)},
            "1 key holds no floating-point numbers (classifier.0.weight torch.int64). Save them as float32.",
        ),
        (
            {"classifier.0.weight": torch.zeros(120, 16, dtype=torch.complex64)},
            "1 key holds no floating-point numbers (classifier.0.weight torch.complex64). Save them as float32.",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor], said: str) -> None:
    assert refusal(NetworkError, load, tmp_path, {**sound(), **change}) == f"{SOURCE} does not fit lenet5: {said}"


def test_shapes_that_no_network_has() -> None:
    """Of weights that do not fit, tspipe tries which of its networks has as many channels and classes."""
    tensors = {"a": torch.empty(1, 2**40, 0, 1), "b": torch.empty(2**62, 0)}
    said = refusal(NetworkError, weights.check_fit, torch.nn.Flatten(), tensors, "lenet5", "w.pt")
    assert said == f"w.pt does not fit lenet5: 2 keys are not in the network (a, b). {NAME}"


def test_too_few_weights(tmp_path: Path) -> None:
    state = sound()
    del state["classifier.4.bias"]
    said = "1 key of the network is not in the weights (classifier.4.bias)"
    assert refusal(NetworkError, load, tmp_path, state) == f"{SOURCE} does not fit lenet5: {said}. {NAME}"
    assert refusal(NetworkError, load, tmp_path / "none", header({})).startswith(
        f"{SOURCE} does not fit lenet5: 10 keys"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_other_floating_point_numbers_are_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    teacher = load(tmp_path, {key: value.to(dtype) for key, value in sound().items()})
    assert {value.dtype for value in teacher.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_weights_that_did_not_write_the_rows(tmp_path: Path, value: float) -> None:
    teacher = load(tmp_path, {key: torch.full_like(t, value) for key, t in sound().items()})
    cache = open_cache(tmp_path / "pets.h5")
    said = refusal(CacheMismatch, teachers.check_teacher, teacher, cache, torch.ones(3, *SHAPE))
    assert said.startswith("pets.h5: the teacher built here gives other features than the file holds, by up to ")


def test_a_network_of_another_width(tmp_path: Path) -> None:
    said = refusal(CacheMismatch, load, tmp_path, sound(), width=5)
    assert said == "pets.h5: its teacher gives 84 features, its rows have 5."


@pytest.mark.parametrize("network", ["mine", "os", "networks.lenet5", "_stem"])
def test_a_network_that_is_not_ours_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{network}.py").write_text("raise SystemExit('it ran')")
    assert refusal(NetworkError, load, tmp_path, sound(), network) == (
        f"The teacher of pets.h5 is {network!r}, which is not one of tspipe's networks. "
        f"Name its file: --set teacher.network=./{network}.py"
    )


RGB = (3, 64, 64)


@pytest.mark.parametrize(
    "network", ["fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "raft_small", "get_model", "quantized_resnet18"]
)
def test_of_torchvision_only_classifiers(tmp_path: Path, network: str) -> None:
    said = refusal(NetworkError, load, tmp_path, b"", f"torchvision:{network}", shape=RGB)
    assert said.startswith(f"Unknown torchvision network {network!r}. There are: ")


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
    used = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", used.append)
    monkeypatch.setattr(socket.socket, "connect", used.append)
    refusal(NetworkError, load, tmp_path, sound(), f"torchvision:{network}", options, RGB)
    assert not used


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
    said = refusal(NetworkError, load, tmp_path, safetensors.torch.save(sound()), network, options, RGB)
    assert "does not fit" in said or "cannot be built with" in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def test_weights_of_a_tebibyte_of_holes_are_not_read(tmp_path: Path) -> None:
    load(tmp_path, sound())
    path = tmp_path / "pets.h5"
    resize(path, 2**41)
    stretch(path, "teacher_weights", 2**40, 1)
    move(path, "teacher_weights", 2**30)
    said = refusal(
        NetworkError, teachers.load_teacher, open_cache(path), recipes.load("digits"), SHAPE, torch.device("cpu")
    )
    assert said == f"{SOURCE} take 1,099,511,627,776 bytes, more than the 14,946 weights of lenet5 need."


def test_whatever_a_network_raises_for_images_of_another_size() -> None:
    """A vision transformer asserts the size, where other networks raise a RuntimeError."""

    class Choosy(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise AssertionError

    said = refusal(NetworkError, feature_net.last_linear, Choosy(), "choosy", torch.zeros(2, *SHAPE))
    assert said == "choosy does not take images of (1, 16, 16): AssertionError"


@pytest.mark.parametrize("slow", [True, False])
def test_rows_are_asked_for_ahead_where_they_come_slowly(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first batch, which shows it, each row once, so many batches before it is read."""
    monkeypatch.setattr(targets_module, "READ_AHEAD", 3)
    monkeypatch.setattr(targets_module, "SLOW_ROW", -1 if slow else 1)
    monkeypatch.setattr(targets_module, "GATHER_BYTES", 1)
    said: list[tuple[str, list[int]]] = []

    class Rows:
        shape, nbytes = (1000, 2), 4000

        def advise(self, rows: np.ndarray) -> None:
            said.append(("asked", rows.tolist()))

        def take(self, rows: np.ndarray) -> np.ndarray:
            said.append(("read", rows.tolist()))
            return np.zeros((len(rows), 2), np.float16)

    labels, needs = torch.arange(1000), frozenset({"features"})
    targets = TargetLoader({"features": Rows()}, labels, needs, memory=3999, device=torch.device("cpu"))
    order = list(torch.randperm(1000).split(100))
    found = list(targets.batches(order))
    rows = [batch.tolist() for batch in order]
    assert [batch for what, batch in said if what == "asked"] == (rows[1:] if slow else [])
    assert [batch for what, batch in said if what == "read"] == rows
    for i, batch in enumerate(rows[1:] if slow else [], 1):
        before = said[: said.index(("read", batch))]
        assert len([what for what, _ in before if what == "asked"]) == min(i + 3, 9)
    assert all(torch.equal(target.labels, batch) for target, batch in zip(found, order, strict=True))


@pytest.mark.parametrize("memory", [0, 2**20])
@pytest.mark.parametrize("taken", [1, 3 * 300 * (8 + 4 * 84), 2**20])
@pytest.mark.parametrize("needs", [{"features", "logits"}, {"features"}, set()])
def test_batches_are_rows_however_many_are_taken_together(
    digits: Cache, memory: int, taken: int, needs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets_module, "GATHER_BYTES", taken)
    columns, labels = {"features": digits.train.features, "logits": digits.train.logits}, digits.train.labels
    targets = TargetLoader(columns, torch.from_numpy(labels), frozenset(needs), memory, torch.device("cpu"))
    order = list(torch.randperm(1000).split(150))
    found = list(targets.batches(order))
    assert len(found) == len(order)
    for rows, target in zip(order, found, strict=True):
        assert torch.equal(target.labels, torch.from_numpy(labels)[rows])
        for name, part in (("features", target.features), ("logits", target.logits)):
            stored = torch.from_numpy(columns[name].load()).float()[rows]
            assert torch.equal(part, stored if name in needs else torch.empty(len(rows), 0))
    assert list(targets.batches([])) == []
    none, one = targets.batches([torch.empty(0, dtype=torch.int64), torch.arange(1)])
    assert (len(none.labels), len(one.labels)) == (0, 1)
    assert [len(target.labels) for target in targets.batches([torch.empty(0, dtype=torch.int64)] * 2)] == [0, 0]


@pytest.mark.parametrize(("memory", "held"), [(8000, torch.float32), (4000, torch.float16)])
def test_targets_are_held_as_float32_where_there_is_room(memory: int, held: torch.dtype) -> None:
    class Rows:
        shape, nbytes = (1000, 2), 4000

        def load(self) -> np.ndarray:
            return np.ones((1000, 2), np.float16)

    targets = TargetLoader(
        {"features": Rows()}, torch.arange(1000), frozenset({"features"}), memory, torch.device("cpu")
    )
    assert targets._held["features"].dtype == held
    (target,) = targets.batches([torch.arange(5)])
    assert target.features.dtype == torch.float32
