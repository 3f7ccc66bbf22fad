"""Weights: every form that is read, every file that is refused, and equal bytes for equal weights."""

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from tspipe.errors import NetworkError, TspipeError
from tspipe.models import networks, weights

PUBLISHED = Path(__file__).parents[2] / "../shared/data/resnet56-cifar10.th"
REFUSED = (
    "{} is refused: it holds more than weights, and loading it could run code. If you trust it, load it elsewhere "
    "and save its state_dict: torch.save(net.state_dict(), …)"
)
DAMAGED = "{} is damaged, or no file of weights. Download it again and compare its checksum."
EMPTY = "{} has no tensors. Save the network's weights in it: torch.save(net.state_dict(), …)"


@pytest.fixture
def state():
    return {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7)}


@pytest.fixture
def hostile(tmp_path):
    """An object that leaves a file behind when it is unpickled."""

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    yield Hostile()
    assert not (tmp_path / "ran").exists(), "the pickle ran"


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def refusal(function, *arguments):
    with pytest.raises(NetworkError) as caught:
        function(*arguments)
    return str(caught.value)


def on_meta(name, num_classes=10, input_shape=(3, 32, 32), **options):
    with torch.device("meta"):
        return networks.build(name, num_classes, input_shape, options)


def misfit(name, tensors, num_classes=10, input_shape=(3, 32, 32), **options):
    module = on_meta(name, num_classes, input_shape, **options)
    return refusal(weights.check_fit, module, tensors, name, "w.pt")


# Reading


@pytest.mark.parametrize("suffix", ["pt", "pth", "th", "tar", "bin", "weights"])
@pytest.mark.parametrize("zipped", [True, False])
def test_read_a_pytorch_file(tmp_path, state, suffix, zipped):
    path = tmp_path / f"w.{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    read = weights.read(path)
    assert same(read.tensors, state)
    assert (read.metadata, read.source) == ({}, str(path))
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w"])
def test_read_a_safetensors_file(tmp_path, state, name):
    path = tmp_path / name
    safetensors.torch.save_file(state, path, {"format": "pt", "by": "someone"})
    read = weights.read(path)
    assert same(read.tensors, state)
    assert read.metadata == {"format": "pt", "by": "someone"}
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("nest", ["state_dict", "net_state_dict", "model", "model_state_dict"])
def test_read_unwraps(tmp_path, state, nest):
    prefixed = {f"module.{key}": nn.Parameter(value.float()) for key, value in state.items()}
    torch.save({"epoch": 3, nest: {**prefixed, "module.note": "text"}, "optimizer": {"lr": 0.1}}, tmp_path / "w.pt")
    read = weights.read(tmp_path / "w.pt").tensors
    assert same(read, state) and not any(tensor.requires_grad for tensor in read.values())


def test_read_unwraps_twice_and_strips_a_prefix_that_all_keys_have(tmp_path, state):
    torch.save({"model": {"state_dict": {f"module.{key}": state[key] for key in state}}}, tmp_path / "w.pt")
    assert same(weights.read(tmp_path / "w.pt").tensors, state)
    mixed = {"module.a": state["a"], "b": state["b"]}
    torch.save(mixed, tmp_path / "mixed.pt")
    assert same(weights.read(tmp_path / "mixed.pt").tensors, mixed)


def test_read_drops_what_is_no_tensor(tmp_path, state):
    torch.save({**state, "epoch": 3, 4: torch.zeros(1)}, tmp_path / "w.pt")
    assert same(weights.read(tmp_path / "w.pt").tensors, state)


def test_parse_reads_safetensors_bytes_only(state):
    assert same(weights.parse(safetensors.torch.save(state), "teacher"), state)
    assert refusal(weights.parse, pickle.dumps(1), "teacher") == DAMAGED.format("teacher")


# Refusing


def test_a_missing_file(tmp_path):
    path = tmp_path / "w.pt"
    assert refusal(weights.read, path) == f"There is no file {path}. Give the path of the weights: --weights FILE"


