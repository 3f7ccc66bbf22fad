"""Files of weights: every format that is read, every file that is refused, and deterministic bytes."""

import hashlib
import os
import pickle

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from shared import equal, error_message
from tspipe.errors import TspipeError
from tspipe.models import weights

REFUSED = (
    "{} is refused: it holds more than weights, and loading it could run code. If you trust it, load it elsewhere "
    "and save its state_dict: torch.save(net.state_dict(), …)"
)
DAMAGED = "{} is damaged, or not a file of weights. Download it again and compare its checksum."
EMPTY = "{} has no tensors. Save the network's weights in it: torch.save(net.state_dict(), …)"


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


@pytest.mark.parametrize("nest", ["state_dict", "net_state_dict", "model", "model_state_dict"])
def test_read_unwraps(tmp_path, state, nest):
    prefixed = {f"module.{key}": nn.Parameter(value.float()) for key, value in state.items()}
    torch.save({"epoch": 3, nest: {**prefixed, "module.note": "text"}, "optimizer": {"lr": 0.1}}, tmp_path / "w.pt")
    read = weights.read(tmp_path / "w.pt").tensors
    assert equal(read, state) and not any(tensor.requires_grad for tensor in read.values())


def test_read_unwraps_twice_and_strips_a_prefix_that_all_keys_have(tmp_path, state):
    torch.save({"model": {"state_dict": {f"module.{key}": state[key] for key in state}}}, tmp_path / "w.pt")
    assert equal(weights.read(tmp_path / "w.pt").tensors, state)
    mixed = {"module.a": state["a"], "b": state["b"]}
    torch.save(mixed, tmp_path / "mixed.pt")
    assert equal(weights.read(tmp_path / "mixed.pt").tensors, mixed)


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


def test_a_folder(tmp_path):
    assert error_message(weights.read, tmp_path) == f"{tmp_path} cannot be read: Is a directory."


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
    assert error_message(weights.read, path) == REFUSED.format(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w"])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, hostile, protocol, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(hostile, protocol))
    assert error_message(weights.read, path) == REFUSED.format(path)


def test_a_hostile_pickle_named_safetensors_does_not_run(tmp_path, hostile):
    path = tmp_path / "w.safetensors"
    torch.save(hostile, path)
    assert error_message(weights.read, path) == DAMAGED.format(path)


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "w.pt")
    assert error_message(weights.read, tmp_path / "w.pt") == REFUSED.format(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)), tmp_path / "w.pt")
    assert error_message(weights.read, tmp_path / "w.pt") == REFUSED.format(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"epoch": 1}, [torch.zeros(1)], torch.zeros(1)])
def test_no_tensors(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    assert error_message(weights.read, tmp_path / "w.pt") == EMPTY.format(tmp_path / "w.pt")


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
        assert weights.unpack_metadata(file.metadata()) == metadata


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
        f"{path} cannot be written: No space left on device. What is already there is kept: run the same command "
        "again when this is put right."
    )
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("metadata", [None, {}, {"tspipe": "not json"}, {"tspipe": "[1]"}, {"tspipe": '{"a":1}'}])
def test_metadata_of_other_programs_is_unchanged(metadata):
    assert weights.unpack_metadata(metadata) == (metadata or {})
