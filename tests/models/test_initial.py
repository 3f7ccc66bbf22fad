"""The weights that a student starts from: what is loaded, what is refused, and what is said."""

import io
from pathlib import Path

import pytest
import torch
from torch import nn

from shared import equal, error_message
from tspipe.data.preprocess import Preprocess
from tspipe.errors import NetworkError
from tspipe.models import initial, networks, weights
from tspipe.models.feature_net import FeatureNet, student_of
from tspipe.models.initial import InitialWeights
from tspipe.models.loading import NetworkSpec
from tspipe.models.probe import probe_images
from tspipe.models.weights import Weights

SHAPE = (3, 32, 32)


def spec(name: str, classes: int = 10) -> NetworkSpec:
    return NetworkSpec(name, classes, SHAPE, {})


def student_from(name: str, start: InitialWeights) -> FeatureNet:
    module = spec(name)._replace(options=start.options).build()
    keys = set(module.state_dict())
    student = student_of(module, name, 16, 10, probe_images(SHAPE))
    initial.load_backbone(student.get_submodule("backbone.0"), keys, start, name)
    return student


def find(path: Path, name: str) -> InitialWeights:
    start = initial.find(str(path), spec(name), download=False)
    assert start is not None
    return start


def save(path: Path, module: nn.Module) -> Path:
    torch.save({"state_dict": {f"module.{key}": value for key, value in module.state_dict().items()}}, path)
    return path


def test_all_but_the_last_layers_come_from_the_file(tmp_path: Path) -> None:
    """The file's network has other classes; of LeNet-5, g(x) replaces a hidden layer as well."""
    source = spec("lenet5", classes=7).build()
    start = find(save(tmp_path / "other.pth", source), "lenet5")
    state = student_from("lenet5", start).get_submodule("backbone.0").state_dict()
    assert equal(state, {key: source.state_dict()[key] for key in state})
    assert len(state) == len(source.state_dict()) - 4
    assert (start.name, len(start.sha256), start.preprocess) == ("other.pth", 64, None)


def test_options_that_the_weights_imply(tmp_path: Path) -> None:
    module = networks.build("resnet20", 5, SHAPE, {"shortcut": "A"})
    start = find(save(tmp_path / "option_a.pth", module), "resnet20")
    assert start.options == {"shortcut": "A"}
    state = student_from("resnet20", start).get_submodule("backbone.0").state_dict()
    assert equal(state, {key: value for key, value in module.state_dict().items() if not key.startswith("fc.")})


def test_a_student_starts_from_another_student(tmp_path: Path) -> None:
    first = student_of(spec("lenet5", 4).build(), "lenet5", 9, 4, probe_images(SHAPE))
    weights.save(tmp_path / "student.safetensors", first, {"network": "lenet5", "width": "9"})
    second = student_from("lenet5", find(tmp_path / "student.safetensors", "lenet5"))
    one, two = (student.get_submodule("backbone.0").state_dict() for student in (first, second))
    assert equal(one, two)


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    """Those of ResNet-32 have all keys of ResNet-20, and more."""
    start = find(save(tmp_path / "resnet32.pth", spec("resnet32").build()), "resnet32")
    message = error_message(student_from, "resnet20", start)
    assert message.startswith("resnet20 cannot start from resnet32.pth: 72 keys not in the network (layer1.3.conv1")
    assert message.endswith("Name weights of the same architecture, or start from random ones: --init random")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    broken = spec("lenet5").build()
    next(iter(broken.parameters())).data[0] = float("nan")
    path = save(tmp_path / "broken.pth", broken)
    assert "weight has numbers that are not finite. Start from" in error_message(lambda: find(path, "lenet5"))


def test_weights_that_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(init: str, name: str = "lenet5") -> str:
        return error_message(lambda: initial.find(init, spec(name), download=False))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert message("imagenet").startswith("No ImageNet weights are published for lenet5. Start from a file's")
    absent = message("imagenet", "torchvision:mobilenet_v3_small")
    assert "MobileNet_V3_Small_Weights.IMAGENET1K_V1, and " in absent
    assert absent.endswith("--download. Or start from a file's (--init FILE), or from random ones: --init random")
    assert message("w.pth") == ("There is no file w.pth to start from. Name one, a URL, imagenet, auto or random.")
    assert message("https://me:secret@host/w.pth?token=1") == (
        "https://host/w.pth is not on this machine. Fetch it: --download"
    )
    assert message("s3://bucket/w.pth").startswith("s3://bucket/w.pth is not an address of a web server.")
    state = spec("lenet5").build().state_dict()
    torch.save({"first": state, "second": dict(state)}, tmp_path / "two.pth")
    assert message(str(tmp_path / "two.pth")).endswith("Save those to start from in a file of their own: torch.save(…)")


def test_random_weights_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert initial.find("random", spec("lenet5"), download=False) is None
    assert initial.find("auto", spec("lenet5"), download=False) is None
    assert initial.find("auto", spec("mobilenet_v2"), download=False) is None


def test_a_url_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, module = io.BytesIO(), spec("lenet5").build()
    torch.save(module.state_dict(), content)
    fetched: list[str] = []

    def fetch(url: str, path: str) -> None:
        fetched.append(url)
        Path(path).write_bytes(content.getvalue() if len(fetched) > 1 else b"<html>")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    url = "https://host/a/model.pth?token=1"
    assert "is damaged" in error_message(lambda: initial.find(url, spec("lenet5"), download=True))
    for download in (True, True, False):
        start = initial.find(url, spec("lenet5"), download=download)
        assert start is not None
        assert start.name == "model.pth"
    assert fetched == [url, url]


def test_a_sound_download_with_several_sets_of_weights_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = spec("lenet5").build().state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "torch.hub.download_url_to_file", lambda _, path: torch.save({"first": state, "second": dict(state)}, path)
    )
    for download in (True, False):
        with pytest.raises(NetworkError, match="Save those to start from in a file of their own"):
            initial.find("https://host/two.pth", spec("lenet5"), download=download)


def test_published_weights_come_with_their_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    published = Weights({}, {"preprocess": '{"mean": [0.485], "std": [0.229], "crop": 224}'}, "ab" * 32, "/hub/w.pth")
    monkeypatch.setattr(weights, "pretrained", lambda *_, **__: published)
    start = initial.find("imagenet", spec("mobilenet_v2"), download=False)
    assert start is not None
    assert start.name == "MobileNet_V2_Weights.IMAGENET1K_V2"
    assert initial.preprocess_difference(start, Preprocess((0.485,), (0.23,)), 224) == ""
    assert initial.preprocess_difference(start, Preprocess((0.5,), (0.229,)), 32) == (
        "mean 0.485, the cache's is 0.5; images of 224 pixels a side, the cache's have 32"
    )


def test_networks_name_weights_that_torchvision_has() -> None:
    from torchvision.models import get_weight

    for name in ("resnet18", "resnet50", "mobilenet_v2", "torchvision:mobilenet_v3_small"):
        published = networks.imagenet(name)
        assert published is not None
        assert len(get_weight(published).meta["categories"]) == 1000