def test_a_folder(tmp_path):
    assert refusal(weights.read, tmp_path) == f"{tmp_path} cannot be read: Is a directory."


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w"])
@pytest.mark.parametrize(
    "content", [b"", b"hello world\n", b"<!DOCTYPE html><html>", b"\x80\x02", bytes(100), b"\x02" + bytes(7) + b"{}"]
)
def test_no_weights_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    expected = EMPTY if content.endswith(b"{}") else DAMAGED
    assert refusal(weights.read, path) == expected.format(path)


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
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
    assert refusal(weights.read, path) == DAMAGED.format(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_checkpoint_is_refused_and_does_not_run(tmp_path, hostile, zipped):
    path = tmp_path / "w.pt"
    torch.save({"state_dict": {"a": torch.zeros(1), "b": hostile}}, path, _use_new_zipfile_serialization=zipped)
    assert refusal(weights.read, path) == REFUSED.format(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w"])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, hostile, protocol, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(hostile, protocol))
    assert refusal(weights.read, path) == REFUSED.format(path)


def test_a_hostile_pickle_named_safetensors_does_not_run(tmp_path, hostile):
    path = tmp_path / "w.safetensors"
    torch.save(hostile, path)
    assert refusal(weights.read, path) == DAMAGED.format(path)


def test_a_whole_network_is_refused(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "w.pt")
    assert refusal(weights.read, tmp_path / "w.pt") == REFUSED.format(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)), tmp_path / "w.pt")
    assert refusal(weights.read, tmp_path / "w.pt") == REFUSED.format(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"epoch": 1}, [torch.zeros(1)], torch.zeros(1)])
