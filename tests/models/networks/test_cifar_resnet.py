"""ResNets for CIFAR: sizes, published keys, and option A compared with a plain reference."""

import pytest
import torch
import torch.nn.functional as F

from tspipe.models import loading, networks, weights

COUNTS = {  # 10 classes: option A, option B
    20: (269_722, 272_474),
    32: (464_154, 466_906),
    44: (658_586, 661_338),
    56: (853_018, 855_770),
    110: (1_727_962, 1_730_714),
}


def build(layers=20, num_classes=10, input_shape=(3, 32, 32), **options):
    return networks.build(f"resnet{layers}", num_classes, input_shape, options)


def published(state, **renamed):
    """Return a state dict under other names and without batch norm's counters, as in older checkpoints."""

    def published_key(key):
        for name, published_name in renamed.items():
            key = key.replace(f"{name}.", f"{published_name}.")
        return key

    return {published_key(key): value for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("layers", COUNTS)
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_parameter_count(layers, shortcut):
    with torch.device("meta"):
        network = build(layers, shortcut=shortcut)
    assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS[layers]["AB".index(shortcut)]


def test_option_a_is_the_default():
    assert build().state_dict().keys() == build(shortcut="A").state_dict().keys()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", [None, "state_dict"])
@pytest.mark.parametrize("renamed", [{}, {"fc": "linear", "downsample": "shortcut"}], ids=["tspipe", "published"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_adapt_renames_published_keys(tmp_path, prefix, wrap, renamed, shortcut):
    network = build(shortcut=shortcut)
    state = {prefix + key: value for key, value in published(network.state_dict(), **renamed).items()}
    torch.save({wrap: state, "best_prec1": 93.6} if wrap else state, tmp_path / "resnet20.th")
    spec = loading.NetworkSpec("resnet20", 10, (3, 32, 32), {})
    tensors, options = loading.adapt(spec, weights.read(tmp_path / "resnet20.th").tensors)
    assert options == {"shortcut": shortcut}
    again = build(**options)
    loading.load_into(again, tensors, "resnet20", "resnet20.th")
    assert weights.canonical_bytes(again) == weights.canonical_bytes(network)
    assert networks.adapt("resnet20", tensors) == (tensors, options)


def reference(state, images):
    """Compute ResNet-20 with option A in eval mode, section 4.2, with functions only."""

    def conv_bn(x, conv, bn, stride=1):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, var, scale, shift = (
            state[f"{bn}.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = conv_bn(images, "conv1", "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(3):
            path = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = conv_bn(x, f"{path}.conv1", f"{path}.bn1", stride).relu()
            out = conv_bn(out, f"{path}.conv2", f"{path}.bn2")
            if stride == 2:
                x = x[:, :, ::2, ::2]
                zeros = torch.zeros(len(x), x.shape[1] // 2, *x.shape[2:])
                x = torch.cat([zeros, x, zeros], 1)
            x = (out + x).relu()
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("input_shape", [(3, 8, 8), (1, 13, 10)], ids=str)
def test_option_a_equals_a_plain_reference(input_shape):
    torch.manual_seed(0)
    network = build(input_shape=input_shape)
    state = network.state_dict()
    for key, value in state.items():
        if "bn" in key and value.is_floating_point():
            value.uniform_(0.5, 1.5)
    images = torch.randn(4, *input_shape)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), reference(state, images), rtol=1e-4, atol=1e-4)


def test_option_b_projects_only_where_the_number_of_maps_doubles():
    network = build(shortcut="B")
    projections = {key.rpartition(".downsample")[0] for key in network.state_dict() if "downsample" in key}
    assert projections == {"layer2.0", "layer3.0"}
    assert network.eval()(torch.zeros(1, 3, 9, 9)).shape == (1, 10)


def test_initial_weights_are_he_normal():
    torch.manual_seed(0)
    network = build()
    for conv in (network.layer1[0].conv1, network.layer3[2].conv2):
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
    assert not network.fc.bias.any()
