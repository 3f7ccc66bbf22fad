"""Table 3 on a small archive in the published layout: a narrow NTS-Net, its cache, a MobileNetV2 student."""

import csv
import hashlib
import math
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms._presets import ImageClassification

import cub200_archive
from conftest import Result, Zygote
from tspipe.cache import open_cache
from tspipe.data import datasets
from tspipe.data.preprocess import Preprocess
from tspipe.errors import NetworkError
from tspipe.models import networks, weights
from tspipe.recipes import load
from tspipe.training import checkpoint, metrics_log, teacher_epochs, teacher_weights, train_teacher

Tspipe = Callable[..., Result]
SMALL = ["--set=preprocess.resize=[40,40]", "--set=preprocess.crop=32"]  # in place of 600 and 448
NARROW = ["--set=teacher.options.width=2", "--set=teacher.batch_size=6", "--set=teacher.epochs=2"]
WIDTH = 5 * 32 * 2
COMPUTE = ["--set=compute.block_rows=8", "--set=compute.batch_size=4"]
STUDENT = ["--epochs", "1", "--set=batch_size=6"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 36 images of 3 classes and many sizes; the first is grey, the second has an EXIF rotation."""
    root = tmp_path_factory.mktemp("birds")
    cub200_archive.make(root, images=36, classes=3, scale=0.2)
    return root


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a narrow network as its authors publish theirs: nested, with the prefix of DataParallel."""
    torch.manual_seed(0)
    network = networks.build("ntsnet", 3, (3, 32, 32), {"width": 2})
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    path = tmp_path_factory.mktemp("published") / "model.ckpt"
    torch.save({"epoch": 5, "net_state_dict": state}, path)
    return path


def rows(run: str) -> list[dict[str, str]]:
    """Return a run's metrics without times."""
    table = csv.DictReader(Path(run, "metrics.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in table]


def test_the_archive_has_grey_and_rotated_images_of_many_sizes(archive: Path) -> None:
    train, test = (datasets.open_dataset("cub200", archive).split(split) for split in ("train", "test"))
    assert (len(train), len(test), len(train.classes)) == (18, 18, 3)
    files = [archive / "CUB_200_2011/images" / key for split in (train, test) for key in split.keys]
    pictures = sorted(files, key=lambda path: path.name)
    assert Image.open(pictures[0]).mode == "L"
    assert Image.open(pictures[1]).getexif()[0x0112] == 6
    assert len({Image.open(path).size for path in pictures}) > 10


def test_both_stages(tspipe: Tspipe, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_log, "_LABELLED", 4)
    data = ["--dataset", "cub200", "--data", archive]
    trained = tspipe("teacher", *data, *SMALL, *NARROW, "--set=teacher.pretrained=false")
    assert (trained.code, trained.error) == (0, "")

    # The checkpoint in checkpoints/ records the width and how images are cropped.
    made = tspipe("cache", *data, "--train-teacher", "--images", *COMPUTE)
    assert (made.code, made.error) == (0, "")
    checkpoint = Path("checkpoints/cub200-ntsnet.safetensors")
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert made.out.splitlines()[0] == (
        f"Teacher ntsnet with the weights {checkpoint} (SHA-256 {sha256[:12]}…) over cub200"
    )
    assert "images      18 train, 18 test (pixels in the file)" in made.out
    cache = open_cache(Path("cache/cub200.h5"))
    assert cache.manifest["teacher"]["file_sha256"] == sha256
    assert cache.manifest["preprocess"]["crop"] == 32
    assert cache.dimensions.width == WIDTH
    assert cache.train.images is not None and cache.train.images.shape == (18, 32, 32, 3)

    # The pixels are in the file, so neither a comparison with the teacher nor a student needs a dataset. Random images
    # pass live through NTS-Net.
    assert made.out.endswith("Next: tspipe student --cache cache/cub200.h5\n")
    compared = tspipe("verify", "cache/cub200.h5", "--teacher", "4")
    assert (compared.code, compared.error) == (0, "")
    arms = ["--compare", "--random-images", "2"]
    alone = tspipe("student", "--cache", "cache/cub200.h5", *STUDENT, *arms, "--out", "runs/held")
    assert (alone.code, alone.error) == (0, "")
    metrics = rows("runs/held")
    assert [row["arm"] for row in metrics] == ["alone", "alone, own schedule", "taught", "taught + random"]
    assert all(row["student"] == "mobilenet_v2" for row in metrics)
    assert all(math.isfinite(float(row["mse"])) and float(row["mse"]) > 0 for row in metrics if "taught" in row["arm"])


def test_pixels_in_the_cache_are_those_on_the_disk(tspipe: Tspipe, archive: Path, published: Path) -> None:
    data = ["--dataset", "cub200", "--data", archive, "--weights", published, *SMALL, *NARROW[:1], *COMPUTE]
    tables = []
    for name, images, data_folder in (("held", ["--images"], []), ("read", [], ["--data", archive])):
        assert tspipe("cache", *data, *images, "--out", f"{name}.h5").code == 0
        for memory in ("100MB", "1KB"):  # held in memory, and decoded again in each epoch
            out = ["--out", f"{name}-{memory}", f"--set=memory={memory}"]
            student = ["--cache", f"{name}.h5", "--student", "lenet5", *STUDENT, "--random-images", "0"]
            ran = tspipe("student", *student, *data_folder, *out)
            assert (ran.code, ran.error) == (0, "")
            tables.append(rows(f"{name}-{memory}"))
    assert all(table == tables[0] for table in tables)


def test_a_published_checkpoint(tspipe: Tspipe, archive: Path, published: Path) -> None:
    made = tspipe(
        "cache", "--dataset", "cub200", "--data", archive, "--weights", published, *SMALL, *NARROW[:1], *COMPUTE
    )
    assert (made.code, made.error) == (0, "")
    cache = open_cache(Path("cache/cub200.h5"))
    assert cache.manifest["teacher"]["file_sha256"] == hashlib.sha256(published.read_bytes()).hexdigest()

    # The features are those of the plain network.
    network = networks.build("ntsnet", 3, (3, 32, 32), {"width": 2}).eval()
    tensors = weights.read(published).tensors
    network.load_state_dict({key.removeprefix("module."): value for key, value in tensors.items()})
    preprocess = Preprocess.from_dict(cache.manifest["preprocess"])
    images = datasets.open_dataset("cub200", archive).test
    pixels = np.stack([preprocess.apply(images.read(i)) for i in range(len(images))])
    with torch.no_grad():
        outputs = network.outputs(preprocess.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    features, logits = np.asarray(cache.test.features, np.float32), np.asarray(cache.test.logits)
    scale = outputs.features.abs().max().item()
    np.testing.assert_allclose(features, outputs.features.numpy(), atol=1e-3 * scale)
    np.testing.assert_allclose(
        logits, outputs.concat_logits.numpy(), atol=1e-3 * outputs.concat_logits.abs().max().item()
    )


def test_a_file_in_checkpoints_is_used(tspipe: Tspipe, archive: Path, published: Path) -> None:
    Path("checkpoints").mkdir()
    shutil.copy(published, "checkpoints/cub200-ntsnet.ckpt")
    made = tspipe("cache", "--dataset", "cub200", "--data", archive, "--train-teacher", *SMALL, *NARROW[:1], *COMPUTE)
    assert (made.code, made.error) == (0, "")
    assert made.out.startswith("Teacher ntsnet with the weights checkpoints/cub200-ntsnet.ckpt (SHA-256 ")


def test_without_weights_the_message_says_where_to_get_them(tspipe: Tspipe, archive: Path) -> None:
    refused = tspipe("cache", "--dataset", "cub200", "--data", archive, "--train-teacher", *SMALL, *NARROW[:1])
    assert refused.code == 1
    assert not Path("checkpoints").exists()
    recipe = load.load("cub200", ["teacher.options.width=2", "preprocess.resize=[40,40]", "preprocess.crop=32"])
    count = teacher_weights.flops_per_image(recipe, datasets.open_dataset("cub200", archive).train) * 18 * 140
    assert 1e10 < count < 1e13
    assert refused.says(
        "There are no weights for ntsnet on cub200: checkpoints/cub200-ntsnet.safetensors does not exist. They "
        "are published at https://github.com/nicolalandro/ntsnet-cub200/releases/tag/0.2: give the file with --weights "
        "FILE, or to make as WEIGHTS=FILE. Or train the teacher: tspipe teacher --dataset cub200 "
        f"--data {archive} --set "
        "'preprocess.resize=[40,40]' --set preprocess.crop=32 --set teacher.options.width=2 --download. That takes "
        f"{count:.1e} floating-point operations (140 epochs of 18 images): {count / 1e13 / 3600:.1f} hours on a GPU "
        f"at 10 TFLOP/s, {count / 1e11 / 86400:.0f} days on a CPU at 0.1 TFLOP/s."
    )


def test_the_cost_of_training_at_full_size() -> None:
    """Compare with an estimate: 4.09e9 multiply-adds of a ResNet-50 at 224×224, of which the image takes four."""
    recipe = load.load("cub200")
    one = np.zeros((448, 448, 3), np.uint8)
    images = datasets.from_array(one[None], np.array([0]), [str(i) for i in range(200)])
    estimate = 3 * 2 * 4.09e9 * (4 + 6)
    assert teacher_weights.flops_per_image(recipe, images) == pytest.approx(estimate, rel=0.02)


def test_training_begins_with_a_resnet50(tspipe: Tspipe, archive: Path, tmp_path: Path) -> None:
    """Training starts from any file with a backbone's weights; the heads are new."""
    torch.manual_seed(1)
    complete = networks.build("ntsnet", 1000, (3, 32, 32), {"width": 2})
    backbone = complete.pretrained_model.state_dict()
    torch.save(backbone, tmp_path / "resnet50.pth")
    data = ["--dataset", "cub200", "--data", archive, *SMALL, *NARROW]
    trained = tspipe("teacher", *data, "--weights", tmp_path / "resnet50.pth", "--set=teacher.lr=1e-9")
    assert (trained.code, trained.error) == (0, "")
    tensors = weights.read(Path("checkpoints/cub200-ntsnet.safetensors")).tensors
    torch.testing.assert_close(tensors["pretrained_model.conv1.weight"], backbone["conv1.weight"], rtol=0, atol=1e-5)
    assert tensors["pretrained_model.fc.weight"].shape == (3, 64)
    refused = tspipe("cache", *data, "--weights", tmp_path / "resnet50.pth")
    assert refused.says(
        f"{tmp_path}/resnet50.pth holds only a part of ntsnet (320 of 336 keys), enough to start training: tspipe "
        f"teacher --dataset NAME --weights {tmp_path}/resnet50.pth"
    )


def test_missing_pretrained_weights(tspipe: Tspipe, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", "hub")
    refused = tspipe("teacher", "--dataset", "cub200", "--data", archive)
    assert refused.says(
        "Training ntsnet starts from torchvision's ResNet50_Weights.IMAGENET1K_V1, and "
        "hub/hub/checkpoints/resnet50-0676ba61.pth does not exist. Fetch them (98 MB): --download. Or start from a "
        "file's (--weights FILE), or from random ones: --set teacher.pretrained=false"
    )
    fetched: list[str] = []

    def fetch(url: str, path: str, digest: str) -> None:
        fetched.append(url)
        assert digest == "0676ba61"
        torch.save({"conv1.weight": torch.zeros(1)}, path)

    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    refused = tspipe("teacher", "--dataset", "cub200", "--data", archive, "--download")
    assert fetched == ["https://download.pytorch.org/models/resnet50-0676ba61.pth"]
    assert refused.says(
        "hub/hub/checkpoints/resnet50-0676ba61.pth is damaged: its SHA-256 does not begin with 0676ba61. Remove it "
        "and fetch it again: --download"
    )


def test_pretrained_weights_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    entry = SimpleNamespace(url=f"https://example.org/resnet50-{digest[:8]}.pth", meta={"_file_size": 1.0})
    entry.transforms = partial(ImageClassification, crop_size=224)
    monkeypatch.setattr("torchvision.models.get_weight", lambda name: entry)
    fetched: list[str] = []

    def fetch(url: str, path: str, _: str) -> None:
        fetched.append(url)
        shutil.copy(tmp_path / "w.pth", path)

    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    for download in (True, True, False):
        pretrained = weights.pretrained("W", "net", download=download)
        assert (pretrained.sha256, list(pretrained.tensors)) == (digest, ["conv1.weight"])
    assert fetched == [entry.url]


def test_a_truncated_jpeg_is_named(tspipe: Tspipe, archive: Path, published: Path, tmp_path: Path) -> None:
    root = tmp_path / "birds"
    shutil.copytree(archive, root)
    key = datasets.open_dataset("cub200", root).test.keys[3]
    path = root / "CUB_200_2011/images" / key
    path.write_bytes(path.read_bytes()[:-200])
    refused = tspipe(
        "cache", "--dataset", "cub200", "--data", root, "--weights", published, *SMALL, *NARROW[:1], *COMPUTE
    )
    assert refused.code == 1
    assert refused.says(f"{path} cannot be decoded: image file is truncated (…")
    assert not Path("cache/cub200.h5").exists()


def test_dropout_always_on_gives_the_same_file_again(
    tspipe: Tspipe, archive: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`always_dropout` makes features as the paper's code did: half of them are zero, drawn from the block's stream."""
    always = ["--dataset", "cub200", "--data", archive, "--weights", published, *SMALL, *NARROW[:1], *COMPUTE]
    always += ["--set=teacher.options.always_dropout=true"]
    assert tspipe("cache", *always, "--out", "a.h5").code == 0
    cache = open_cache(Path("a.h5"))
    assert cache.manifest["teacher"]["options"]["always_dropout"] is True
    assert (cache.train.features.load() == 0).mean() > 0.45

    # Rows can be computed again, because each block has its own random stream; a sample of rows cannot be compared.
    spoiled = bytearray(Path("a.h5").read_bytes())
    column = cache.test.features
    spoiled[column.offset + 9 * column.row_bytes] ^= 1
    Path("b.h5").write_bytes(spoiled)
    assert tspipe("verify", "b.h5", archive, "--repair").code == 0
    assert Path("a.h5").read_bytes() == Path("b.h5").read_bytes()
    refused = tspipe("verify", "a.h5", archive, "--teacher", "5")
    assert refused.says(
        f"{cache.path}: its teacher gives other features each time it runs, as one with dropout always on does, so "
        "it cannot be compared with the file. Leave out --teacher."
    )
    monkeypatch.setattr(metrics_log, "_LABELLED", 4)
    student = ["--student", "lenet5", *STUDENT, "--random-images", "2"]
    trained = tspipe("student", "--cache", "a.h5", "--data", archive, *student)
    assert (trained.code, trained.error) == (0, "")


def test_killed_training_resumes(zygote: Zygote, archive: Path, tmp_path: Path) -> None:
    """NTS-Net's losses, dropout and random crops are the same after a kill."""
    start = ["teacher", "--dataset", "cub200", "--data", archive, *SMALL, *NARROW, "--set=teacher.pretrained=false"]
    start += ["--set=checkpoint_seconds=0", "--set=teacher.options.parts=2", "--set=teacher.options.concatenated=1"]
    complete, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert zygote.run(*start, "--out", complete).code == 0
    positions, draw = [], random.Random(0)
    for _ in range(2):
        run = zygote.run(*start, "--out", killed, seconds=draw.uniform(0.5, 2))
        assert run.killed or run.code == 0, run.lines
        if saved := checkpoint.Checkpointer(killed.with_name(killed.name + ".part"), 0, None).load():
            positions.append(saved[1])
    assert positions == sorted(positions)
    assert zygote.run(*start, "--out", killed).code == 0
    assert killed.read_bytes() == complete.read_bytes()


def test_pretrained_weights_of_another_width(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = networks.build("ntsnet", 3, (3, 32, 32), {"width": 3}).pretrained_model.state_dict()
    given = weights.Weights(backbone, {}, "0" * 64, "resnet50-0676ba61.pth")
    monkeypatch.setattr(weights, "pretrained", lambda name, network, download: given)
    recipe = load.load("cub200", [setting.removeprefix("--set=") for setting in [*SMALL, *NARROW]])
    with pytest.raises(NetworkError) as refused:
        train_teacher.train_teacher(train_teacher.TeacherConfig(recipe, archive, out=tmp_path / "x.safetensors"))
    assert str(refused.value) == (
        "resnet50-0676ba61.pth, from which the training of ntsnet starts, does not fit the network as it is "
        "built here. Start from random weights: --set teacher.pretrained=false"
    )


def test_random_crops(archive: Path) -> None:
    recipe = load.load("cub200", ["preprocess.resize=[40,41]", "preprocess.crop=32", "teacher.flip=false"])
    y, x = torch.meshgrid(torch.arange(40), torch.arange(41), indexing="ij")
    images = torch.stack([y, x]).to(torch.uint8)[None].repeat(500, 1, 1, 1)
    crops = teacher_epochs._augment(images, recipe, epoch=0, batch=0)
    assert crops.shape == (500, 2, 32, 32)
    corners = {tuple(crop[:, 0, 0].tolist()) for crop in crops}
    assert {y for y, _ in corners} == set(range(9))
    assert {x for _, x in corners} == set(range(10))
    for crop in crops:
        top, left = crop[:, 0, 0].tolist()
        assert torch.equal(crop, images[0, :, top : top + 32, left : left + 32])
    assert torch.equal(teacher_epochs._augment(images, recipe, epoch=0, batch=0), crops)
    assert not torch.equal(teacher_epochs._augment(images, recipe, epoch=1, batch=0), crops)
