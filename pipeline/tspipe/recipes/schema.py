"""The schema of a recipe: dataset, preprocessing, teacher, students and hyper-parameters, read from TOML.

`recipes/DATASET.toml` is the recipe of a dataset. Every field can be overridden with `--set field.name=value`.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from tspipe.data.hold_out import HoldOut
from tspipe.data.preprocess import Preprocess
from tspipe.data.random_images import Generator, KindName
from tspipe.data.views import Views
from tspipe.utils.plugins import LIBRARIES, recorded_name, unknown
from tspipe.utils.plugins import names as plugin_names

Precision = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Match = Literal["project", "linear", "autoencoder", "none"]
Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["step", "cosine"]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
DropFactor = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
AtLeastTwo = Annotated[int, Field(ge=2)]


class Section(BaseModel):
    """A part of a recipe: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Optimisation(Section):
    """How weights are optimised."""

    epochs: AtLeastOne = Field(200, description="The number of epochs.")
    optimizer: Optimizer = Field("adam", description="The optimiser.")
    lr: Positive = Field(1e-3, description="The initial learning rate.")
    schedule: Schedule = Field(
        "step", description="How the learning rate falls: in drops, or along half a cosine to the last epoch."
    )
    warmup_epochs: Count = Field(0, description="Epochs in which the learning rate rises linearly to lr.")
    lr_drop_every: AtLeastOne = Field(50, description="The number of epochs between drops of the learning rate.")
    lr_drop_factor: DropFactor = Field(0.1, description="The factor by which the learning rate drops.")
    lr_milestones: list[int] = Field(
        [], description="Epochs after which the learning rate drops, instead of lr_drop_every."
    )
    momentum: Fraction = Field(0.9, description="The momentum of SGD.")
    weight_decay: NotNegative = Field(0.0, description="The weight decay.")
    batch_norm_momentum: DropFactor | None = Field(
        None, description="The momentum of batch norms' running statistics, in place of the network's."
    )


class Teacher(Optimisation):
    """The teacher: its network, and how `tspipe teacher` trains it."""

    network: str = Field(
        "resnet56",
        description="A network's name, torchvision:NAME, timm:NAME, hub:OWNER/REPO@COMMIT:NAME, or a Python file.",
    )
    options: dict[str, Any] = Field({}, description="The options of the network.")
    weights_key: str | None = Field(
        None, description="Which weights of a file that holds several, as state_dict_ema; none prefers averaged ones."
    )
    any_classes: bool = Field(False, description="Use weights although they were trained for other classes.")
    pretrained: bool | Literal["imagenet"] = Field(
        True, description="Without a file, start from the weights that the network names, or from published ones."
    )
    batch_size: AtLeastTwo = Field(128, description="The number of images in a batch.")
    optimizer: Optimizer = Field("sgd", description="The optimiser.")
    lr: Positive = Field(0.1, description="The initial learning rate.")
    weight_decay: NotNegative = Field(1e-4, description="The weight decay.")
    shift: Count = Field(0, description="Shift training images at random by up to this many pixels each way.")
    random_crop: bool = Field(False, description="Crop training images at random positions instead of the centre.")
    flip: bool = Field(False, description="Mirror training images at random.")


class Features(Section):
    """How the cache stores features."""

    dtype: Literal["float16", "float32"] = Field("float16", description="The type of the stored features.")


class Compute(Section):
    """How stage one computes; the cache's bytes depend on it."""

    batch_size: AtLeastOne = Field(64, description="The number of images in a batch of stage one.")
    block_rows: AtLeastOne = Field(256, description="Images per block; an interruption loses three blocks at most.")
    device: Device = Field("auto", description="The device of the teacher in stage one.")


class Overrides(Section):
    """Values that replace the recipe's. None keeps the recipe's value."""

    optimizer: Optimizer | None = None
    lr: Positive | None = None
    schedule: Schedule | None = None
    warmup_epochs: Count | None = None
    lr_drop_every: AtLeastOne | None = None
    lr_drop_factor: DropFactor | None = None
    lr_milestones: list[int] | None = None
    momentum: Fraction | None = None
    weight_decay: NotNegative | None = None
    batch_norm_momentum: DropFactor | None = None


