"""The contract of every network; finding, building and refusing networks by name."""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from tspipe.errors import NetworkError
from tspipe.models import networks

SMALL = (3, 16, 16)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(name, num_classes=10, input_shape=(3, 32, 32), **options):
    with torch.device("meta"):
        return networks.build(name, num_classes, input_shape, options)


def error_message(*arguments):
    with pytest.raises(NetworkError) as error:
        networks.build(*arguments)
    return str(error.value)


def user_file(folder, text):
    path = folder / "mine.py"
    path.write_text("from torch import nn\n\n\n" + text)
    return str(path)


@pytest.mark.parametrize("input_shape", [SMALL, (1, 28, 28)], ids=str)
@pytest.mark.parametrize("name", networks.names())
def test_contract(name, input_shape):
    network = networks.build(name, 7, input_shape)
    outputs = []
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _layer, _input, output: outputs.append(output))
    images = torch.randn(2, *input_shape)
    logits = network(images)
    assert logits.shape == (2, 7) and logits.dtype == torch.float32
    assert outputs[-1] is logits, "something runs after the last Linear"
    labels = torch.tensor([0, 6])
    if hasattr(network, "losses"):  # only one of several outputs is the logits
        loss = sum(network.losses(images, labels).values())
    else:
        loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("name", networks.names())
def test_initial_weights_come_from_torchs_generator(name):
    def initial_weights():
        torch.manual_seed(3)
        return networks.build(name, 3, SMALL).state_dict()

    first, second = initial_weights(), initial_weights()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lenet5", 62_006),
        ("alexnet", 23_272_266),
        ("mobilenet_v2", 2_236_682),
        ("resnet18", 11_173_962),
        ("resnet50", 23_520_842),
    ],
)
def test_parameter_count(name, parameters):
    assert count(on_meta(name)) == parameters


@pytest.mark.parametrize("name", ["lenet5", "alexnet"])
def test_the_classifier_is_a_sequential_that_ends_in_the_last_linear(name):
    classifier = on_meta(name).classifier
    assert isinstance(classifier, nn.Sequential)
    assert isinstance(classifier[-1], nn.Linear)


@pytest.mark.parametrize(("name", "smallest"), [("lenet5", 16), ("alexnet", 15)])
@pytest.mark.parametrize("square", [True, False])
def test_smallest_images(name, smallest, square):
    input_shape = (1, smallest, smallest if square else 40)
    assert networks.build(name, 2, input_shape).eval()(torch.zeros(1, *input_shape)).shape == (1, 2)
    assert error_message(name, 2, (1, 40, smallest - 1)) == (
        f"{name} takes images of {smallest}×{smallest} pixels or more, these have 40×{smallest - 1}. Enlarge them: "
        "--set preprocess.resize=[32,32]"
    )


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    ("side", "stem", "cifar"),
    [(64, "auto", True), (65, "auto", False), (224, "cifar", True), (32, "imagenet", False)],
)
def test_resnet_stem(name, side, stem, cifar):
    network = on_meta(name, input_shape=(2, side, side), stem=stem)
    conv = network.conv1
    expected = (2, (3, 3), (1, 1), (1, 1)) if cifar else (2, (7, 7), (2, 2), (3, 3))
    assert (conv.in_channels, conv.kernel_size, conv.stride, conv.padding) == expected
    assert conv.bias is None
    assert isinstance(network.maxpool, nn.Identity if cifar else nn.MaxPool2d)


@pytest.mark.parametrize(
    ("side", "stem", "last_map"), [(32, "auto", 4), (32, "imagenet", 1), (96, "auto", 3), (96, "cifar", 12)]
)
def test_mobilenet_stem(side, stem, last_map):
    network = on_meta("mobilenet_v2", input_shape=(1, side, side), stem=stem)
    features = network.eval().features(torch.empty(1, 1, side, side, device="meta"))
    assert features.shape == (1, 1280, last_map, last_map)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_torchvisions_checkpoints_load_and_compute_the_same(name):
    reference = torchvision.models.get_model(name, weights=None, num_classes=5).eval()
    state, options = networks.adapt(name, reference.state_dict())
    network = networks.build(name, 5, (3, 96, 96), options).eval()
    network.load_state_dict(state)
    images = torch.randn(1, 3, 96, 96)
    assert torch.equal(network(images), reference(images))


def test_adapt_returns_the_stem_of_the_weights():
    imagenet = on_meta("resnet18", input_shape=(3, 224, 224)).state_dict()
    cifar = on_meta("resnet18").state_dict()
    assert networks.adapt("resnet18", imagenet) == (imagenet, {"stem": "imagenet"})
    assert networks.adapt("resnet18", cifar) == (cifar, {"stem": "cifar"})
    assert networks.adapt("resnet18", {}) == ({}, {})


def test_adapt_renames_the_cifar_keys_of_resnet18():
    state = on_meta("resnet18").state_dict()
    published = {key.replace("fc.", "linear.").replace("downsample", "shortcut"): state[key] for key in state}
    assert published.keys() != state.keys()
    assert networks.adapt("resnet18", published) == (state, {"stem": "cifar"})


