"""Commit markers: what a checkpoint's `COMMITTED.json` says, and how it is read as if an enemy had written it."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from job.common.hashing import seal, sealed
from job.storage.open import check_key

NAME = "COMMITTED.json"
MAX_BYTES = 256 * 1024
_MAX_WORDS = 200


def _plain_name(name: str) -> str:
    """Returns `name` if it is a visible file's, directly in its folder.

    Raises:
        ValueError: It leads elsewhere.
    """
    if "/" in name or name.startswith("."):
        raise ValueError(f"{name[:_MAX_WORDS]!r} is not the name of a file in the checkpoint's folder")
    return check_key(name)


class MarkedFile(BaseModel):
    """What a file of the checkpoint must be."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Marker(BaseModel):
    """The content of a commit marker. `epoch` is the lease's: which attempt wrote it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    step: int = Field(ge=0)
    epoch: int = Field(ge=0, lt=10**9)
    world_size: int = Field(ge=1)
    software: dict[str, str]
    files: dict[Annotated[str, AfterValidator(_plain_name)], MarkedFile] = Field(min_length=1, max_length=100)


def step_prefix(step: int) -> str:
    """Where the marker of a step lies, and below it the files of every attempt at it."""
    return f"checkpoints/step-{step:08d}/"


def epoch_prefix(epoch: int) -> str:
    """Below a step's: where an attempt's files lie."""
    return f"{epoch:04d}/"


def files_prefix(marker: Marker) -> str:
    """Where the files lie that a marker vouches for."""
    return step_prefix(marker.step) + epoch_prefix(marker.epoch)


def render(marker: Marker) -> bytes:
    """The marker as JSON, sealed with a hash of its own content."""
    return sealed(marker.model_dump())


def parse(data: bytes) -> Marker:
    """The inverse of `render`.

    Raises:
        ValueError: It is no marker, it names files outside its folder, or it was altered.
    """
    try:
        facts = dict(from_json(data))
        claimed = facts.pop("seal", None)
        marker = Marker.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ValueError(f"the marker is malformed: {first['msg'][:_MAX_WORDS]}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"the marker is malformed: {str(error)[:_MAX_WORDS]}") from None
    if claimed != seal(facts):
        raise ValueError("the marker was altered: its seal is not that of its content")
    return marker
