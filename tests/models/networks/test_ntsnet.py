"""NTS-Net compared with slow, plain references; its losses; sizes and keys of the published checkpoint."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from plain_regions import resized, suppressed
from tspipe.errors import NetworkError
from tspipe.models import loading, networks, weights
from tspipe.models.feature_net import split
from tspipe.models.inference import fold_batch_norms, freeze
from tspipe.models.networks import ntsnet
from tspipe.models.networks.ntsnet import build, complete, ranking_loss
from tspipe.models.probe import probe_images

SHAPE = (3, 64, 64)
WIDTH = 2


def small(num_classes=7, input_shape=SHAPE, **options):
    """Return a narrow network in eval mode whose batch norms are not trivial and whose proposals vary by image."""
    network = build(num_classes, input_shape, width=WIDTH, **options).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.2, 0.2)
            layer.running_var.uniform_(0.5, 1.5)
    return network


def published(num_classes=200):
    with torch.device("meta"):
        return build(num_classes)


# --- The network


@pytest.mark.parametrize("side", [16, 28, 33, 64, 100, 129, 448])
def test_each_anchor_has_a_score(side):
    with torch.device("meta"):
        network = build(2, (3, side, side), width=WIDTH)
        maps = network.pretrained_model(torch.empty(2, 3, side, side))[1]
        assert network.proposal_net(maps).shape == (2, len(network.proposals.anchors))


def test_scores_are_in_the_order_of_the_anchors():
    network = small(input_shape=(3, 192, 192))
    maps = torch.randn(2, 32 * WIDTH, 6, 6)
    net = network.proposal_net
    first = F.relu(net.down1(maps))
    second = F.relu(net.down2(first))
    third = F.relu(net.down3(second))
    expected = []
    for level in (net.tidy1(first), net.tidy2(second), net.tidy3(third)):
        assert level.shape[2] == level.shape[3]
        for kind, y, x in itertools.product(*(range(count) for count in level.shape[1:])):
            expected.append(level[:, kind, y, x])
    scores = net(maps)
    assert torch.equal(scores, torch.stack(expected, dim=1))
    torch.testing.assert_close(net(maps.to(memory_format=torch.channels_last)), scores, rtol=1e-4, atol=1e-5)


def plain_outputs(network, images, parts):
    """Compute `NTSNet.outputs` image by image and crop by crop."""
    side, rows = network.proposals.side, []
    for image in images:
        raw, maps, image_features = network.pretrained_model(image[None])
        scores = network.proposal_net(maps)[0]
        selected = suppressed(scores.tolist(), network.proposals.anchors.tolist(), parts)
        padded = F.pad(image, [side // 2] * 4)
        crops = [resized(padded, network.proposals.anchors[i].tolist(), side // 2) for i in selected]
        part_features = torch.cat([network.pretrained_model(crop[None])[2] for crop in crops])
        features = torch.cat([*part_features[: network.concatenated], image_features[0]])
        part_logits = network.partcls_net(part_features)
        rows.append([raw[0], network.concat_net(features), part_logits, scores[selected], selected, features])
    raw, concat, part, scores, indices, features = zip(*rows, strict=True)
    return [*map(torch.stack, (raw, concat, part, scores)), torch.tensor(indices), torch.stack(features)]


@pytest.mark.parametrize("input_shape", [(3, 192, 192), (1, 33, 33), (3, 16, 16)], ids=str)
@torch.no_grad()
def test_outputs_equal_a_plain_reference(input_shape):
    network, images = small(input_shape=input_shape), torch.rand(3, *input_shape)
    outputs, reference = network.outputs(images), plain_outputs(network, images, 6)
    for name, actual, expected in zip(outputs._fields, outputs, reference, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(network(images), outputs.concat_logits, rtol=1e-4, atol=1e-5)
    assert [part.shape for part in outputs] == [(3, 7), (3, 7), (3, 6, 7), (3, 6), (3, 6), (3, 5 * 32 * WIDTH)]
    assert len({tuple(row) for row in outputs.indices.tolist()}) > 1 or input_shape[1] == 16


@torch.no_grad()
def test_the_published_size_on_narrow_maps():
    network, images = build(200, width=4).eval(), torch.rand(2, 3, 448, 448)
    outputs = network.outputs(images)
    assert outputs.features.shape == (2, 5 * 32 * 4) and outputs.indices.max() < 1614
    torch.testing.assert_close(outputs.features, plain_outputs(network, images, 6)[5], rtol=1e-4, atol=1e-5)


def test_eval_mode_is_deterministic():
    network, images = small(), torch.rand(2, *SHAPE)
    with torch.no_grad():
        first = network(images)
        assert torch.equal(network(images), first)
    with torch.inference_mode():
        assert torch.equal(network(images), first)
        channels_last = copy.deepcopy(network).to(memory_format=torch.channels_last)
        logits = channels_last(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, first, rtol=1e-4, atol=1e-5)


def test_options():
    network = small(parts=3, concatenated=2)
    assert network.outputs(torch.rand(2, *SHAPE)).part_logits.shape == (2, 3, 7)
    assert network.concat_net.in_features == 3 * 32 * WIDTH


# --- Dropout


@pytest.mark.parametrize(("training", "always"), [(False, False), (False, True), (True, False), (True, True)])
def test_dropout(training, always):
    network, images = small(always_dropout=always).train(training), torch.rand(8, *SHAPE)
    network.pretrained_model.layer4.append(nn.Softplus())  # so that only dropout makes zeros
    first, second = (network.outputs(images).features for _ in range(2))
    assert (first == 0).float().mean().item() == pytest.approx(0.5 if training or always else 0, abs=0.05)
    assert torch.equal(first == 0, second == 0) is not (training or always)


def test_dropout_uses_torchs_generator_and_doubles_the_other_features():
    network, images = small(always_dropout=True), torch.rand(2, *SHAPE)

    def pooled_features():
        torch.manual_seed(5)
        return network.pretrained_model(images)[2]

    features = pooled_features()
    assert torch.equal(pooled_features(), features)
    network.pretrained_model.always_dropout = False
    kept = features != 0
    torch.testing.assert_close(features[kept], 2 * network.pretrained_model(images)[2][kept])


# --- Losses


def test_ranking_loss_equals_a_double_loop():
    scores, losses = torch.randn(5, 6), torch.rand(5, 6)
    losses[0, 1] = losses[0, 4]  # no pair
    expected = 0.0
    for image in range(5):
        for i, j in itertools.product(range(6), repeat=2):
            if losses[image, j] > losses[image, i]:
                expected += max(0.0, 1 - scores[image, i].item() + scores[image, j].item())
    assert ranking_loss(scores, losses).item() == pytest.approx(expected / 5, rel=1e-5)


def test_losses():
    network, images, labels = small(), torch.rand(3, *SHAPE), torch.tensor([0, 6, 2])
    with torch.no_grad():
        outputs, losses = network.outputs(images), network.losses(images, labels)
    part_losses = torch.tensor(
        [[-part.log_softmax(0)[y] for part in row] for row, y in zip(outputs.part_logits, labels, strict=True)]
    )
    expected = {
        "raw": -outputs.raw_logits.log_softmax(1)[range(3), labels].mean(),
        "concat": -outputs.concat_logits.log_softmax(1)[range(3), labels].mean(),
        "parts": part_losses.mean(),
        "ranking": ranking_loss(outputs.scores, part_losses),
    }
    assert losses.keys() == expected.keys()
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("name", ["raw", "concat", "parts", "ranking"])
def test_what_each_loss_trains(name):
    network = small().train()
    network.losses(torch.rand(3, *SHAPE), torch.tensor([0, 6, 2]))[name].backward()
    trained = {key.split(".")[0] for key, weight in network.named_parameters() if weight.grad is not None}
    if network.pretrained_model.fc.weight.grad is None:
        trained.add("all but fc")
    assert (
        trained
        == {
            "raw": {"pretrained_model"},
            "concat": {"pretrained_model", "concat_net", "all but fc"},
            "parts": {"pretrained_model", "partcls_net", "all but fc"},
            "ranking": {"proposal_net", "all but fc"},
        }[name]
    )


def loss_before_and_after(network, optimizer, names, steps):
    """Minimise the sum of some losses; return its means over the first and the last five steps."""
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    images[labels == 1, :, :16] = 0
    totals = []
    for _ in range(steps):
        losses = network.losses(images, labels)
        loss = sum(losses[name] for name in names)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    return sum(totals[:5]) / 5, sum(totals[-5:]) / 5


def test_the_network_learns():
    torch.manual_seed(0)
    network = small(num_classes=2, input_shape=(3, 32, 32)).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.003, momentum=0.9)
    before, after = loss_before_and_after(network, optimizer, ["raw", "concat", "parts"], steps=40)
    assert after < 0.6 * before


def test_the_proposals_learn():
    """With a fixed backbone, the proposal net learns which parts are better."""
    network = small(num_classes=2, input_shape=(3, 32, 32))
    optimizer = torch.optim.Adam(network.proposal_net.parameters(), lr=0.03)
    before, after = loss_before_and_after(network, optimizer, ["ranking"], steps=30)
    assert after < 0.7 * before


# --- Splitting, folding, loading


@torch.no_grad()
def test_split():
    network, images = small(), torch.rand(3, *SHAPE)
    expected = network.outputs(images)
    feature_net = split(network, "ntsnet", probe_images(SHAPE))
    assert feature_net.width == 5 * 32 * WIDTH
    features, logits = feature_net(images)
    torch.testing.assert_close(features, expected.features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, expected.concat_logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_backbones_batch_norms_can_be_folded():
    network, images = small(), torch.rand(3, *SHAPE)
    expected = network(images)
    torch.testing.assert_close(fold_batch_norms(network)(images), expected, rtol=1e-4, atol=1e-5)
    network.pretrained_model = fold_batch_norms(network.pretrained_model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in network.pretrained_model.modules())
    torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-4)


def test_a_frozen_teacher_has_no_batch_norms():
    network, images = small(), torch.rand(3, *SHAPE)
    with torch.no_grad():
        expected = network(images)
        teacher = freeze(network, "ntsnet", SHAPE, torch.device("cpu"))
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in teacher.modules())
        torch.testing.assert_close(teacher(images).logits, expected, rtol=1e-3, atol=1e-4)


def test_training_starts_from_torchvisions_weights():
    assert torchvision.models.get_weight(ntsnet.PRETRAINED).url.endswith("/resnet50-0676ba61.pth")


def test_sizes_of_the_published_checkpoint():
    network = published()
    assert sum(parameter.numel() for parameter in network.parameters()) == 29_033_133
    assert len(network.state_dict()) == 336
    assert network.concat_net.in_features == 10_240
    assert network.proposals.anchors.shape == (1614, 4)


def test_keys_of_the_published_checkpoint():
    with torch.device("meta"):
        resnet = torchvision.models.resnet50(weights=None, num_classes=200).state_dict()
    expected = {f"pretrained_model.{key}": tuple(value.shape) for key, value in resnet.items()}
    layers = {
        "proposal_net.down1": (128, 2048, 3, 3),
        "proposal_net.down2": (128, 128, 3, 3),
        "proposal_net.down3": (128, 128, 3, 3),
        "proposal_net.tidy1": (6, 128, 1, 1),
        "proposal_net.tidy2": (6, 128, 1, 1),
        "proposal_net.tidy3": (9, 128, 1, 1),
        "concat_net": (200, 10_240),
        "partcls_net": (200, 2048),
    }
    for name, shape in layers.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {key: tuple(value.shape) for key, value in published().state_dict().items()} == expected


@torch.no_grad()
def test_the_backbone_is_torchvisions_resnet50():
    reference = torchvision.models.resnet50(weights=None, num_classes=5).eval()
    network = build(5, SHAPE).eval()
    network.pretrained_model.load_state_dict(reference.state_dict())
    images = torch.rand(2, *SHAPE)
    torch.testing.assert_close(network.pretrained_model(images)[0], reference(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [None, "net_state_dict"])
def test_published_files_load_unchanged(tmp_path, wrap):
    network, again = small(), build(7, SHAPE, width=WIDTH)
    state = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "nts.ckpt")
    tensors, options = networks.adapt("ntsnet", weights.read(tmp_path / "nts.ckpt").tensors)
    loading.load_into(again, tensors, "ntsnet", "nts.ckpt")
    assert options == {} and weights.canonical_bytes(again) == weights.canonical_bytes(network)


def test_training_can_start_from_imagenet_weights():
    imagenet = torchvision.models.resnet50(weights=None).state_dict()
    with torch.device("meta"):
        initial = build(200).state_dict()
    tensors, options = networks.adapt("ntsnet", imagenet)
    completed = complete(tensors, initial)
    assert options == {} and completed.keys() == initial.keys()
    for key, value in initial.items():
        name = key.removeprefix("pretrained_model.")
        new = name in ("fc.weight", "fc.bias") or name == key
        assert completed[key] is (value if new else imagenet[name])


def test_training_can_start_from_weights_for_other_classes():
    initial, start = small(7).state_dict(), small(9).state_dict()
    completed = complete(networks.adapt("ntsnet", start)[0], initial)
    new = {key for key in initial if completed[key] is initial[key]}
    heads = ("pretrained_model.fc", "concat_net", "partcls_net")
    assert new == {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    assert complete(initial, small(7).state_dict()) == initial


def test_other_missing_keys_are_not_completed():
    initial = small().state_dict()
    state = {key: value for key, value in initial.items() if key != "proposal_net.tidy3.bias"}
    assert complete(state, initial).keys() == state.keys()


# --- Refusals


@pytest.mark.parametrize("input_shape", [(3, 600, 448), (3, 15, 15)], ids=str)
def test_other_shapes_are_refused(input_shape):
    with pytest.raises(NetworkError) as error:
        networks.build("ntsnet", 2, input_shape)
    assert str(error.value) == (
        f"ntsnet takes square images of 16×16 pixels or more, these have {input_shape[1]}×{input_shape[2]}. "
        "Resize and crop them: --set preprocess.resize=[600,600] --set preprocess.crop=448"
    )


@pytest.mark.parametrize(("concatenated", "parts"), [(4, 3), (0, 3), (4, 22)])
def test_wrong_numbers_of_parts_are_refused(concatenated, parts):
    with pytest.raises(NetworkError, match=f"cannot concatenate {concatenated} of {parts} parts: there are 21 anchors"):
        networks.build("ntsnet", 2, (3, 16, 16), {"width": 1, "parts": parts, "concatenated": concatenated})


def test_images_of_another_size_than_at_build_are_refused():
    with pytest.raises(NetworkError, match=r"ntsnet does not take images of \(3, 96, 96\)"):
        split(small(), "ntsnet", probe_images((3, 96, 96)))