@pytest.mark.parametrize("name", ["lenet5", "torchvision:resnet18"])
def test_networks_without_adapt_leave_a_checkpoint_unchanged(name):
    state = {"linear.weight": torch.zeros(1)}
    assert networks.adapt(name, state) == (state, {})


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:squeezenet1_0"])
def test_torchvision_networks(name):
    network = networks.build(name, 4, (3, 64, 64)).eval()
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


def test_torchvision_options():
    assert isinstance(networks.build("torchvision:mobilenet_v2", 4, (3, 64, 64), {"dropout": 0.5}), nn.Module)
    assert error_message("torchvision:resnet18", 4, (3, 64, 64), {"groups": 0}) == (
        "torchvision:resnet18 cannot be built with groups=0: BasicBlock only supports groups=1 and base_width=64."
    )
    assert error_message("torchvision:resnet18", 4, (3, 64, 64), {"widthh": 2}) == (
        "torchvision:resnet18 cannot be built with widthh=2: "
        "ResNet.__init__() got an unexpected keyword argument 'widthh'."
    )


@pytest.mark.parametrize("option", ["weights", "pretrained"])
def test_torchvision_never_downloads(option, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_: pytest.fail("a download was attempted"))
    start = f"torchvision:resnet18 cannot be built with {option}='DEFAULT': "
    assert error_message("torchvision:resnet18", 4, (3, 64, 64), {option: "DEFAULT"}).startswith(start)


def test_torchvision_unknown_name():
    more = len(torchvision.models.list_models(module=torchvision.models)) - 5
    assert error_message("torchvision:resnet19", 4, (3, 64, 64)) == (
        "Unknown torchvision network 'resnet19'. There are: resnet18, resnet152, resnet101, resnet34, resnet50, "
        f"and {more} more."
    )


def test_torchvision_other_channels():
    assert error_message("torchvision:resnet18", 4, (1, 64, 64)) == (
        "torchvision:resnet18 takes images of 3 channels, these have 1. A mean and a std of three values repeat a grey "
        "channel (--set preprocess.mean=[0.5,0.5,0.5] --set preprocess.std=[0.5,0.5,0.5] in stage one). tspipe's own "
        "networks take any number: "
        f"{', '.join(networks.names())}."
    )


def test_names_are_the_files_and_their_variants():
    folder = Path(networks.__file__).parent
    modules = [importlib.import_module(f"{networks.__name__}.{file.stem}") for file in folder.glob("[a-z]*.py")]
    provided = [getattr(module, "VARIANTS", [module.__name__.rpartition(".")[2]]) for module in modules]
    assert networks.names() == sorted(itertools.chain.from_iterable(provided))


def test_a_new_file_in_the_folder_is_a_network(tmp_path, monkeypatch):
    """Files are listed without being imported, so that a broken one does no harm until it is used."""
    monkeypatch.setattr(networks.__spec__, "submodule_search_locations", [*networks.__path__, str(tmp_path)])
    monkeypatch.setattr(networks, "__path__", networks.__spec__.submodule_search_locations)
    (tmp_path / "mine.py").write_text("def build(num_classes): ...\nraise SystemExit('imported')\n")
    (tmp_path / "broken.py").write_text("def build(\n")
    (tmp_path / "family.py").write_text(
        "from torch import nn\n\nVARIANTS = {'family2': {'depth': 2}, 'family3': {'depth': 3}}\n\n\n"
        "def build(num_classes, *, depth, bias=True):\n"
        "    return nn.Sequential(nn.Flatten(), *[nn.Linear(768, 768)] * depth, nn.Linear(768, num_classes, bias))\n"
    )
    assert set(networks.names()) >= {"mine", "broken", "family2", "family3"}
    assert "family" not in networks.names()
    assert len(networks.build("family3", 4, SMALL, {"bias": False})) == 5
    assert error_message("family3", 4, SMALL, {"depth": 1}) == "family3 has no option 'depth'. There are: bias."


def test_listing_names_does_not_import_torch():
    program = (
        "import sys; from tspipe.utils import plugins\n"
        "print(*plugins.names('models.networks')); print('torch' in sys.modules)"
    )
    listed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == [" ".join(networks.names()), "False"]


def test_unknown_name():
    others = [name for name in networks.names() if name != "mobilenet_v2"]
    assert error_message("mobile_v2", 4, SMALL) == (
        f"Unknown network 'mobile_v2'. There are: {', '.join(['mobilenet_v2', *others])}."
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {"shortcutt": "A"}, "resnet20 has no option 'shortcutt'. There are: shortcut."),
        ("resnet18", {"a": 1, "b": 2, "stem": "auto"}, "resnet18 has no option 'a', 'b'. There are: stem."),
        ("resnet18", {"input_shape": (1, 1, 1)}, "resnet18 has no option 'input_shape'. There are: stem."),
        ("lenet5", {"num_classes": 3}, "lenet5 has no option 'num_classes'. It has none."),
        ("resnet20", {"shortcut": "C"}, "shortcut cannot be 'C'. There are: A, B."),
        ("mobilenet_v2", {"stem": 3}, "stem cannot be 3. There are: auto, cifar, imagenet."),
    ],
)
def test_wrong_options(name, options, message):
    assert error_message(name, 4, SMALL, options) == message