def test_no_tensors(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    assert refusal(weights.read, tmp_path / "w.pt") == EMPTY.format(tmp_path / "w.pt")


# Fitting


def test_load_into_copies_and_needs_no_counters():
    source, target = networks.build("resnet20", 10, (3, 8, 8)), networks.build("resnet20", 10, (3, 8, 8))
    tensors = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    weights.load_into(target, tensors, "resnet20", "w.pt")
    assert same(source.state_dict(), target.state_dict())


def test_load_into_refuses_before_it_copies():
    target = networks.build("lenet5", 10, (1, 16, 16))
    before = weights.canonical_bytes(target)
    tensors = {key: value + 1 for key, value in target.state_dict().items() if key != "classifier.4.bias"}
    assert refusal(weights.load_into, target, tensors, "lenet5", "w.pt") == (
        "w.pt does not fit lenet5: 1 key of the network is not in the weights (classifier.4.bias). "
        "Name the network that they belong to: --teacher NAME"
    )
    assert weights.canonical_bytes(target) == before


def test_weights_of_a_deeper_network():
    assert misfit("resnet20", on_meta("resnet56").state_dict()) == (
        "w.pt does not fit resnet20: 216 keys are not in the network (layer1.3.conv1.weight, layer1.3.bn1.weight, …). "
        "It seems to be resnet56 with 10 classes: use --teacher resnet56"
    )


def test_weights_of_another_network_under_published_keys():
    published = {
        key.replace("fc.", "linear.").replace("downsample", "shortcut"): value
        for key, value in on_meta("resnet32", 100, shortcut="B").state_dict().items()
    }
    assert misfit("lenet5", published) == (
        "w.pt does not fit lenet5: 200 keys are not in the network (conv1.weight, bn1.weight, …), "
        "10 keys of the network are not in the weights (features.0.weight, features.0.bias, …). "
        "It seems to be resnet32 with 100 classes: use --teacher resnet32"
    )


@pytest.mark.parametrize(
    ("name", "input_shape"), [*((name, (1, 32, 32)) for name in networks.names()), ("resnet18", (3, 224, 224))]
)
def test_every_network_is_recognised(name, input_shape):
    tensors = dict(sorted(on_meta(name, 7, input_shape).state_dict().items()))  # as safetensors has them
    message = refusal(weights.check_fit, nn.Linear(1, 1), tensors, "./mine.py", "w.pt")
    assert message.endswith(f" It seems to be {name} with 7 classes: use --teacher {name}")


def test_weights_of_the_same_network_with_another_option():
    assert misfit("resnet18", on_meta("resnet18", stem="imagenet").state_dict()) == (
        "w.pt does not fit resnet18: 1 key has another shape (conv1.weight (64, 3, 7, 7), not (64, 3, 3, 3)). "
        "It seems to be resnet18 with 10 classes: use --set teacher.options.stem=imagenet"
    )


def test_weights_of_the_same_network_for_other_images():
    assert misfit("lenet5", on_meta("lenet5", input_shape=(1, 28, 28)).state_dict()) == (
        "w.pt does not fit lenet5: 2 keys have another shape (features.0.weight (6, 1, 5, 5), not (6, 3, 5, 5), "
        "classifier.0.weight (120, 256), not (120, 400)). It seems to be lenet5 with 10 classes for images of 1×28×28."
    )


def test_nothing_is_claimed_of_weights_that_fit_no_network():
    tensors = {**on_meta("resnet56").state_dict(), "extra": torch.zeros(1)}
    assert misfit("resnet20", tensors) == (
        "w.pt does not fit resnet20: 217 keys are not in the network (layer1.3.conv1.weight, layer1.3.bn1.weight, …). "
        "Name the network that they belong to: --teacher NAME"
    )
    assert misfit("torchvision:squeezenet1_0", {"a": torch.zeros(1)}).endswith(
        "Name the network that they belong to: --teacher NAME"
    )


@pytest.mark.parametrize("name", ["resnet56", "lenet5", "torchvision:resnet18", "torchvision:squeezenet1_0"])
def test_another_number_of_classes(name):
    assert misfit(name, on_meta(name, 100).state_dict()) == (
        "w.pt has 100 classes, the dataset has 10. Give weights for these classes, or fine-tune them first: "
        "tspipe teacher --dataset NAME --weights w.pt"
    )


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published ResNet-56 is not here")
def test_the_published_resnet56_fits():
    found = weights.read(PUBLISHED)
    tensors, options = networks.adapt("resnet56", found.tensors)
    assert options == {"shortcut": "A"}
    network = networks.build("resnet56", 10, (3, 32, 32), options)
    weights.load_into(network, tensors, "resnet56", found.source)
    assert torch.equal(network.fc.weight, found.tensors["linear.weight"])
    with pytest.raises(NetworkError, match=r"It seems to be resnet56 with 10 classes: use --teacher resnet56$"):
        weights.check_fit(on_meta("resnet20"), tensors, "resnet20", found.source)


# Writing


def test_canonical_bytes_depend_on_the_weights_alone():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    data = weights.canonical_bytes(network)
    assert same(safetensors.torch.load(data), network.state_dict())
    assert weights.canonical_bytes(network.to(memory_format=torch.channels_last)) == data
    assert int.from_bytes(data[:8], "little") and b"__metadata__" not in data
    with torch.no_grad():
        network[0].bias[0] += 1
    assert weights.canonical_bytes(network) != data


def test_canonical_writes_tied_weights_twice():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    assert same(safetensors.torch.load(weights.canonical_bytes(network)), network.state_dict())


@pytest.mark.parametrize("form", ["module", "tensors"])
def test_save_and_read(tmp_path, form):
    network, path = nn.Linear(2, 3), tmp_path / "new" / "w.safetensors"
    metadata = {"network": "lenet5", "classes": '["ä", "b"]', "accuracy": "0.9"}
    weights.save(path, network if form == "module" else network.state_dict(), metadata)
    read = weights.read(path)
    assert same(read.tensors, network.state_dict())
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


def test_save_replaces_and_leaves_the_old_file_when_it_fails(tmp_path, state, monkeypatch):
    path = tmp_path / "w.safetensors"
    weights.save(path, {"a": torch.zeros(1)}, {})
    weights.save(path, state, {})
    assert same(weights.read(path).tensors, state)
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TspipeError) as refused:
        weights.save(path, {"a": torch.zeros(1)}, {})
    assert str(refused.value) == (
        f"{path} cannot be written: No space left on device. What is already there is kept: run the same command "
        "again when this is put right."
    )
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("metadata", [None, {}, {"tspipe": "no json"}, {"tspipe": "[1]"}, {"tspipe": '{"a":1}'}])
def test_stated_leaves_metadata_of_others_as_it_is(metadata):
    assert weights.unpack_metadata(metadata) == (metadata or {})
