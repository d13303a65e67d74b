"""What one source of settings gives: values, each with where it came from, and what is wrong with them there."""

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
    """What one source gives by dotted name, and what is wrong with it there.

    `by_user` is whether it is what the user wrote, and not from a preset or the platform.
    """

    given: dict[str, GivenValue] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    by_user: bool = True
