"""Files of weights: every format that is read, every file that is refused, and deterministic bytes."""

import contextlib
import fractions
import hashlib
import json
import os
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from shared import equal, error_message
from tspipe.errors import NetworkError, TspipeError
from tspipe.models import weights

SAVE = "save its state_dict: torch.save(net.state_dict(), …)"
REFUSED = (
    "{} is refused: beside tensors, it holds {}, and loading that could run code. If you trust it, load it elsewhere "
    f"and {SAVE}"
)
DAMAGED = "{} is damaged, or not a file of weights. Download it again and compare its checksum."
EMPTY = "{} has no tensors. Save the network's weights in it: torch.save(net.state_dict(), …)"
TOO_MANY = f"{{}} holds too many objects for a file of weights. Load it elsewhere and {SAVE}"


@pytest.fixture
def state():
    return {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7)}


@pytest.fixture
def hostile(tmp_path):
    """An object that creates a folder when it is unpickled."""

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    yield Hostile()
    assert not (tmp_path / "ran").exists(), "the pickle ran"


# Reading


@pytest.mark.parametrize("suffix", ["pt", "pth", "th", "tar", "bin", "weights"])
@pytest.mark.parametrize("zipped", [True, False])
def test_read_a_pytorch_file(tmp_path, state, suffix, zipped):
    path = tmp_path / f"w.{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    read = weights.read(path)
    assert equal(read.tensors, state)
    assert (read.metadata, read.source) == ({}, str(path))
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w"])
def test_read_a_safetensors_file(tmp_path, state, name):
    path = tmp_path / name
    safetensors.torch.save_file(state, path, {"format": "pt", "by": "someone"})
    read = weights.read(path)
    assert equal(read.tensors, state)
    assert read.metadata == {"format": "pt", "by": "someone"}
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


NESTS = ["state_dict", "net_state_dict", "model", "model_state_dict", "net", "teacher", "params", "weights", "ema"]


@pytest.mark.parametrize("nest", [*NESTS, "state_dict_ema", "model.state_dict", "optimal", "a.b.c"])
def test_read_unwraps(tmp_path, state, nest):
    content = {**{key: nn.Parameter(value.float()) for key, value in state.items()}, "note": "text"}
    for name in reversed(nest.split(".")):
        content = {name: content, "epoch": 3, "best": torch.tensor(0.9)}
    content["optimizer"] = {"lr": 0.1, "state": {0: {"step": torch.ones(2)}}, "shadow": {"a": torch.ones(2)}}
    torch.save(content, tmp_path / "w.pt")
    read = weights.read(tmp_path / "w.pt")
    assert equal(read.tensors, state) and not any(tensor.requires_grad for tensor in read.tensors.values())
    assert read.choice == ""


def test_averaged_weights_are_preferred_and_the_choice_is_stated(tmp_path, state):
    ema = {key: value + 1 for key, value in state.items()}
    path = tmp_path / "w.pt"
    torch.save({"state_dict": state, "state_dict_ema": {**ema, "n_averaged": torch.tensor(5)}}, path)
    read = weights.read(path)
    assert equal(read.tensors, ema) and read.choice == "state_dict_ema, not state_dict"
    read = weights.read(path, "state_dict")
    assert equal(read.tensors, state) and read.choice == "state_dict, not state_dict_ema"
    assert error_message(weights.read, path, "model") == (
        f"{path} holds no weights 'model', only: state_dict, state_dict_ema. Name the one to load: "
        "--set teacher.weights_key=NAME"
    )


@pytest.mark.parametrize("name", ["swa_model", "emamodel", "averaged_model", "model_ema", "EMA", "avg_model"])
def test_names_of_averaged_weights(tmp_path, state, name):
    ema = {key: value + 1 for key, value in state.items()}
    torch.save({"model": state, name: ema}, tmp_path / "w.pt")
    read = weights.read(tmp_path / "w.pt")
    assert equal(read.tensors, ema) and read.choice == f"{name}, not model"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"ema": {"decay": 0.9, "shadow_params": [torch.ones(2)]}}, "ema.shadow_params"),
        ({"ema": (torch.ones(2),)}, "ema"),
    ],
)
def test_averaged_weights_without_names_are_mentioned(tmp_path, state, content, name):
    torch.save({"model": state, **content, "rng": [torch.ones(2)]}, tmp_path / "w.pt")
    read = weights.read(tmp_path / "w.pt")
    assert equal(read.tensors, state)
    assert read.choice == f"model, not {name} (a list: its tensors have no names)"


