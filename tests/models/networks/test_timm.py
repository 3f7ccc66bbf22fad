"""timm's classifiers as teachers and students: one network of each family, its preprocessing and its weights."""

import argparse
import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from shared import equal, make_folder
from tspipe.data.datasets import open_dataset
from tspipe.data.image_loader import ImageLoader
from tspipe.errors import CacheMismatch, NetworkError
from tspipe.extraction.extract import ExtractConfig, extract
from tspipe.models import loading, networks, weights
from tspipe.models.feature_net import FeatureNet, student_of
from tspipe.models.inference import freeze
from tspipe.models.probe import probe_images
from tspipe.models.teacher import check_teacher, load_teacher
from tspipe.recipes import load
from tspipe.training import teacher_weights

timm = pytest.importorskip("timm")

# Of each of timm's families, the network with the fewest parameters, and why it is refused, if it is. TSPIPE_TIMM=1
# tests all of them, at the size that timm evaluates them with, in place of the sample.
FAMILIES: dict[str, list[str]] = json.loads(Path(__file__).with_name("timm_families.json").read_text())
ALL = bool(os.environ.get("TSPIPE_TIMM"))
SAMPLE = ["convnext", "efficientnet", "mambaout", "maxxvit", "nfnet", "resnet", "starnet", "vision_transformer"]


def test_the_families_are_timms() -> None:
    assert not ALL or list(FAMILIES) == timm.list_modules()  # that of another version may differ
    assert all(model in timm.list_models(module=family) for family, (model, _) in FAMILIES.items())


@pytest.mark.usefixtures("fast_weights")
@pytest.mark.parametrize("family", FAMILIES if ALL else SAMPLE)
def test_a_network_of_each_family_is_split_and_cached(family: str, tmp_path: Path) -> None:
    model, problem = FAMILIES[family]
    name, config = f"timm:{model}", timm.get_pretrained_cfg(model)
    shape = config.input_size if ALL or config.fixed_input_size else (3, 64, 64)
    folder = make_folder(tmp_path / "photos", 2, 1)
    module = networks.build(name, 2, shape)
    assert loading.NetworkSpec(name, 2, shape, {}).count_parameters() == sum(p.numel() for p in module.parameters())
    settings = f"dataset=folder:{folder}", f"teacher.network={name}", f"preprocess.resize={list(shape[1:])}"
    recipe = load.load("folder", [*settings, "features.dtype=float32", "compute.batch_size=3"])
    state = weights.Weights(module.state_dict(), {}, "0" * 64, "w.pt")
    if problem:
        with pytest.raises(NetworkError, match=f"^{name} {problem}"):
            extract(ExtractConfig(recipe, state, tmp_path / "x.h5"))
        return
    cache = extract(ExtractConfig(recipe, state, tmp_path / "x.h5"))
    images = ImageLoader(open_dataset(recipe.dataset).train, recipe.preprocess, "train", 2**30, torch.device("cpu"))
    with torch.inference_mode():
        expected = module.eval()(recipe.preprocess.normalise(next(images.batches([torch.arange(4)]))))
    torch.testing.assert_close(torch.from_numpy(cache.train.logits[:]), expected, rtol=1e-3, atol=1e-4)
    student = student_of(module, name, cache.dimensions.width, 2, probe_images(shape)).train()
    with torch.no_grad():
        assert [part.shape for part in student(probe_images(shape))] == [(2, cache.dimensions.width), (2, 2)]
    (tmp_path / "x.h5").unlink()


def test_a_cache_names_the_version_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (3, 32, 32)
    state = weights.Weights(networks.build("timm:test_resnet", 2, shape).state_dict(), {}, "0" * 64, "w.pt")
    settings = f"dataset=folder:{make_folder(tmp_path / 'photos', 2, 1)}", "preprocess.resize=[32,32]"
    recipe = load.load("folder", [*settings, "teacher.network=timm:test_resnet"])
    cache = extract(ExtractConfig(recipe, state, tmp_path / "x.h5"))
    assert cache is not None
    assert cache.manifest["teacher"]["library"] == f"timm {timm.__version__}"

    def rebuild() -> FeatureNet:
        return load_teacher(cache, recipe, shape, torch.device("cpu"))

    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.9.1")
    network = rebuild()  # another version is used as long as it computes the same
    images = torch.zeros(2, *shape)
    with pytest.raises(CacheMismatch) as error:
        check_teacher(network, cache, images)
    upgrade = f"The cache was made with timm {timm.__version__}; timm 0.9.1 is installed: pip install timm=="
    assert str(error.value).endswith(f" another. {upgrade}{timm.__version__}")
    monkeypatch.setattr("tspipe.models.networks._timm.build", lambda *_: torch.nn.Linear(1, 1))
    with pytest.raises(NetworkError, match=re.escape(upgrade)):
        rebuild()


@pytest.mark.usefixtures("fast_weights")
@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("dla46x_c", "does not end in a Linear layer, so it has no penultimate features"),  # in a convolution
        ("efficientvim_m1", "computes more than its last Linear"),  # in several heads
    ],
)
def test_a_network_that_does_not_end_in_a_linear_is_refused_by_name(model: str, problem: str) -> None:
    name, shape = f"timm:{model}", (3, 64, 64)
    with pytest.raises(NetworkError, match=f"^{name} {problem}"):
        freeze(networks.build(name, 4, shape), name, shape, torch.device("cpu"))


def test_preprocessing_is_that_of_timms_configuration() -> None:
    bicubic = {"interpolation": "bicubic"}
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    vit, resnet = (networks.preprocess(f"timm:{name}") for name in ("vit_tiny_patch16_224", "resnet18.tv_in1k"))
    assert vit == {**half, "resize": [248, 248], "crop": 224, **bicubic}
    assert resnet == {**imagenet, "resize": [256, 256], "crop": 224, "interpolation": "bilinear"}
    assert networks.preprocess("resnet18") == networks.preprocess("torchvision:resnet18") == {}


