"""`Layer`: the values that one source of settings has, and the problems in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from job.errors import Problem


@dataclass(frozen=True)
class GivenValue:
    """A raw value, and the source it comes from, in words for messages."""

    value: object
    source: str


@dataclass(frozen=True)
class Layer:
    """The values of one source by dotted name, and the problems in it.

    `by_user`: whether the user wrote the values; false for presets and the platform's defaults.
    """

    given: dict[str, GivenValue] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    by_user: bool = True
