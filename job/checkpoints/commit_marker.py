"""The commit marker of a checkpoint, `COMMITTED.json`: which files it has, with sizes and SHA-256, and who wrote them.

It is written last. Nothing in it is trusted when it is read: anybody may have written it. How it is used:
`checkpoint_store`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from job.common.hashing import seal, sealed
from job.runs.layout import checkpoint_folder
from job.storage.open import check_key

MAX_MARKER_BYTES = 256 * 1024
_MAX_CHARACTERS = 200
"""Characters of a name or a reason that an error repeats, and of a run's fingerprint."""


def _plain_name(name: str) -> str:
    """Returns `name` if it names a file directly in its folder, and does not begin with a dot.

    Raises:
        ValueError: It leads elsewhere.
    """
    if "/" in name or name.startswith("."):
        raise ValueError(f"{name[:_MAX_CHARACTERS]!r} is not the name of a file in the checkpoint's folder")
    return check_key(name)


class MarkedFile(BaseModel):
    """What a file of the checkpoint must be."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Marker(BaseModel):
    """The content of a commit marker. `epoch` is the lease's: which attempt wrote it.

    `run` is the fingerprint of the settings, data and weights that it was trained with; None in markers of earlier
    versions.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    step: int = Field(ge=0)
    epoch: int = Field(ge=0, lt=10**9)
    world_size: int = Field(ge=1)
    software: dict[str, str]
    files: dict[Annotated[str, AfterValidator(_plain_name)], MarkedFile] = Field(min_length=1, max_length=100)
    run: str | None = Field(default=None, max_length=_MAX_CHARACTERS)

    @property
    def folder(self) -> str:
        """The folder of the files that it lists; a prefix of keys."""
        return checkpoint_folder(self.step, self.epoch)


def render_marker(marker: Marker) -> bytes:
    """The marker as JSON, sealed with a hash of its own content."""
    return sealed(marker.model_dump())


def parse_marker(data: bytes) -> Marker:
    """The inverse of `render_marker`; the bytes may come from anybody.

    Raises:
        ValueError: It is no marker, it names files outside its folder, or it was altered.
    """
    try:
        facts = dict(from_json(data))
        claimed = facts.pop("seal", None)
        marker = Marker.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ValueError(f"the marker is malformed: {first['msg'][:_MAX_CHARACTERS]}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"the marker is malformed: {str(error)[:_MAX_CHARACTERS]}") from None
    if claimed != seal(facts):
        raise ValueError("the marker was altered: its seal does not match its content")
    return marker
