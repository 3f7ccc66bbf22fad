"""What `tspipe student` was asked for, and what of it a run's numbers follow from."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tspipe import losses
from tspipe.cache import Cache
from tspipe.data.views import views_identity
from tspipe.errors import RecipeError
from tspipe.models import networks
from tspipe.recipes.schema import Recipe
from tspipe.training.arms import ARMS, OWN, RANDOM, learner_name, losses_of
from tspipe.utils import plugins

_WHERE_CHANGED = {"compile", "live_precision", "precision", "random_generator", "val_fraction"}


@dataclass(frozen=True)
class StudentConfig:
    """What `tspipe student` was asked for."""

    recipe: Recipe
    cache: Cache
    arms: tuple[str, ...] = (RANDOM,)
    data: Path | None = None
    out: Path | None = None
    download: bool = False
    trust_data: bool = False
    around: tuple[int, int] = (0, 0)  # images that a larger job trains on before and after, for its time left


def check_names(recipe: Recipe) -> None:
    """Raise RecipeError where students, losses or learners could not be told apart by name."""
    students, used = (
        [stated(name) for name in names]
        for stated, names in ((networks.recorded_name, recipe.student), (losses.recorded_name, recipe.loss))
    )
    learners = [
        learner_name(student, arm, loss, 0) for student in students for arm in ARMS for loss in losses_of(arm, used)
    ]
    for kind, called in (("students", students), ("losses", used), ("learners", learners)):
        if twice := next((name for name, count in Counter(called).items() if count > 1), None):
            raise RecipeError(f"Two {kind} are called {twice}. Give each once, and files different names.")


def identity(config: StudentConfig) -> dict[str, Any]:
    """What the numbers follow from, and nothing else: the frozen config a run folder is named after."""
    recipe = config.recipe
    shared = {
        "batch_size", "epochs", "mse_weight", "random_forward", "random_images", "seeds", "test_batch_size",
        "xent_weight",
    }  # fmt: skip
    check_names(recipe)
    students = {
        name: {**recipe.optimisation(name).model_dump(), "options": recipe.student_options(name)}
        for name in recipe.student
    }
    files = [name for name in (*recipe.student, *recipe.loss) if plugins.is_file(name) and Path(name).is_file()]
    options = {name: own for name in recipe.loss if (own := recipe.loss_options(name))}
    return {
        "cache": config.cache.id,
        "files": {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files},
        "arms": list(config.arms),
        "students": students,
        "loss": recipe.loss if len(recipe.loss) > 1 else recipe.loss[0],
        **({"losses": options} if options else {}),
        **recipe.model_dump(include=shared),
        **({"alone": recipe.alone.model_dump(exclude_none=True)} if OWN in config.arms else {}),
        **recipe.model_dump(include=_WHERE_CHANGED, exclude_defaults=True),
        **({"random_source": "pool"} if recipe.random_source == "pool" and RANDOM in config.arms else {}),
        **views_identity(config.cache, recipe.views),
        **({"trust_data": True} if config.trust_data and not config.cache.has_images else {}),
    }