def test_every_preprocessing_is_one_of_tspipes() -> None:
    for name in timm.list_models():
        preprocess = teacher_weights.Preprocess.from_dict(networks.preprocess(f"timm:{name}"))
        side = preprocess.crop
        assert ([side, side] if side else list(preprocess.resize or ())) == list(
            timm.get_pretrained_cfg(name).input_size[1:]
        )


def test_metadata_of_the_weights_come_before_timms_configuration() -> None:
    recorded = weights.Weights({}, {"preprocess": '{"mean": [0.1], "std": [1]}'}, "", "w.safetensors")
    plain = recorded._replace(metadata={"format": "pt"})
    vit = "timm:vit_tiny_patch16_224"
    assert teacher_weights.recorded_settings(recorded, vit)["preprocess"] == {"mean": [0.1], "std": [1]}
    assert teacher_weights.recorded_settings(plain, vit) == {"preprocess": networks.preprocess(vit)}
    assert teacher_weights.recorded_settings(plain, "resnet20") == {}


@pytest.mark.parametrize("suffix", ["safetensors", "pth.tar"])
def test_timms_files_of_weights_load(tmp_path: Path, suffix: str) -> None:
    state, path = timm.create_model("test_efficientnet", num_classes=4).state_dict(), tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(state, path, {"format": "pt"})
    else:  # as timm.utils.CheckpointSaver writes it
        averaged = {key: value + 1 for key, value in state.items()}
        record = {"epoch": 3, "arch": "test_efficientnet", "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1)}
        torch.save({**record, "state_dict": averaged, "state_dict_ema": state, "version": 2, "metric": 0.5}, path)
    spec = loading.NetworkSpec("timm:test_efficientnet", 4, (3, 64, 64), {})
    module, _ = loading.load_network(spec, weights.read(path).tensors, str(path))
    assert equal(module.state_dict(), state)


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        (
            "resnet18",
            (1, 64, 64),
            {},
            "timm:resnet18 takes images of 3 channels, these have 1. A mean",
        ),
        (
            "test_vit",
            (3, 32, 32),
            {},
            "timm:test_vit takes images of 160×160, these are 32×32. Resize them (--set preprocess.resize=[160,160] "
            "--set preprocess.crop=none in stage one), or build it for their size with its option img_size (--set "
            "teacher.options.img_size=32).",
        ),
        (
            "halonet_h1",
            (3, 33, 33),
            {},
            "timm:halonet_h1 does not take images of (3, 33, 33): AssertionError. Resize them in stage one: --set "
            "preprocess.resize=[256,256] --set preprocess.crop=none",
        ),
        ("test_vit", (3, 33, 33), {"dynamic_img_size": True, "depth": -1}, "timm:test_vit"),
        ("resnet18s", (3, 64, 64), {}, "Unknown timm network 'resnet18s'. There are: resnet18, "),
        ("hf-hub:timm/resnet18", (3, 64, 64), {}, "Unknown timm network 'hf-hub:timm/resnet18'. There are: "),
        ("resnet18.tv", (3, 64, 64), {}, "Unknown timm network 'resnet18.tv'. There are: resnet18.tv_in1k, "),
        ("test_resnet", (3, 64, 64), {"layers": [1, 65536]}, "timm:test_resnet cannot be built with layers=[1, 65536]"),
        ("test_resnet", (3, 64, 64), {"widthh": 2}, "timm:test_resnet cannot be built with widthh=2: "),
    ],
)
def test_refusals(name: str, shape: tuple[int, int, int], options: dict, message: str) -> None:
    with pytest.raises(NetworkError, match=f"^{re.escape(message)}"):
        networks.build(f"timm:{name}", 4, shape, options)


def test_another_size_is_an_option() -> None:
    module = networks.build("timm:test_vit", 4, (3, 32, 32), {"img_size": 32})
    assert module(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(
    "options",
    [{"pretrained": True}, {"checkpoint_path": "w.pth"}, {"pretrained_cfg": "a1_in1k"}, {"num_classes": 9}],
    ids=lambda options: next(iter(options)),
)
def test_options_download_and_read_nothing(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    connections: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", connections.append)
    with pytest.raises(NetworkError, match="multiple values for"):
        networks.build("timm:test_resnet", 4, (3, 64, 64), options)
    assert not connections


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(NetworkError) as error:
        networks.build("timm:resnet18", 4, (3, 64, 64))
    assert str(error.value) == "timm:resnet18 needs timm: pip install 'tspipe[timm]'"


def test_published_weights_are_fetched_only_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state, calls = timm.create_model("test_resnet").state_dict(), []
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")

    def fetch(repository: str, file: str, *, local_files_only: bool) -> str:
        calls.append((repository, file))
        if local_files_only:
            raise FileNotFoundError
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    name = networks.pretrained("timm:test_resnet")
    assert name == "timm/test_resnet.r160_in1k"
    assert equal(weights.pretrained(name, "timm:test_resnet", download=True).tensors, state)
    with pytest.raises(NetworkError) as error:
        weights.pretrained(name, "timm:test_resnet", download=False)
    assert str(error.value) == (
        "Training timm:test_resnet starts from timm/test_resnet.r160_in1k on the Hugging Face hub, which is not on "
        "this machine. Fetch it: --download. Or start from a file's (--weights FILE), or from random ones: --set "
        "teacher.pretrained=false"
    )
    assert calls == [(name, "model.safetensors")] * 2
