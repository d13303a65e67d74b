"""Markers: metadata of a setting beside its type and default, on the fields in `schema`.

A marker is metadata of the field (`Annotated`); pydantic ignores it, and `find_markers` finds it. On the field of a
group, such as `Settings.storage`, it holds for every setting of the group.
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
    """Whether the setting decides what the run computes, or only how the computation is carried out."""

    affects_result: bool


AffectsResult = Annotated[T, ResultEffect(affects_result=True)]
"""The setting decides the result: a run that is resumed must have the same value."""
ExecutionOnly = Annotated[T, ResultEffect(affects_result=False)]
"""The setting decides how the run is carried out, never what it computes: attempts of a run may differ in it."""


@dataclass(frozen=True)
class BelongsTo:
    """A preset's value of this setting applies only to the preset's own `subject`, and is dropped if that is changed.

    Values that users set, in whatever source, are never dropped.
    """

    subject: str


@dataclass(frozen=True)
class RevisionOf:
    """The setting is a revision of the hub repository that `subject` names, and invalid for any other."""

    subject: str


@dataclass(frozen=True)
class SameInAllProcesses:
    """Processes that have different values would wait for each other without end, although the result is the same."""


@dataclass(frozen=True)
class SageMakerChannel:
    """The setting may come as the SageMaker input channel of this name."""

    name: str


@dataclass(frozen=True)
class UsedByReaders:
    """The commands that only read published runs (verify, compare, report) use this setting."""


Marker = TypeVar("Marker", ResultEffect, BelongsTo, RevisionOf, SameInAllProcesses, SageMakerChannel, UsedByReaders)


def find_markers(settings: type[BaseModel], kind: type[Marker]) -> dict[str, Marker]:
    """Dotted name of each setting that has a marker of this kind -> the marker; a field's own before its group's."""
    return {
        name: marker
        for name, fields in _fields(settings)
        for marker in [next((found for field in fields for found in field.metadata if isinstance(found, kind)), None)]
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
