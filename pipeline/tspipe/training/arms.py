"""The arms of a comparison, and what files call their learners."""

import re
from collections.abc import Sequence

from tspipe.models import networks
from tspipe.recipes.schema import Overrides, Recipe

ALONE, OWN, TAUGHT, RANDOM = ARMS = ("alone", "alone, own schedule", "taught", "taught + random")
UNTAUGHT = (ALONE, OWN)


def arms(compare: bool, recipe: Recipe) -> tuple[str, ...]:
    """The arms to train: the method itself, or all to compare that the recipe has settings for.

    Where a paper fits the student alone in another way than the taught one, it is trained in both: `alone` differs from
    the taught arms in the loss only, `alone, own schedule` is the paper's.
    """
    there = {ALONE: True, OWN: recipe.alone != Overrides(), TAUGHT: True, RANDOM: recipe.random_images > 0}
    chosen = ARMS if compare else (RANDOM if there[RANDOM] else TAUGHT,)
    return tuple(arm for arm in chosen if there[arm])


def losses_of(arm: str, chosen: Sequence[str]) -> Sequence[str]:
    """The losses that an arm is trained with, a learner each: the chosen ones if it is taught, else cross-entropy."""
    return ["xent"] if arm in UNTAUGHT else chosen


def learner_name(student: str, arm: str, loss: str, seed: int) -> str:
    """What files call a learner."""
    other = "" if arm in UNTAUGHT or loss == "ts" else f"-{loss}"
    return f"{networks.recorded_name(student)}-{re.sub('[^a-z]+', '-', arm)}{other}-seed{seed}".replace(":", "-")


def taught(chosen: Sequence[str]) -> bool:
    """Whether any of these arms learns from the teacher."""
    return not set(UNTAUGHT).issuperset(chosen)
