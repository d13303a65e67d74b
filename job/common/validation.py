"""Data from outside by pydantic: its readers, each made once, and what was found wrong as one line."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from job.common.formatting import first_line

T = TypeVar("T")

MAX_CHARACTERS = 200


def adapter_of(kind: type[T]) -> TypeAdapter[T]:
    """What reads and writes `kind`. Made once, since making it takes up to 30 ms for a large record."""
    return _adapter_of(kind)  # type: ignore[arg-type]  # mypy does not take a type[T] for hashable


@cache
def _adapter_of(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def first_error(error: ValueError, most: int = MAX_CHARACTERS) -> str:
    """The first problem, in at most `most` characters: `a.b: message`, without a quotation from the data."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}{place and ': '}{first['msg']}"[:most]
    return first_line(error, most)
