"""The arms of a comparison, and the learners that they consist of."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tspipe import losses
from tspipe.cache.layout import FROM_PHOTOS
from tspipe.errors import RecipeError
from tspipe.models import networks
from tspipe.recipes.schema import Overrides, Recipe

ALONE, OWN, ALONE_RANDOM, TAUGHT, RANDOM = ARMS = (
    "alone",
    "alone, own schedule",
    "alone + random",
    "taught",
    "taught + random",
)
SHORT_NAMES = dict(zip(("alone", "own", "alone-random", "taught", "random"), ARMS, strict=True))
UNTAUGHT = (ALONE, OWN, ALONE_RANDOM)
WITH_RANDOM = (ALONE_RANDOM, RANDOM)


def select_arms(compare: bool, recipe: Recipe) -> tuple[str, ...]:
    """Return the arms to train: the method itself or, to compare, all that the recipe has settings for.

    Where a paper trains the student alone with another schedule than the taught one, both are trained: `alone` differs
    from the taught arms in the loss only; `alone, own schedule` is the paper's. `alone + random` is trained with random
    images that have labels of their own, those of mixtures.
    """
    if not compare:
        return (RANDOM if recipe.random_images else TAUGHT,)
    available = {
        ALONE: True,
        OWN: recipe.alone != Overrides(),
        ALONE_RANDOM: recipe.random_images > 0 and recipe.random_kind in FROM_PHOTOS,
        TAUGHT: True,
        RANDOM: recipe.random_images > 0,
    }
    return tuple(arm for arm in ARMS if available[arm])


def named_arms(names: str | None, recipe: Recipe) -> tuple[str, ...]:
    """Return the arms of these short names, separated by commas; all of a comparison for None.

    Raises RecipeError for a name that the recipe has no arm of.
    """
    available = select_arms(True, recipe)
    short = {name: arm for name, arm in SHORT_NAMES.items() if arm in available}
    chosen = names.split(",") if names else list(short)
    if unknown := next((name for name in chosen if name not in short), None):
        raise RecipeError(f"There is no arm {unknown!r} with these settings. There are: {', '.join(short)}.")
    return tuple(arm for name, arm in short.items() if name in chosen)


def arm_losses(arm: str, names: Sequence[str]) -> Sequence[str]:
    """Return the losses that an arm is trained with, one learner each: cross-entropy for the student alone."""
    return ["xent"] if arm in UNTAUGHT else names


@dataclass(frozen=True)
class LearnerSpec:
    """Which learner: a student network, an arm, a loss and a seed."""

    student: str
    arm: str
    loss: str
    seed: int

    @property
    def loss_name(self) -> str:
        """The loss as tables name it; a file `./mine.py` is `mine`."""
        return losses.recorded_name(self.loss)

    @property
    def name(self) -> str:
        """The learner in file names: `lenet5-taught-random-seed0`, with another loss `lenet5-taught-kd-seed0`."""
        return learner_name(self.student, self.arm, self.loss_name, self.seed)

    def files(self, *, validation: bool) -> dict[str, str]:
        """Return the student's files in the run folder: after the last epoch, and after the best one.

        The keys say what selects the epoch: `last`, and `validation` with held-back images, else `test`.
        """
        best = "validation" if validation else "test"
        return {"last": f"student-{self.name}.safetensors", best: f"student-{self.name}-best-{best}.safetensors"}

    def rows(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the learner's rows of metrics.csv."""
        learner = (self.student, self.arm, self.loss_name, self.seed)
        return [row for row in rows if (row["student"], row["arm"], row["loss"], row["seed"]) == learner]


def learner_name(student: str, arm: str, loss: str, seed: int) -> str:
    """Return the learner's name in file names."""
    suffix = "" if arm in UNTAUGHT or loss == "ts" else f"-{loss}"
    return f"{networks.file_stem(student)}-{re.sub('[^a-z]+', '-', arm)}{suffix}-seed{seed}".replace(":", "-")
