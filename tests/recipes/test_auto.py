"""What `auto` stands for in the recipe of photos."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared import make_folder
from tspipe.data.datasets import Images
from tspipe.errors import DatasetError
from tspipe.models import networks, weights
from tspipe.recipes import auto, load
from tspipe.recipes.settings import recipe_values
from tspipe.training import teacher_weights
from tspipe.training.train_teacher import TeacherConfig

RESNET50 = weights.stated_preprocess(networks.imagenet("torchvision:resnet50"))


def photos(*sizes: tuple[int, int], count: int = 600) -> Images:
    """Return images of these sizes in turn; the first is broken."""

    def read(index: int) -> Any:
        if not index:
            raise DatasetError("broken")
        return np.zeros((*sizes[index % len(sizes)], 3), np.uint8)

    return Images(np.zeros(count, np.int64), [str(i) for i in range(count)], ["a"], read)


@pytest.mark.parametrize(
    "side, known, stated, expected",
    [
        (375, {}, {}, ((256, 256), 224, 0, 16)),
        (32, {}, {}, ((32, 32), None, 2, 2)),
        (32, {}, auto.IMAGENET, ((256, 256), 224, 0, 16)),
        (375, {}, RESNET50, ([232, 232], 224, 0, 16)),
        (375, {"resize": (128, 128)}, {}, ((128, 128), None, 9, 9)),
        (375, {"crop": 112}, {}, ((128, 128), 112, 0, 8)),
        (375, {"resize": (140, 140), "crop": 112}, RESNET50, ((140, 140), 112, 0, 8)),
        (32, {"resize": None, "crop": None}, {}, (None, None, 2, 2)),
    ],
)
def test_the_size_follows_from_the_weights_or_the_images(
    side: int, known: dict[str, Any], stated: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    images = photos((side, side), (side + 100, side), (side, 2 * side))
    values = auto.settings(images, known, stated, pretrained=False)
    names = ("preprocess.resize", "preprocess.crop", "teacher.shift", "views.shift")
    assert tuple(values[name] for name in names) == expected


def test_every_setting_that_may_be_auto_has_a_value() -> None:
    values = auto.settings(photos((9, 9)), {}, {}, pretrained=True)
    others = {"epochs", "student", "teacher.pretrained"}  # chosen for the cache, and with the weights
    assert values.keys() | others == auto.DEFAULTS.keys()


@pytest.mark.parametrize("images, batch", [(8, 4), (100, 12), (256, 32), (5000, 32)])
def test_batches_suit_small_sets(images: int, batch: int) -> None:
    assert auto.batch_size(images) == batch


def test_the_default_student_suits_the_size() -> None:
    for preprocess, network in (
        ({"resize": [28, 28], "crop": None}, "resnet20"),
        (auto.IMAGENET, "torchvision:mobile"),
    ):
        assert auto.for_students(600, preprocess)["student"].startswith(network)


def test_auto_is_replaced_unless_a_recipe_or_the_user_states_a_value(tmp_path: Path) -> None:
    recipe_file = tmp_path / "mine.toml"
    recipe_file.write_text('base = "folder"\nbatch_size = 5\n[preprocess]\nmean = [0.5, 0.5, 0.5]\n')
    choose = partial(auto.settings, photos((32, 32), count=100), stated={}, pretrained=False)
    recipe = load.load(str(recipe_file), ["views.count=2"], choose=choose)
    assert (recipe.batch_size, recipe.teacher.batch_size, recipe.teacher.epochs) == (5, 12, 60)
    assert (recipe.preprocess.mean, recipe.preprocess.resize, recipe.preprocess.crop) == ((0.5,) * 3, (32, 32), None)
    assert (recipe.views.count, recipe.views.shift) == (2, 2)


def test_a_recipe_is_shown_with_auto() -> None:
    recipe, automatic = load.load("folder"), load.automatic_settings("folder", ["batch_size=8"])
    values = {setting.name: value for setting, value in recipe_values(recipe, automatic)}
    assert (values["preprocess.resize"], values["teacher.epochs"], values["epochs"]) == ("auto", "auto", "auto")
    assert "batch_size" not in automatic


def test_a_recipe_without_auto_reads_no_images() -> None:
    load.load("cifar10", choose=lambda known: pytest.fail("chosen"))


@pytest.mark.parametrize(
    "network, given, size", [("./mine.py", True, 224), ("./mine.py", False, 16), ("lenet5", True, 16)]
)
def test_which_weights_expect_the_size_of_imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, given: bool, size: int
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos")
    Path("mine.py").write_text(
        "from torch import nn\n\ndef build(num_classes):\n    return nn.LazyLinear(num_classes)\n"
    )
    start = weights.Weights({}, {}, "", "w.pth") if given else None
    recipe = loaded(start, f"teacher.network={network}")
    assert (recipe.preprocess.crop or recipe.preprocess.resize[0]) == size
    assert (recipe.teacher.pretrained, recipe.teacher.epochs) == (False, 10 if given else 60)


def test_published_weights_that_are_absent_are_remarked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    make_folder(tmp_path / "photos")
    recipe = loaded(None, "teacher.network=torchvision:squeezenet1_0")
    assert (recipe.teacher.pretrained, recipe.preprocess.crop) == (False, 224)
    remark = capsys.readouterr().err
    assert "Fetch them (5 MB): --download." in remark
    assert "For now torchvision:squeezenet1_0 starts from random weights" in remark


def loaded(start: weights.Weights | None, *settings: str) -> Any:
    """Return the recipe of photos for a teacher that starts from these weights."""
    read: Callable[..., Any] = partial(load.load, "folder", ["dataset=folder:photos", *settings], {})
    return teacher_weights.load_recipe(read, start, TeacherConfig(read()))
