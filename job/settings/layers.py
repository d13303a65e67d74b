"""A layer of settings: what one place gives, each value with where it came from; and how files of settings are read."""

from __future__ import annotations

from dataclasses import dataclass, field

from job.errors import Problem


@dataclass(frozen=True)
class GivenValue:
    """A raw value and where it was given, in words."""

    value: object
    source: str


@dataclass(frozen=True)
class Layer:
    """What one place gives, and what is wrong with it there."""

    given: dict[str, GivenValue] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