def test_a_common_name_is_preferred(tmp_path, state):
    torch.save({**state, "other": state, "net": {"c": torch.ones(2)}}, tmp_path / "w.pt")
    read = weights.read(tmp_path / "w.pt")
    assert equal(read.tensors, {"c": torch.ones(2)}) and read.choice == "net, not its own tensors, other"


def test_several_networks_are_refused_unless_one_is_named(tmp_path, state):
    path, half = tmp_path / "w.pt", {key: value / 2 for key, value in state.items()}
    torch.save({"student": state, "teacher": half}, path)
    assert error_message(weights.read, path) == (
        f"{path} holds several sets of weights: student, teacher. Name the one to load: --set teacher.weights_key=NAME"
    )
    assert equal(weights.read(path, "teacher").tensors, half)
    torch.save({"state_dict": {f"{name}.{key}": state[key] for key in state for name in ("net", "loss")}}, path)
    assert equal(weights.read(path, "state_dict.net").tensors, state)
    torch.save({"state_dict": {f"module.{n}.{key}": state[key] for key in state for n in ("net", "loss")}}, path)
    assert equal(weights.read(path, "net").tensors, state)


def test_read_ignores_other_values(tmp_path, state):
    torch.save({**state, "epoch": 3, 4: torch.zeros(1)}, tmp_path / "w.pt")
    assert equal(weights.read(tmp_path / "w.pt").tensors, state)


def test_parse_reads_safetensors_bytes_only(state):
    assert equal(weights.parse(safetensors.torch.save(state), "teacher"), state)
    assert error_message(weights.parse, pickle.dumps(1), "teacher") == DAMAGED.format("teacher")


# Refusing


def test_a_missing_file(tmp_path):
    path = tmp_path / "w.pt"
    assert error_message(weights.read, path) == f"There is no file {path}. Give the path of the weights: --weights FILE"


def test_what_is_no_file(tmp_path):
    assert error_message(weights.read, tmp_path) == f"{tmp_path} cannot be read: Is a directory."
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert error_message(weights.read, path) == f"{path} cannot be read: it is not a regular file."


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w"])
@pytest.mark.parametrize(
    "content", [b"", b"hello world\n", b"<!DOCTYPE html><html>", b"\x80\x02", bytes(100), b"\x02" + bytes(7) + b"{}"]
)
def test_a_file_without_weights(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    expected = EMPTY if content.endswith(b"{}") else DAMAGED
    assert error_message(weights.read, path) == expected.format(path)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("cut", [1, 100, 0.5])
def test_a_truncated_file(tmp_path, state, form, cut):
    path = tmp_path / "w.pt"
    if form == "safetensors":
        path = tmp_path / "w.safetensors"
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: -cut if cut >= 1 else len(data) // 2])
    assert error_message(weights.read, path) == DAMAGED.format(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_checkpoint_is_refused_and_does_not_run(tmp_path, hostile, zipped):
    path = tmp_path / "w.pt"
    torch.save({"state_dict": {"a": torch.zeros(1), "b": hostile}}, path, _use_new_zipfile_serialization=zipped)
    assert error_message(weights.read, path) == REFUSED.format(path, "posix.mkdir")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w"])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, hostile, protocol, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(hostile, protocol))
    assert error_message(weights.read, path) == REFUSED.format(path, "posix.mkdir")


def test_a_hostile_pickle_named_safetensors_does_not_run(tmp_path, hostile):
    path = tmp_path / "w.safetensors"
    torch.save(hostile, path)
    assert error_message(weights.read, path) == DAMAGED.format(path)


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "w.pt")
    assert error_message(weights.read, tmp_path / "w.pt") == REFUSED.format(
        tmp_path / "w.pt", "torch.nn.modules.linear.Linear"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)), tmp_path / "w.pt")
    assert error_message(weights.read, tmp_path / "w.pt") == REFUSED.format(tmp_path / "w.pt", "TorchScript code")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({}, "nothing"),
        ({"state_dict": {}}, "state_dict (dict)"),
        ({"epoch": 1, "nets": [{"a": torch.zeros(1)}]}, "epoch (int), nets (list)"),
        (dict.fromkeys("abcdefg", 1), "a (int), b (int), c (int), d (int), e (int), …"),
        ([torch.zeros(1)], "a value (list)"),
        ({3: torch.zeros(1)}, "3 (Tensor)"),
    ],
)
def test_no_tensors_by_name(tmp_path, content, what):
    torch.save(content, tmp_path / "w.pt")
    assert error_message(weights.read, tmp_path / "w.pt") == (
        f"{tmp_path}/w.pt has no tensors in a dict by name; it holds {what}. Load it elsewhere and {SAVE}"
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float64(1), np.float64(1).__reduce__()[0].__module__ + ".scalar"),
        (fractions.Fraction(1), "fractions.Fraction"),
    ],
)
def test_what_is_beside_the_weights_is_named(tmp_path, state, zipped, value, name):
    path = tmp_path / "w.pt"
    torch.save({"state_dict": state, "beside": value}, path, _use_new_zipfile_serialization=zipped)
    assert error_message(weights.read, path) == REFUSED.format(path, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.zeros(2, device="meta"), "meta tensor, which has no numbers"),
        (lambda: torch.eye(2).to_sparse(), "sparse tensor, which cannot be loaded as weights"),
        (lambda: torch.eye(2).to_sparse_csr(), "sparse tensor, which cannot be loaded as weights"),
        (lambda: torch.nested.nested_tensor([torch.ones(2)]), "nested tensor, which cannot be loaded as weights"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8),
            "quantised tensor, which cannot be loaded as weights",
        ),
    ],
    ids=["meta", "coo", "csr", "nested", "quantised"],
)
def test_tensors_that_are_no_weights(tmp_path, make, kind):
    torch.save({"a": torch.zeros(1), "b": make()}, tmp_path / "w.pt")
    message = error_message(weights.read, tmp_path / "w.pt")
    assert message == f"{tmp_path}/w.pt: b is a {kind}. Save dense float32 tensors."


