"""A run's identity: every setting that may change its results."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tspipe.cache import Cache
from tspipe.models import networks
from tspipe.recipes import load
from tspipe.recipes.schema import Recipe
from tspipe.training.config import IRRELEVANT, LocalInputs, StudentConfig, identity, starts_from_weights


def config(cache: Cache, *overrides: str) -> StudentConfig:
    return StudentConfig(load.load("digits", overrides), cache)


def test_every_recipe_field_is_part_of_the_identity_or_named_as_irrelevant(digits: Cache) -> None:
    """A field that is added to the recipe changes the identity unless someone decides that it does not matter."""
    resolved = set(identity(config(digits)))
    per_student = {"optimizer", "lr", "lr_drop_every", "lr_drop_factor", "lr_milestones", "momentum", "weight_decay"}
    assert per_student <= set(identity(config(digits))["students"]["lenet5"])
    assert set(Recipe.model_fields) == (resolved | IRRELEVANT | {"student"}) & set(Recipe.model_fields)
    assert set(Recipe.model_fields) >= IRRELEVANT
    assert not IRRELEVANT & resolved


def test_a_new_field_changes_the_identity_by_default(digits: Cache) -> None:
    class Extended(Recipe):
        new_setting: int = 0

    fields = config(digits).recipe.model_dump()
    old, new = (
        identity(StudentConfig(Extended.model_validate({**fields, "new_setting": value}), digits)) for value in (0, 1)
    )
    assert old != new


@pytest.mark.parametrize(
    "override",
    ["lr=0.5", "seeds=9", "mse_weight=2", "students.lenet5.momentum=0.5", "views.shift=1", "random_source=pool",
     "compile=true", "students.lenet5.lr_milestones=[3]", "losses.ts.x=1", "test_batch_size=7", "alone.lr=1"],
)  # fmt: skip
def test_settings_that_change_results_change_the_identity(digits: Cache, override: str) -> None:
    assert identity(config(digits, override)) != identity(config(digits))


@pytest.mark.parametrize("override", ["memory=1MB", "checkpoint_seconds=1", "tensorboard=true", "device=cpu"])
def test_settings_that_do_not_change_results_keep_the_identity(digits: Cache, override: str) -> None:
    assert identity(config(digits, override)) == identity(config(digits))


def test_trusting_the_data_changes_the_identity_and_their_path_does_not(digits: Cache) -> None:
    plain = config(digits)
    assert identity(replace(plain, inputs=LocalInputs(Path("elsewhere")))) == identity(plain)
    assert identity(replace(plain, inputs=LocalInputs(trust=True))) != identity(plain)


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        (["epochs=auto"], 30),
        (["epochs=auto", "init=w.pth"], 10),
        (["epochs=auto", 'student=["lenet5", "resnet20"]', "students.lenet5.init=w.pth"], 30),
        (["epochs=7", "init=w.pth"], 7),
    ],
)
def test_students_that_all_start_from_weights_need_fewer_epochs(
    digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], epochs: int
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = digits.manifest["teacher"]["options"]["input_shape"]
    torch.save(networks.build("lenet5", 10, shape).state_dict(), "w.pth")
    pretrained = partial(starts_from_weights, cache=digits, download=False)
    recipe, _ = load.recipe_for_cache("digits.h5", digits.manifest, "digits", settings, {}, pretrained=pretrained)
    assert recipe.epochs == epochs
