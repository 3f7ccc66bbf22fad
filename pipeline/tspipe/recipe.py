"""A recipe: dataset, preprocess, teacher, students and hyper-parameters, read from TOML.

`recipes/<dataset>.toml` is the recipe of a dataset; every field can be overridden with `--set field.name=value`.
"""

import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from tspipe.errors import DatasetError, RecipeError
from tspipe.plugins import is_file, stated_name, unknown
from tspipe.plugins import names as plugin_names
from tspipe.preprocess import Preprocess
from tspipe.random_images import Generator

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


class Views(Section):
    """Views of the training images, moved and mirrored: stored by stage one, replayed by stage two."""

    count: int = Field(0, ge=0, le=2**16, description="views of an image, the plain one among them; 0: no views")
    shift: int = Field(4, ge=0, le=2**14, description="they move by up to so many pixels each way")
    flip: bool = Field(True, description="they are mirrored at random")

    @model_validator(mode="after")
    def _something_to_draw(self) -> Self:
        if self.count == 1 or (self.count and not self.shift and not self.flip):
            raise ValueError(
                "there is nothing to draw, since the first view is the plain image. Give a count of 2 or more "
                "(0: no views), and a shift, or flip=true"
            )
        return self


class Compute(Section):
    """How stage one computes; the cache's bytes depend on it."""

    batch_size: int = Field(64, ge=1)
    block_rows: int = Field(256, ge=1, description="images of a block; a kill loses three blocks at most")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


class Own(Section):
    """What differs from the recipe's optimisation; None means as there."""

    optimizer: Literal["adam", "sgd"] | None = None
    lr: float | None = Field(None, gt=0)
    lr_drop_every: int | None = Field(None, ge=1)
    lr_drop_factor: float | None = Field(None, gt=0, le=1)
    lr_milestones: list[int] | None = None
    momentum: float | None = Field(None, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0)


class Student(Own):
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
    alone: Own = Field(Own(), description="of the student alone, which --compare then trains in this way, too")
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
        known = {*plugin_names("networks"), *map(_stated, self.student)}
        for name in self.students:
            if name not in known and not name.startswith("torchvision:"):
                raise ValueError(unknown("student", name, known))
        return self

    @model_validator(mode="after")
    def _known_losses(self) -> Self:
        known = {*plugin_names("losses"), *(stated_name("losses", name) for name in self.loss)}
        for name in self.losses:
            if name not in known:
                raise ValueError(unknown("loss", name, known))
        return self

    def loss_options(self, loss: str) -> dict[str, Any]:
        """The options this loss is built with."""
        return self.losses.get(stated_name("losses", loss), {})

    def student_options(self, student: str) -> dict[str, Any]:
        """The options this student's network is built with."""
        return self.students.get(_stated(student), Student()).options

    def optimisation(self, student: str, *, alone: bool = False) -> Optimisation:
        """How this student is fitted; `alone` in the way of its own that the student alone may have."""
        own = self.students.get(_stated(student), Student()).model_dump(exclude_none=True, exclude={"options"})
        own |= self.alone.model_dump(exclude_none=True) if alone else {}
        return Optimisation(**{name: own.get(name, getattr(self, name)) for name in Optimisation.model_fields})


def _stated(network: str) -> str:
    return stated_name("networks", network)


def names() -> list[str]:
    """The recipes that come with tspipe."""
    folder = resources.files("tspipe") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def of_dataset(spec: str) -> str:
    """The recipe a dataset has when none is named: that of its name.

    Raises DatasetError for an unknown dataset, RecipeError for one without a recipe.
    """
    name = Path(spec.partition(":")[0]).stem
    if not is_file(spec) and name not in (known := plugin_names("datasets")):
        raise DatasetError(unknown("dataset", name, known))
    if name not in names():
        raise RecipeError(
            f"There is no recipe for {name}. Name one with --recipe: {', '.join(names())}, or a TOML file."
        )
    return name


