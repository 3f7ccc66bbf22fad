"""Loading weights into a network, and the messages for weights that do not fit."""

import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from shared import equal, error_message
from tspipe.errors import NetworkError
from tspipe.models import loading, networks, weights

PUBLISHED = Path(__file__).parents[2] / "../shared/data/resnet56-cifar10.th"
SHAPE = (3, 32, 32)


def on_meta(name, num_classes=10, input_shape=(3, 32, 32), **options):
    with torch.device("meta"):
        return networks.build(name, num_classes, input_shape, options)


def misfit(name, tensors, num_classes=10, input_shape=(3, 32, 32), **options):
    module = on_meta(name, num_classes, input_shape, **options)
    return error_message(loading.check_fit, module, tensors, name, "w.pt")


def test_load_network_returns_the_options_that_the_weights_imply() -> None:
    module = networks.build("resnet20", 10, SHAPE, {"shortcut": "B"})
    options = {"input_shape": list(SHAPE), "shortcut": "A"}
    spec = loading.NetworkSpec("resnet20", 10, SHAPE, options)
    loaded, implied = loading.load_network(spec, module.state_dict(), "w.pt")
    assert implied == {"input_shape": [3, 32, 32], "shortcut": "B"}
    assert weights.canonical_bytes(loaded) == weights.canonical_bytes(module)


def test_weights_are_counted_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # an import of it fails
    assert loading.NetworkSpec("resnet20", 10, SHAPE, {}).count_parameters() == 269_722


def test_load_into_copies_and_does_not_need_counters():
    source, target = networks.build("resnet20", 10, (3, 8, 8)), networks.build("resnet20", 10, (3, 8, 8))
    tensors = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    loading.load_into(target, tensors, "resnet20", "w.pt")
    assert equal(source.state_dict(), target.state_dict())


def test_load_into_changes_nothing_if_the_weights_do_not_fit():
    target = networks.build("lenet5", 10, (1, 16, 16))
    before = weights.canonical_bytes(target)
    tensors = {key: value + 1 for key, value in target.state_dict().items() if key != "classifier.4.bias"}
    assert error_message(loading.load_into, target, tensors, "lenet5", "w.pt") == (
        "w.pt does not fit lenet5: 1 key missing (classifier.4.bias). "
        "Name the network that they belong to: --teacher NAME"
    )
    assert weights.canonical_bytes(target) == before


def test_weights_of_a_deeper_network():
    assert misfit("resnet20", on_meta("resnet56").state_dict()) == (
        "w.pt does not fit resnet20: 216 keys not in the network (layer1.3.conv1.weight, layer1.3.bn1.weight, …). "
        "It seems to be resnet56 with 10 classes: use --teacher resnet56"
    )


def test_weights_of_another_network_under_published_keys():
    published = {
        key.replace("fc.", "linear.").replace("downsample", "shortcut"): value
        for key, value in on_meta("resnet32", 100, shortcut="B").state_dict().items()
    }
    assert misfit("lenet5", published) == (
        "w.pt does not fit lenet5: 200 keys not in the network (conv1.weight, bn1.weight, …), "
        "10 keys missing (features.0.weight, features.0.bias, …). "
        "It seems to be resnet32 with 100 classes: use --teacher resnet32"
    )


@pytest.mark.parametrize(
    ("name", "input_shape"), [*((name, (1, 32, 32)) for name in networks.names()), ("resnet18", (3, 224, 224))]
)
def test_every_network_is_recognised(name, input_shape):
    tensors = dict(sorted(on_meta(name, 7, input_shape).state_dict().items()))  # in the order of safetensors
    message = error_message(loading.check_fit, nn.Linear(1, 1), tensors, "./mine.py", "w.pt")
    assert message.endswith(f" It seems to be {name} with 7 classes: use --teacher {name}")


def test_weights_of_the_same_network_with_another_option():
    assert misfit("resnet18", on_meta("resnet18", stem="imagenet").state_dict()) == (
        "w.pt does not fit resnet18: 1 key of another shape (conv1.weight (64, 3, 7, 7), not (64, 3, 3, 3)). "
        "It seems to be resnet18 with 10 classes: use --set teacher.options.stem=imagenet"
    )