class Student(Overrides):
    """The settings of one student."""

    init: str | None = Field(None, description="The weights that this student starts from. None is the recipe's init.")
    options: dict[str, Any] = Field({}, description="The options of the network.")


class Paper(Section):
    """The results of the paper, as fractions."""

    title: str = Field(description="The title of the comparison.")
    source: str = Field(description="Where the results are published.")
    accuracy: dict[str, dict[str, float]] = Field(description="The published accuracy by student and arm.")
    others: dict[str, float] = Field({}, description="The published accuracy of other methods.")
    differs: list[str] = Field([], description="How a run differs from the paper; written by tspipe reproduce.")


class Recipe(Optimisation):
    """All settings of a run; the top-level fields are those of stage two."""

    dataset: str = Field(description="A dataset's name, folder:PATH, or the path of a Python file.")
    split: HoldOut = HoldOut()
    preprocess: Preprocess
    teacher: Teacher = Teacher()
    features: Features = Features()
    compute: Compute = Compute()
    views: Views = Views()
    view_source: Literal["stored", "live"] = Field(
        "stored",
        description="The views that students see: the cache's, or others in each epoch, which the teacher labels live.",
    )
    student: list[str] = Field(["lenet5"], min_length=1, description="Networks to train: names or paths of files.")
    students: dict[str, Student] = Field({}, description="Settings of a student that replace the recipe's, by name.")
    alone: Overrides = Field(
        Overrides(), description="A schedule of the student alone, which --compare adds as an arm."
    )
    init: str = Field(
        "random",
        description="The weights that students start from: random; imagenet, those that torchvision or timm "
        "publish; auto, the same if they are on this machine; or a file or URL. The last layers are always random.",
    )
    batch_size: AtLeastTwo = Field(128, description="The number of images in a batch, without random images.")
    loss: list[str] = Field(
        ["ts"], min_length=1, description="The losses of the taught arms: names, or Python files; all is every loss."
    )
    match: Match = Field(
        "project",
        description="How features of different widths are compared: project gives students the teacher's width, linear "
        "and autoencoder map one width to the other during training, none leaves it to the loss.",
    )
    losses: dict[str, dict[str, Any]] = Field({}, description="The options of a loss, by its name.")
    label_smoothing: Fraction = Field(0.0, description="The label smoothing of the student alone (loss xent).")
    test_batch_size: AtLeastOne = Field(1000, description="The number of images in a batch of testing.")
    random_images: Count = Field(178, description="The number of random images added to every batch.")
    unlabelled_images: Count = Field(
        0, description="The number of images without labels added to every batch (tspipe cache --unlabelled)."
    )
    labels: Literal["dataset", "teacher"] = Field(
        "dataset", description="Whose labels students train on: teacher uses no ground truth, except for testing."
    )
    random_source: Literal["live", "pool"] = Field(
        "live",
        description="Whether random images are labelled during training or in stage one (tspipe cache --random-pool).",
    )
    random_kind: KindName = Field(
        "uniform", description="How random images are generated; tspipe list random-kinds scores each kind."
    )
    random_balanced: bool = Field(
        False, description="Keep those random images whose labels from the teacher spread evenly over the classes."
    )
    random_rounds: Annotated[int, Field(ge=2, le=256)] = Field(
        8, description="The most images that the teacher labels for each that random_balanced keeps."
    )
    random_weight: NotNegative = Field(
        1.0,
        description="How many real images a random one counts for in the mean of the loss. 1 takes one mean over both.",
    )
    random_from: AtLeastOne = Field(1, description="The first epoch with random images, counted from 1.")
    random_generator: Generator = Field("mt19937", description="The generator of random images; minstd soon repeats.")
    random_forward: Literal["concatenated", "separate"] = Field(
        "concatenated", description="Whether a student's batch norm sees real and random images as one batch."
    )
    precision: Precision = Field("float32", description="The precision of the students; weights are always float32.")
    live_precision: Precision = Field("float32", description="The precision of the live teacher.")
    compile: bool = Field(False, description="Compile students with torch.compile; this needs a C++ compiler.")
    seeds: AtLeastOne = Field(1, description="The number of seeds, counted from 0; each is a cohort.")
    mse_weight: NotNegative | Literal["auto"] = Field(
        1.0,
        description="The weight of the MSE of the loss ts; auto is 1 / the mean variance of the cached features.",
    )
    xent_weight: NotNegative = Field(1.0, description="The weight of the cross-entropy of the loss ts.")
    val_fraction: Fraction = Field(0.0, description="The share of training images held back to select an epoch.")
    tensorboard: bool = Field(False, description="Write TensorBoard curves into the run folder.")
    checkpoint_seconds: NotNegative = Field(30.0, description="The time between checkpoints in seconds.")
    device: Device = Field("auto", description="The device of stage two and of the teacher's training.")
    memory: ByteSize | None = Field(
        None, description="For images and targets, such as 2GB; none is half of the machine's."
    )
    paper: Paper | None = Field(None, description="Published results to compare with.")

    @field_validator("student", "loss", mode="before")
    @classmethod
    def _single_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("match", mode="before")
    @classmethod
    def _none_is_a_name(cls, value: Any) -> Any:
        return "none" if value is None else value  # --set match=none is read as null

    @field_validator("loss")
    @classmethod
    def _all_losses(cls, names: list[str]) -> list[str]:
        taught = [name for name in plugin_names("losses") if name != "xent"]
        return taught if names == ["all"] else names

    @field_validator("mse_weight", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value == "auto" or (is_number and 0 <= value < math.inf):
            return value
        raise ValueError("neither auto nor a number of 0 or more")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_random_images_and_views(self)
        _check_names(self)
        return self

    def loss_options(self, loss: str) -> dict[str, Any]:
        """Return the options that a loss is built with: `[losses.NAME]`, and what the recipe states for ts and xent."""
        stated: dict[str, dict[str, Any]] = {
            "ts": {"mse_weight": self.mse_weight, "xent_weight": self.xent_weight},
            "xent": {"label_smoothing": self.label_smoothing},
        }
        return {**stated.get(loss, {}), **self.stated_loss_options(loss)}

    def stated_loss_options(self, loss: str) -> dict[str, Any]:
        """Return the options of a loss in `[losses.NAME]`."""
        return self.losses.get(recorded_name("losses", loss), {})

    def student_options(self, student: str) -> dict[str, Any]:
        """Return the options that a student's network is built with."""
        return self._student(student).options

    def student_init(self, student: str) -> str:
        """Return the weights that a student starts from, as the setting `init` names them."""
        return self._student(student).init or self.init

    def optimisation(self, student: str, *, alone: bool = False) -> Optimisation:
        """Return how a student is optimised; with `alone`, `[alone]` replaces the student's settings, too."""
        overrides = self._student(student).model_dump(exclude_none=True, exclude={"init", "options"})
        overrides |= self.alone.model_dump(exclude_none=True) if alone else {}
        return Optimisation(**{**{name: getattr(self, name) for name in Optimisation.model_fields}, **overrides})

    def _student(self, name: str) -> Student:
        return self.students.get(_recorded_network(name), Student())


def _recorded_network(name: str) -> str:
    return recorded_name("models.networks", name)


def _check_random_images_and_views(recipe: Recipe) -> None:
    if recipe.view_source == "live" and not (recipe.views.shift or recipe.views.flip):
        raise ValueError("view_source=live has nothing to draw. Give a views.shift, or views.flip=true")
    if recipe.random_generator == "minstd" and (recipe.random_kind != "uniform" or recipe.random_balanced):
        raise ValueError("random_generator=minstd draws plain uniform images only; use mt19937")
    if recipe.random_from > recipe.epochs:
        raise ValueError(f"random_from={recipe.random_from} is after the last epoch, {recipe.epochs}")


def _check_names(recipe: Recipe) -> None:
    networks = {*plugin_names("models.networks"), *map(_recorded_network, recipe.student)}
    losses = {*plugin_names("losses"), *(recorded_name("losses", name) for name in recipe.loss)}
    for kind, names, known in (("student", recipe.students, networks), ("loss", recipe.losses, losses)):
        for name in names:
            if name not in known and not (kind == "student" and name.startswith(LIBRARIES)):
                raise ValueError(unknown(kind, name, known))
