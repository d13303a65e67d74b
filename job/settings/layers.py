"""`Layer`: what one source of settings gives: values with their origin, and the problems found in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from job.errors import Problem


@dataclass(frozen=True)
class GivenValue:
    """A raw value, and a description of where it was given."""

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