def test_weights_of_the_same_network_for_other_images():
    assert misfit("lenet5", on_meta("lenet5", input_shape=(1, 28, 28)).state_dict()) == (
        "w.pt does not fit lenet5: 2 keys of another shape (features.0.weight (6, 1, 5, 5), not (6, 3, 5, 5), "
        "classifier.0.weight (120, 256), not (120, 400)). It seems to be lenet5 with 10 classes for images of 1×28×28."
    )


def test_no_network_is_suggested_for_weights_that_fit_none():
    tensors = {**on_meta("resnet56").state_dict(), "extra": torch.zeros(1)}
    assert misfit("resnet20", tensors) == (
        "w.pt does not fit resnet20: 217 keys not in the network (layer1.3.conv1.weight, layer1.3.bn1.weight, …). "
        "Name the network that they belong to: --teacher NAME"
    )
    assert misfit("torchvision:squeezenet1_0", {"a": torch.zeros(1)}).endswith(
        "Name the network that they belong to: --teacher NAME"
    )


@pytest.mark.parametrize(("names", "others"), [(("model", "ema_model"), ()), (("encoder_q", "encoder_k"), ("queue",))])
def test_several_sets_of_weights_in_one_dict(names, others):
    state = on_meta("resnet20").state_dict()
    tensors = {f"{name}.{key}": state[key] for name in names for key in state} | {n: torch.zeros(2) for n in others}
    assert misfit("resnet20", tensors).endswith(
        f"It seems to hold the weights of resnet20 under {names[0]} and under {names[1]}. "
        f"Name those to load: --set teacher.weights_key={names[0]}"
    )


@pytest.mark.parametrize("name", ["resnet56", "lenet5", "torchvision:resnet18", "torchvision:squeezenet1_0"])
def test_another_number_of_classes(name):
    assert misfit(name, on_meta(name, 100).state_dict()) == (
        "w.pt has 100 classes, the dataset has 10. Give weights for these classes, or fine-tune them first: "
        "tspipe teacher --dataset NAME --weights w.pt"
    )


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs the published ResNet-56")
def test_the_published_resnet56_fits():
    published = weights.read(PUBLISHED)
    network, options = loading.load_network(loading.NetworkSpec("resnet56", 10, SHAPE, {}), *published[::3])
    assert options == {"shortcut": "A"}
    tensors = {key.removeprefix("module."): value for key, value in published.tensors.items()}
    assert torch.equal(network.fc.weight, tensors["linear.weight"])
    with pytest.raises(NetworkError, match=r"It seems to be resnet56 with 10 classes: use --teacher resnet56$"):
        loading.check_fit(on_meta("resnet20"), tensors, "resnet20", published.source)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "net.", "network.module."]
)
@pytest.mark.parametrize("renamed", [False, True])
def test_prefixes_of_wrappers_are_removed(prefix, renamed):
    state = networks.build("resnet20", 10, SHAPE, {"shortcut": "B"}).state_dict()
    tensors = {prefix + (key.replace("fc.", "linear.") if renamed else key): state[key] for key in state}
    loaded, options = loading.load_network(loading.NetworkSpec("resnet20", 10, SHAPE, {}), tensors, "w.pt")
    assert equal(loaded.state_dict(), state) and options == {"shortcut": "B"}


def test_a_prefix_that_the_network_has_is_kept(tmp_path):
    path = tmp_path / "wrapped.py"
    path.write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n    def __init__(self, classes):\n        super().__init__()\n"
        "        self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes))\n\n"
        "    def forward(self, images):\n        return self.model(images)\n\n\nbuild = Net\n"
    )
    spec = loading.NetworkSpec(str(path), 4, (3, 2, 2), {})
    state = spec.build().state_dict()
    for prefix in ("", "module.", "model.", "net."):
        tensors = {prefix + key: state[key] for key in state}
        assert equal(loading.load_network(spec, tensors, "w.pt")[0].state_dict(), state)


def test_many_keys_are_reported_quickly():
    tensors = {**on_meta("resnet20").state_dict(), **{f"extra{i}": torch.zeros(1) for i in range(20_000)}}
    start = time.process_time()
    assert misfit("resnet20", tensors).startswith("w.pt does not fit resnet20: 20000 keys not in the network (extra0, ")
    assert time.process_time() - start < 1
