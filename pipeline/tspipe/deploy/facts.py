"""What the metadata of a student's file say, checked before anything is built from it."""

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, Json, JsonValue, ValidationError, model_validator

from tspipe.data.preprocess import Preprocess
from tspipe.errors import NetworkError

_MAX_SIDE = 8192  # pixels
_Channels = Annotated[int, Field(ge=1, le=1024)]
_Side = Annotated[int, Field(ge=1, le=_MAX_SIDE)]


class StudentFacts(BaseModel):
    """The metadata of a student's file.

    Attributes:
        arm: how it was trained: alone, taught, taught + random.
        cache: the id of the cache it was trained from, 64 hex digits.
        classes: the class names.
        input_shape: (C, H, W) of an image after `preprocess`.
        network: the network's name; `mine` for a user's `./mine.py`.
        options: the network's own options.
        width: the number of the teacher's features.
    """

    model_config = ConfigDict(frozen=True)

    arm: str
    cache: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    classes: Json[Annotated[list[str], Field(min_length=1)]]
    input_shape: Json[tuple[_Channels, _Side, _Side]]
    network: Annotated[str, Field(min_length=1)]
    options: Json[dict[str, JsonValue]]
    preprocess: Json[Preprocess]
    width: Annotated[int, Field(ge=1)]

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


def parse(metadata: Mapping[str, str], source: str) -> StudentFacts:
    """Return the facts in a file's metadata. Raises NetworkError, which names `source`, if they are not a student's."""
    try:
        return StudentFacts.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"].lower()
        raise NetworkError(
            f"{source} is not a student of tspipe's: {f'its metadata, {field}: ' if field else ''}{reason}. "
            "Students are the files student-*.safetensors in a run folder."
        ) from None