def test_a_users_file_that_takes_only_the_number_of_classes(tmp_path):
    path = user_file(
        tmp_path, "def build(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    assert networks.build(path, 4, SMALL)[1].out_features == 4
    assert networks.recorded_name(path) == "mine"
    assert error_message(path, 4, SMALL, {"depth": 2}) == f"{path} has no option 'depth'. It has none."


@pytest.mark.parametrize("parameters", ["classes, input_shape, *, depth=1", "classes, depth=1, **rest"])
def test_a_users_file_with_input_shape_and_options(tmp_path, parameters):
    shape = "rest['input_shape']" if "rest" in parameters else "input_shape"
    path = user_file(
        tmp_path,
        f"def build({parameters}):\n    convs = [nn.Conv2d({shape}[0], {shape}[0], 1)] * depth\n"
        "    return nn.Sequential(*convs, nn.Flatten(), nn.LazyLinear(classes))\n",
    )
    network = networks.build(path, 4, SMALL, {"depth": 2})
    assert len(network) == 4 and network[0].in_channels == 3


def test_a_users_file_with_adapt(tmp_path):
    path = user_file(
        tmp_path,
        "def build(num_classes):\n    return nn.Identity()\n\n\n"
        "def adapt(state):\n    return {k.upper(): v for k, v in state.items()}, {'depth': 2}\n",
    )
    assert networks.adapt(path, {"a": 1}) == ({"A": 1}, {"depth": 2})


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("def make(c): ...\n", {}, "{} defines no 'build'; the files in tspipe/models/networks/ are examples."),
        ("def build(c):\n    return [1]\n", {}, "{}: build returns a list, not an nn.Module."),
        (
            "def build(c, depth): ...\n",
            {},
            "{} cannot be built: missing a required argument: 'depth'. Set it in "
            "[teacher.options] or [students.NAME.options] of the recipe.",
        ),
        (
            "def build(c, depth):\n    return nn.Dropout(depth)\n",
            {"depth": -1},
            "{} cannot be built with depth=-1: dropout probability has to be between 0 and 1, but got -1.",
        ),
    ],
)
def test_a_users_file_that_cannot_be_used(tmp_path, text, options, message):
    path = user_file(tmp_path, text)
    assert error_message(path, 4, SMALL, options) == message.format(path)


def test_a_type_error_in_a_users_file_is_not_taken_for_a_wrong_option(tmp_path):
    path = user_file(tmp_path, "def build(num_classes):\n    return nn.Linear(num_classes)\n")
    with pytest.raises(TypeError, match="out_features"):
        networks.build(path, 4, SMALL)


def test_a_missing_file(tmp_path):
    assert error_message(f"{tmp_path}/none.py", 4, SMALL) == f"There is no file {tmp_path}/none.py."


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ("images.mean((2, 3))", "(2, 3) float32"),
        ("images", "(2, 3, 16, 16) float32"),
        ("images.new_zeros(1, 4)", "(1, 4) float32"),
        ("images.flatten(1).long()[:, :4]", "(2, 4) int64"),
        ("images.flatten(1)[:, :4] / 0", "numbers that are not finite"),
        ("(images, images)", "a tuple"),
        ("{'logits': images}", "a dict"),
    ],
)
def test_what_a_network_returns_is_checked_when_it_is_built(tmp_path, returned, problem):
    path = user_file(
        tmp_path,
        "class Net(nn.Module):\n    def forward(self, images):\n        return " + returned + "\n\n\n"
        "def build(num_classes):\n    return Net()\n",
    )
    assert error_message(path, 4, SMALL) == (
        f"{path} must return logits of shape (n, 4), floating-point and finite, for n images of (3, 16, 16). "
        f"For 2 images it returns {problem}."
    )


def test_on_the_meta_device_a_network_is_not_run(tmp_path):
    path = user_file(tmp_path, "def build(num_classes):\n    return nn.Flatten()\n")
    with torch.device("meta"):
        assert isinstance(networks.build(path, 4, SMALL), nn.Flatten)


def test_the_check_leaves_no_trace_and_runs_once(tmp_path):
    path = user_file(
        tmp_path,
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.norm, self.fc, self.modes = nn.BatchNorm2d(3), nn.Linear(768, 4), []\n\n"
        "    def forward(self, images):\n        self.modes.append(self.training)\n"
        "        return nn.functional.dropout(self.fc(self.norm(images).flatten(1)), 0.5)\n\n\n"
        "def build(num_classes):\n    return Net()\n",
    )
    torch.manual_seed(5)
    nn.Linear(768, 4)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    network = networks.build(path, 4, SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.modes == [False] and network.training
    assert network.norm.num_batches_tracked == 0


@pytest.mark.parametrize("name", ["resnet56", "torchvision:resnet18"])
def test_stated_name(name):
    assert networks.recorded_name(name) == name