@pytest.mark.parametrize("form", ["records", "names", "legacy", "safetensors"])
def test_more_objects_than_a_network_has_are_refused_at_once(tmp_path, form):
    path = tmp_path / "w.pt"
    if form == "safetensors":
        header = json.dumps({"__metadata__": {"a": "b" * 2**21}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    elif form == "names":
        torch.save({"a" * 2**21: torch.zeros(1)}, path)
    elif form == "legacy":
        torch.save({str(i): i for i in range(100_000)}, path, _use_new_zipfile_serialization=False)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for i in range(10_001):
                archive.writestr(str(i), b"")
    start = time.process_time()
    assert error_message(weights.read, path) == TOO_MANY.format(path)
    if form == "safetensors":
        assert error_message(weights.read_metadata, path) == TOO_MANY.format(path)
    assert time.process_time() - start < 2


def test_a_file_that_unpacks_to_much_more_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data/0", bytes(10**7))
    assert error_message(weights.read, path) == (
        f"{path} is refused: its {path.stat().st_size:,} bytes unpack to 10,000,000. Files of weights are not "
        "compressed so."
    )


def test_a_file_larger_than_memory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "memory_limit", lambda _device: 999)
    (tmp_path / "w.pt").write_bytes(bytes(1_000))
    message = error_message(weights.read, tmp_path / "w.pt")
    assert message == f"{tmp_path}/w.pt cannot be read: it has 1,000 bytes, more than the memory limit of 999."


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_raise_nothing_else(tmp_path, state, zipped):
    path = tmp_path / "w.pt"
    torch.save({"model": state, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    data, draw = path.read_bytes(), random.Random(0)
    for _ in range(int(os.environ.get("TSPIPE_FUZZ", 100))):
        mutated = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 5])):
            mutated[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(mutated)
        with contextlib.suppress(NetworkError):
            weights.read(path)


@pytest.mark.parametrize("checksums", [True, False])
def test_flipped_bits_of_an_archive_are_noticed_by_its_checksums(tmp_path, checksums):
    path, before = tmp_path / "w.pt", torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    torch.save({"a": torch.full((100,), 1.25)}, path)
    torch.serialization.set_crc32_options(before)
    assert weights.read(path).tensors["a"].sum() == 125
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<f", 1.25), struct.pack("<f", 1.5), 1))
    if checksums:
        assert error_message(weights.read, path) == DAMAGED.format(path)
    else:
        assert weights.read(path).tensors["a"].sum() == 125.25


def test_an_archive_in_several_parts(tmp_path):
    """Python's zipfile raises an error of its own for the number of a part at the end of the bytes."""
    path = tmp_path / "w.pt"
    path.write_bytes(b"PK\3\4" + bytes(100) + b"PK\6\7" + b"\1" * 16 + b"PK\5\6" + bytes(18))
    assert error_message(weights.read, path) == DAMAGED.format(path)


def test_a_checkpoint_that_contains_itself(tmp_path, state):
    content = {"model": dict(state)}
    content["model"]["parent"] = content
    torch.save(content, tmp_path / "w.pt")
    assert equal(weights.read(tmp_path / "w.pt").tensors, state)


# Classes


def of_classes(classes):
    return weights.Weights({}, {} if classes is None else {"classes": classes}, "", "w.pt")


@pytest.mark.parametrize("classes", [None, "", "3", "[" * 10_000, '["cat", "dog"]'])
def test_classes_that_are_equal_or_not_known(classes):
    weights.check_classes(of_classes(classes), ("cat", "dog"), "pets")


@pytest.mark.parametrize(
    ("classes", "difference"),
    [
        (["cat", "cow"], "class 1 is 'cow' in place of 'dog'"),
        (["dog", "cat"], "class 0 is 'dog' in place of 'cat'"),
        (["cat"], "it has 1 classes in place of the 2"),
        ([1, "dog"], "class 0 is 1 in place of 'cat'"),
    ],
)
def test_other_classes(classes, difference):
    assert error_message(weights.check_classes, of_classes(json.dumps(classes)), ("cat", "dog"), "folder:my pets") == (
        f"w.pt was trained for other classes: {difference} of folder:my pets. Fine-tune it (tspipe teacher --dataset "
        "'folder:my pets' --weights w.pt), or use it as it is: --set teacher.any_classes=true"
    )


# Writing


def test_canonical_bytes_depend_only_on_the_weights():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    data = weights.canonical_bytes(network)
    assert equal(safetensors.torch.load(data), network.state_dict())
    assert weights.canonical_bytes(network.to(memory_format=torch.channels_last)) == data
    assert int.from_bytes(data[:8], "little") and b"__metadata__" not in data
    with torch.no_grad():
        network[0].bias[0] += 1
    assert weights.canonical_bytes(network) != data


def test_canonical_writes_tied_weights_twice():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    assert equal(safetensors.torch.load(weights.canonical_bytes(network)), network.state_dict())


@pytest.mark.parametrize("form", ["module", "tensors"])
def test_save_and_read(tmp_path, form):
    network, path = nn.Linear(2, 3), tmp_path / "new" / "w.safetensors"
    metadata = {"network": "lenet5", "classes": '["ä", "b"]', "accuracy": "0.9"}
    weights.save(path, network if form == "module" else network.state_dict(), metadata)
    read = weights.read(path)
    assert equal(read.tensors, network.state_dict())
    assert read.metadata == metadata
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [file.name for file in path.parent.iterdir()] == ["w.safetensors"]
    with safe_open(path, "pt") as file:
        assert weights.unpack_metadata(file.metadata()).items() >= metadata.items()


def test_weights_that_have_changed_since_they_were_saved_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    weights.save(path, nn.Linear(2, 3), {"network": "lenet5"})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert error_message(weights.read, path) == (
        f"{path} is damaged: its weights have changed since tspipe wrote them. Make it again."
    )


def test_save_is_deterministic(tmp_path, state):
    metadata = {str(i): "x" for i in range(20)}
    files = [tmp_path / f"{i}.safetensors" for i in range(10)]
    for path in files[::2]:
        weights.save(path, state, metadata)
    for path in files[1::2]:
        weights.save(path, dict(reversed(state.items())), dict(reversed(metadata.items())))
    assert len({path.read_bytes() for path in files}) == 1


def test_save_replaces_the_file_and_keeps_the_old_one_on_failure(tmp_path, state, monkeypatch):
    path = tmp_path / "w.safetensors"
    weights.save(path, {"a": torch.zeros(1)}, {})
    weights.save(path, state, {})
    assert equal(weights.read(path).tensors, state)
    before = path.read_bytes()

    def disk_full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(TspipeError) as error:
        weights.save(path, {"a": torch.zeros(1)}, {})
    assert str(error.value) == (
        f"{path} cannot be written: No space left on device. Existing files are kept. Fix this, then run the "
        "same command again."
    )
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    "metadata", [None, {}, {"tspipe": "not json"}, {"tspipe": "[1]"}, {"tspipe": '{"a":1}'}, {"tspipe": "[" * 10_000}]
)
def test_metadata_of_other_programs_is_unchanged(metadata):
    assert weights.unpack_metadata(metadata) == (metadata or {})
