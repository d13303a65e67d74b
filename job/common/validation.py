"""What pydantic found wrong with data from outside, as one line."""

from __future__ import annotations

from pydantic import ValidationError

MAX_CHARACTERS = 200


def first_error(error: ValueError, most: int = MAX_CHARACTERS) -> str:
    """The first problem, in at most `most` characters: `a.b: message`, without a quotation from the data."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}{place and ': '}{first['msg']}"[:most]
    return (str(error).splitlines() or [type(error).__name__])[0][:most]
