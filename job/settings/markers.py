"""Markers: what a field in `schema` says about a setting besides its type, default and documentation.

A marker is metadata of the field (`Annotated`), which pydantic ignores and `find_markers` reads. On the field of a
group, such as `Settings.storage`, it applies to every setting of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

T = TypeVar("T")


@dataclass(frozen=True)
class ResultEffect:
    """Whether the setting affects what the run computes, or only how the computation is carried out."""

    affects_result: bool


AffectsResult = Annotated[T, ResultEffect(affects_result=True)]
"""The setting affects the result: an attempt that resumes a run must have the same value."""
ExecutionOnly = Annotated[T, ResultEffect(affects_result=False)]
"""The setting affects how the run is carried out, never what it computes: attempts of a run may differ in it."""


@dataclass(frozen=True)
class BelongsTo:
    """A preset's value of this setting is dropped if the setting `subject` has another value than in the preset.

    Values that users set, in any source, are never dropped.
    """

    subject: str


@dataclass(frozen=True)
class RevisionOf:
    """The setting is a revision of the hub repository in the setting `subject`; invalid if that is a path or URI."""

    subject: str


@dataclass(frozen=True)
class SameInAllProcesses:
    """The setting must be equal in all processes of a run, although it does not affect the result.

    With different values, the processes would wait for each other forever.
    """


@dataclass(frozen=True)
class SageMakerChannel:
    """The SageMaker input channel of this name sets the setting."""

    name: str


@dataclass(frozen=True)
class UsedByReaders:
    """The commands that only read published runs (verify, compare, report) use this setting."""


Marker = TypeVar("Marker", ResultEffect, BelongsTo, RevisionOf, SameInAllProcesses, SageMakerChannel, UsedByReaders)


def find_markers(settings: type[BaseModel], kind: type[Marker]) -> dict[str, Marker]:
    """Dotted name of each setting that has a marker of this kind -> the marker.

    A marker on the field replaces one on its group.
    """
    return {
        name: marker
        for name, fields in _fields(settings)
        for marker in [next((item for field in fields for item in field.metadata if isinstance(item, kind)), None)]
        if marker is not None
    }


def setting_names(settings: type[BaseModel]) -> tuple[str, ...]:
    """The dotted names of all settings, in their order."""
    return tuple(name for name, _ in _fields(settings))


def _fields(settings: type[BaseModel]) -> Iterator[tuple[str, tuple[FieldInfo, ...]]]:
    """(dotted name, its field and its group's field) of each setting."""
    for group, outer in settings.model_fields.items():
        if isinstance(outer.annotation, type) and issubclass(outer.annotation, BaseModel):
            yield from ((f"{group}.{name}", (field, outer)) for name, field in outer.annotation.model_fields.items())
        else:
            yield group, (outer,)
