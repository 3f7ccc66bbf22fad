"""The configuration of a run of stage two, and the part of it that determines the run's results."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tspipe import losses
from tspipe.cache import Cache
from tspipe.errors import RecipeError
from tspipe.models import initial, networks
from tspipe.models.initial import InitialWeights
from tspipe.models.loading import NetworkSpec
from tspipe.recipes.schema import Recipe
from tspipe.training.arms import ARMS, RANDOM, arm_losses, learner_name
from tspipe.utils import plugins

# Recipe fields that do not change the results of stage two. Every other field is part of a run's identity.
IRRELEVANT = {
    "checkpoint_seconds",  # a resumed run ends with the same weights
    "compute",  # stage one's, and so covered by the cache's id; likewise features, preprocess, split and teacher
    "dataset",  # the images are compared with the cache's
    "device",  # the run's environment records it, and a run resumes on the same kind of device
    "features",
    "memory",  # where tensors are held
    "paper",  # for comparison only
    "preprocess",
    "split",
    "teacher",
    "tensorboard",
}
# Recipe fields that the identity holds in another form, resolved for the students and losses of the run.
_RESOLVED = {"alone", "init", "loss", "losses", "student", "students"}


@dataclass(frozen=True)
class LocalInputs:
    """Where a run finds its images and weights.

    Attributes:
        data: the folder of the dataset; None for `data/<name>`.
        unlabelled: the folder of the cache's images without labels, if the cache does not hold their pixels.
        download: whether a missing dataset and missing weights are downloaded.
        trust: whether images are not compared with the cache's.
    """

    data: Path | None = None
    unlabelled: Path | None = None
    download: bool = False
    trust: bool = False


@dataclass(frozen=True)
class StudentConfig:
    """The configuration of `tspipe student`.

    Attributes:
        out: the run folder; None for one in `runs/`.
        progress_offset: images that a larger job trains on before and after this run, for its estimate of time left.
    """

    recipe: Recipe
    cache: Cache
    arms: tuple[str, ...] = (RANDOM,)
    inputs: LocalInputs = LocalInputs()
    out: Path | None = None
    progress_offset: tuple[int, int] = (0, 0)

    @cached_property
    def initial(self) -> dict[str, InitialWeights]:
        """The weights that students start from, without those that start from random ones."""
        shape = tuple(self.cache.manifest["teacher"]["options"]["input_shape"] or ())  # a forged file may have none
        weights = {}
        for name in self.recipe.student:
            spec = NetworkSpec(name, len(self.cache.classes), shape, self.recipe.student_options(name))
            weights[name] = initial.find(self.recipe.student_init(name), spec, download=self.inputs.download)
        return {name: one for name, one in weights.items() if one}

    def student_options(self, student: str) -> dict[str, Any]:
        """Return the options of a student's network: the recipe's, and those that its initial weights imply."""
        weights = self.initial.get(student)
        return weights.options if weights else self.recipe.student_options(student)


def starts_from_weights(recipe: Recipe, cache: Cache, download: bool) -> bool:
    """Return whether all students of a recipe start from weights; with `download`, from those that it fetches, too."""
    config = StudentConfig(recipe, cache, inputs=LocalInputs(download=download))
    return len(config.initial) == len(recipe.student)


def check_names(recipe: Recipe) -> None:
    """Raise RecipeError if two students, losses or learners have the same name."""
    students = [networks.recorded_name(name) for name in recipe.student]
    loss_names = [losses.recorded_name(name) for name in recipe.loss]
    learners = [
        learner_name(student, arm, loss, 0)
        for student in students
        for arm in ARMS
        for loss in arm_losses(arm, loss_names)
    ]
    for kind, names in (("students", students), ("losses", loss_names), ("learners", learners)):
        if duplicate := next((name for name, count in Counter(names).items() if count > 1), None):
            raise RecipeError(f"Two {kind} are named {duplicate}. Name each once, and give files different names.")


def identity(config: StudentConfig) -> dict[str, Any]:
    """Return everything that determines the run's results; the run folder is named after its digest."""
    recipe = config.recipe
    check_names(recipe)
    files = [name for name in (*recipe.student, *recipe.loss) if plugins.is_file(name) and Path(name).is_file()]
    return {
        "cache": config.cache.id,
        "files": {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files},
        "arms": list(config.arms),
        "students": {
            name: {**recipe.optimisation(name).model_dump(exclude={"epochs"}), "options": config.student_options(name)}
            for name in recipe.student
        },
        "init": {name: start.sha256 for name, start in config.initial.items()},
        "loss": recipe.loss if len(recipe.loss) > 1 else recipe.loss[0],
        "losses": {name: options for name in recipe.loss if (options := recipe.stated_loss_options(name))},
        "alone": recipe.alone.model_dump(exclude_none=True),
        "trust_data": config.inputs.trust and not config.cache.has_images,
        **recipe.model_dump(exclude=IRRELEVANT | _RESOLVED),
    }
