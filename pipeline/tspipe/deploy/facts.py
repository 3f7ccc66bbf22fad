"""What the metadata of a student's file, or of an export, say; checked before anything is built from it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Json, JsonValue, ValidationError, model_validator

from tspipe.data.preprocess import Preprocess
from tspipe.errors import NetworkError

_MAX_SIDE = 2048  # pixels; a file may claim any size, and a probe of that size is run when it is loaded
NO_CHECKSUM = "0" * 64  # takes the checksum's place in the bytes that it is computed from
_NETWORK = r"^([\w.+-]+(:[\w.+-]+)?|hub:[\w.-]+/[\w.-]+@[0-9a-f]{40}:\w+)$"  # a name, never a path
_Channels = Annotated[int, Field(ge=1, le=1024)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Side = Annotated[int, Field(ge=1, le=_MAX_SIDE)]


class Facts(BaseModel):
    """What students and exports have in common.

    Attributes:
        cache: the id of the cache that the student was trained from, 64 hex digits.
        classes: the class names.
        dataset, dataset_license, teacher: names for people; empty in files of older versions.
        input_shape: (C, H, W) of an image after `preprocess`.
        native_width: whether the student keeps its network's last layers, without g(x).
        network: the network's name; `mine` for a user's `./mine.py`.
        options: the network's own options.
        arm: how it was trained: alone, taught, taught + random; empty in exports of older versions.
        labels: whose labels it was trained on.
        test_accuracy: its accuracy on the test split; None for an int8 export.
    """

    model_config = ConfigDict(frozen=True)

    cache: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    classes: Json[Annotated[list[str], Field(min_length=1)]]
    dataset: str = ""
    dataset_license: str = ""
    teacher: str = ""
    arm: str = ""
    labels: Literal["dataset", "teacher"] = "dataset"
    test_accuracy: _Fraction | None = None
    input_shape: Json[tuple[_Channels, _Side, _Side]]
    preprocess: Json[Preprocess]
    native_width: Json[bool] = False
    network: Annotated[str, Field(pattern=_NETWORK)]
    options: Json[dict[str, JsonValue]]

    @model_validator(mode="after")
    def _check_preprocess(self) -> Self:
        channels, *size = self.input_shape
        preprocess = self.preprocess
        final = [preprocess.crop] * 2 if preprocess.crop else list(preprocess.resize or size)
        if preprocess.channels != channels or final != size or max(preprocess.resize or size) > _MAX_SIDE:
            raise ValueError(f"preprocess does not yield images of {channels}×{size[0]}×{size[1]}")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class name occurs twice")
        return self


class StudentFacts(Facts):
    """The metadata of a student's file.

    Attributes:
        epoch, epochs: the epoch of its weights, from 1, and how many it was trained for.
        selected: why this epoch: the last one, or the best on held-back images (validation) or on the test split.
        test_accuracy, val_accuracy: its accuracy on the test split and on held-back training images.
        width: the number of its features, by default the teacher's.
    """

    arm: str
    epoch: Annotated[int, Field(ge=1)]
    epochs: Annotated[int, Field(ge=1)]
    selected: Literal["last", "validation", "test"]
    test_accuracy: _Fraction
    val_accuracy: _Fraction | None = None
    width: Annotated[int, Field(ge=1)]

    @property
    def accuracy(self) -> float:
        """The accuracy that students are compared by: on held-back images if there are any, else on the test split."""
        return self.test_accuracy if self.val_accuracy is None else self.val_accuracy

    def describe_epoch(self) -> str:
        """Return which epoch the weights are of, why, and how accurate they are."""
        by = "test accuracy" if self.selected == "test" else "accuracy on held-back images"
        best = "" if self.selected == "last" else f", the best by {by}"
        return f"epoch {self.epoch} of {self.epochs}{best}, {100 * self.test_accuracy:.2f} % on the test split"


class ExportFacts(Facts):
    """The metadata of an export.

    Attributes:
        name: the student's.
        output: probabilities if the file takes bytes (`--uint8`), else logits.
        checksum: the SHA-256 of the file with zeros in its place; empty in `.pt2` archives, which have their own.
        constants: the tensors in a safetensors file that are the program's, and not in the network's state dict.
    """

    name: str
    output: Literal["logits", "probabilities"]
    checksum: str = ""
    constants: Json[list[str]] = []


def insert_checksum(data: bytes) -> bytes:
    """Return an export with its checksum in place of `NO_CHECKSUM` in its metadata."""
    return data.replace(NO_CHECKSUM.encode(), hashlib.sha256(data).hexdigest().encode())


def check_unchanged(facts: ExportFacts, data: bytes, path: Path) -> None:
    """Raise NetworkError if the bytes of an export have changed since it was written."""
    checksum = facts.checksum.encode()
    if checksum and hashlib.sha256(data.replace(checksum, NO_CHECKSUM.encode())).hexdigest().encode() != checksum:
        raise NetworkError(
            f"{path} has changed since tspipe wrote it: it is damaged, or another program has edited it. Export the "
            "student again."
        )


_KINDS: dict[type[Facts], str] = {StudentFacts: "a student of tspipe's", ExportFacts: "an export of tspipe's"}
AnyFacts = TypeVar("AnyFacts", bound=Facts)


def parse(kind: type[AnyFacts], metadata: Mapping[str, str], source: str) -> AnyFacts:
    """Return the facts in a file's metadata. Raises NetworkError, which names `source`, if they are not such facts."""
    try:
        return kind.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"].lower()
        raise NetworkError(
            f"{source} is not {_KINDS[kind]}: {f'its metadata, {field}: ' if field else ''}{reason}. "
            "Students are the files student-*.safetensors in a run folder, and what tspipe export makes of them."
        ) from None