def load(
    name: str,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> Recipe:
    """The recipe of this name, or at this path (`mine.toml`), with overrides applied on top.

    A recipe may say upon which `base` it is laid: fields that it does not state are those of the base. One that states
    neither that nor a dataset, as `strong`, is laid upon the recipe of the dataset that is asked for.

    Args:
        name: one of `names()`, or the path of a TOML file; of several, between commas, each is laid upon those before.
        facts: fields by section that the weights or the cache state themselves; they go before the recipe, and
            after overrides and flags.
        overrides: `field.name=value` texts, as given with `--set`; a value is read as JSON where it is JSON.
        flags: values of command-line flags by dotted field name; those that are None leave the recipe's.

    Raises RecipeError in one sentence: unknown field (the nearest named), wrong type, out of range.
    """
    asked = [(path, value) for path, value in (flags or {}).items() if value is not None]
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"--set {override}: write it as field=value, for example --set lr=0.01")
        asked.append((path.strip(), _value(value.strip())))
    fields = _fields(name, dict(asked).get("dataset"))
    for section, stated in (facts or {}).items():
        fields[section] = {**fields.get(section, {}), **stated}
    for path, value in asked:
        _put(fields, path, value)
    try:
        return Recipe(**fields)
    except ValidationError as problem:
        raise RecipeError(_sentence(problem, name)) from None


def _fields(name: str, dataset: str | None, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """What recipes say, each laid upon those before it and the first upon its base; `above`: whose base this is."""
    fields: dict[str, Any] = {}
    for part in name.split(","):
        try:
            own = tomllib.loads(_text(part))
        except tomllib.TOMLDecodeError as problem:
            raise RecipeError(f"The recipe {part} is not TOML: {problem}.") from None
        base = own.pop("base", None)
        if not fields and base is None and dataset and "dataset" not in own:
            base = of_dataset(dataset)
        if not isinstance(base, str | None):
            raise RecipeError(f"The recipe {part} has a base that is no name: {base!r}.")
        if base in (*above, part):
            raise RecipeError(f"The recipe {part} is its own base.")
        fields = _laid_upon(_fields(base, None, (*above, part)) if base else fields, own)
    return fields


def _laid_upon(fields: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with others in their place, section by section; an empty section empties it."""
    laid = dict(fields)
    for name, value in others.items():
        sections = isinstance(value, dict) and isinstance(laid.get(name), dict)
        laid[name] = _laid_upon(laid[name], value) if sections and value else value
    return laid


def _text(name: str) -> str:
    try:
        if name.endswith(".toml"):
            return Path(name).read_text(encoding="utf-8")
        if name in names():
            return (resources.files("tspipe") / "recipes" / f"{name}.toml").read_text()
    except (OSError, UnicodeDecodeError) as problem:
        raise RecipeError(
            f"The recipe {name} cannot be read: {getattr(problem, 'strerror', 'not UTF-8')}."
        ) from problem
    raise RecipeError(unknown("recipe", name, names()))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def _put(fields: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise RecipeError(f"--set {path}: {section!r} is a single value, not a section.")
    fields[last] = value


def _sentence(problem: ValidationError, name: str) -> str:
    first = problem.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(str(first["loc"][-1]), _known_fields(), n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"The recipe {name} has no field {where!r}.{hint}"
    if first["type"] == "missing":
        return f"The recipe {name} lacks the field {where!r}."
    if first["type"] == "value_error":
        return f"The recipe {name}: {f'{where}: ' if where else ''}{str(first['ctx']['error']).rstrip('.')}."
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"The recipe {name}: {where} cannot be {json.dumps(first['input'], default=str)}: {message}."


def _known_fields() -> list[str]:
    sections = (Recipe, Teacher, Features, Compute, Views, Student)
    return [*(field for section in sections for field in section.model_fields), *Preprocess.__dataclass_fields__]
