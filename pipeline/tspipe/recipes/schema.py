"""A recipe: dataset, preprocess, teacher, students and hyper-parameters, read from TOML.

`recipes/<dataset>.toml` is the recipe of a dataset; every field can be overridden with `--set field.name=value`.
"""

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from tspipe.data.preprocess import Preprocess
from tspipe.data.random_images import Generator
from tspipe.data.views import Views
from tspipe.utils.plugins import names as plugin_names
from tspipe.utils.plugins import recorded_name, unknown

Precision = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A part of a recipe: immutable, and without fields nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Optimisation(Section):
    """How weights are fitted; a student may differ from the recipe in any of these."""

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0)
    lr_drop_every: int = Field(50, ge=1, description="epochs between multiplications by lr_drop_factor")
    lr_drop_factor: float = Field(0.1, gt=0, le=1)
    lr_milestones: list[int] = Field(
        [], description="epochs after which it is multiplied; lr_drop_every then does not count"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD only")
    weight_decay: float = Field(0.0, ge=0)


class Teacher(Optimisation):
    """The teacher: which network, and how `tspipe teacher` trains it."""

    network: str = "resnet56"
    options: dict[str, Any] = {}
    pretrained: bool = Field(True, description="begin with the weights the network names, where no file is given")
    epochs: int = Field(200, ge=1)
    batch_size: int = Field(128, ge=2)
    optimizer: Literal["adam", "sgd"] = "sgd"
    lr: float = Field(0.1, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    shift: int = Field(0, ge=0, description="training images move by up to so many pixels each way")
    random_crop: bool = Field(False, description="training images are cropped at random places, not in the middle")
    flip: bool = Field(False, description="training images are mirrored at random")


class Features(Section):
    """How features are stored."""

    dtype: Literal["float16", "float32"] = "float16"


class Compute(Section):
    """How stage one computes; the cache's bytes depend on it."""

    batch_size: int = Field(64, ge=1)
    block_rows: int = Field(256, ge=1, description="images of a block; a kill loses three blocks at most")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


class Overrides(Section):
    """What differs from the recipe's optimisation; None means as there."""

    optimizer: Literal["adam", "sgd"] | None = None
    lr: float | None = Field(None, gt=0)
    lr_drop_every: int | None = Field(None, ge=1)
    lr_drop_factor: float | None = Field(None, gt=0, le=1)
    lr_milestones: list[int] | None = None
    momentum: float | None = Field(None, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0)


class Student(Overrides):
    """What one student has of its own."""

    options: dict[str, Any] = {}


class Paper(Section):
    """What the paper reports, as fractions: by student and arm, and of other systems."""

    title: str
    source: str
    accuracy: dict[str, dict[str, float]]
    others: dict[str, float] = {}
    differs: list[str] = Field([], description="what of a run is not as the paper has it")


class Recipe(Optimisation):
    """Everything the three commands need; the top-level fields are those of stage two."""

    dataset: str
    preprocess: Preprocess
    teacher: Teacher = Teacher()
    features: Features = Features()
    compute: Compute = Compute()
    views: Views = Views()
    student: list[str] = Field(["lenet5"], min_length=1, description="the students trained when none is named")
    students: dict[str, Student] = {}
    alone: Overrides = Field(
        Overrides(), description="of the student alone, which --compare then trains in this way, too"
    )
    epochs: int = Field(200, ge=1)
    batch_size: int = Field(128, ge=2, description="batch norm needs two")
    loss: list[str] = Field(["ts"], min_length=1, description="of the taught arms: names, or paths of Python files")
    losses: dict[str, dict[str, Any]] = Field({}, description="options of a loss, by its name")
    test_batch_size: int = Field(1000, ge=1)
    random_images: int = Field(178, ge=0, description="random images added to every batch")
    random_source: Literal["live", "pool"] = Field(
        "live", description="labelled live by the teacher, or in stage one (tspipe cache --random-pool)"
    )
    random_generator: Generator = Field("mt19937", description="what draws random images; minstd repeats itself soon")
    random_forward: Literal["concatenated", "separate"] = Field(
        "concatenated", description="whether a student's batch norm sees real and random images as one batch"
    )
    precision: Precision = Field("float32", description="what students compute in; their weights are float32")
    live_precision: Precision = Field("float32", description="what the live teacher computes in")
    compile: bool = Field(
        False, description="torch.compile for students, on a GPU as CUDA graphs; needs a C++ compiler"
    )
    seeds: int = Field(1, ge=1, description="how many seeds, counted from 0; each is a cohort")
    mse_weight: float | Literal["auto"] = Field(
        1.0, description="of the features' loss; auto: 1 / the variance of a cached feature, the mean over features"
    )
    xent_weight: float = Field(1.0, ge=0)
    val_fraction: float = Field(
        0.0, ge=0, lt=1, description="of the training images, held back to choose an epoch; drawn anew for every seed"
    )
    tensorboard: bool = Field(False, description="write curves for TensorBoard, too, into the run folder")
    checkpoint_seconds: float = Field(30.0, ge=0, description="time between checkpoints")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    memory: ByteSize | None = Field(None, description="what may be held in memory; none: half of the machine's")
    paper: Paper | None = Field(None, description="what to set beside the results")

    @field_validator("student", "loss", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("mse_weight", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value == "auto" or (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
        ):
            return value
        raise ValueError("neither auto nor a number of 0 or more")

    @model_validator(mode="after")
    def _known_students(self) -> Self:
        known = {*plugin_names("models.networks"), *map(_stated, self.student)}
        for name in self.students:
            if name not in known and not name.startswith("torchvision:"):
                raise ValueError(unknown("student", name, known))
        return self

    @model_validator(mode="after")
    def _known_losses(self) -> Self:
        known = {*plugin_names("losses"), *(recorded_name("losses", name) for name in self.loss)}
        for name in self.losses:
            if name not in known:
                raise ValueError(unknown("loss", name, known))
        return self

    def loss_options(self, loss: str) -> dict[str, Any]:
        """Return the options that a loss is built with: `[losses.NAME]`, and for `ts` the recipe's two weights."""
        weights = {"mse_weight": self.mse_weight, "xent_weight": self.xent_weight} if loss == "ts" else {}
        return {**weights, **self.stated_loss_options(loss)}

    def stated_loss_options(self, loss: str) -> dict[str, Any]:
        """Return the options of a loss in `[losses.NAME]`."""
        return self.losses.get(recorded_name("losses", loss), {})

    def student_options(self, student: str) -> dict[str, Any]:
        """The options this student's network is built with."""
        return self.students.get(_stated(student), Student()).options

    def optimisation(self, student: str, *, alone: bool = False) -> Optimisation:
        """How this student is fitted; `alone` in the way of its own that the student alone may have."""
        own = self.students.get(_stated(student), Student()).model_dump(exclude_none=True, exclude={"options"})
        own |= self.alone.model_dump(exclude_none=True) if alone else {}
        return Optimisation(**{name: own.get(name, getattr(self, name)) for name in Optimisation.model_fields})


def _stated(network: str) -> str:
    return recorded_name("models.networks", network)
