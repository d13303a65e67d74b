"""What a check of published results came to, and how claimed and found values are held against each other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Another version of scipy or another processor may end an iteration elsewhere, in digits that nobody reads. Relative,
# because a p value may be as small as it likes.
TOLERANCE = 1e-7
MAX_SHOWN = 120
"""Characters of a value or a message that are printed."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as claimed: the file, and the place in it where there is one."""

    where: str
    claimed: str
    found: str

    def __str__(self) -> str:
        return f"{self.where}: claimed {self.claimed}, found {self.found}"


@dataclass(frozen=True)
class CheckResult:
    """One line of the outcome: what was checked, on how much, what differs, and what is worth knowing beside that."""

    what: str
    extent: str
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()


def find_differences(where: str, claimed: Any, found: Any) -> Iterator[Difference]:
    """Every leaf in which two JSON-able values differ; floats may differ in the last digits.

    Args:
        where: Place of the claim, to which the way to the leaf is added.
        claimed: What a file says.
        found: What it should say.
    """
    if isinstance(claimed, Mapping) and isinstance(found, Mapping):
        for key in dict.fromkeys([*claimed, *found]):
            place = f"{where}{'.' if ' ' in where else ' '}{key}"
            if key not in found:
                yield Difference(place, show(claimed[key]), "nothing")
            elif key not in claimed:
                yield Difference(place, "nothing", show(found[key]))
            else:
                yield from find_differences(place, claimed[key], found[key])
    elif isinstance(claimed, list | tuple) and isinstance(found, list | tuple) and len(claimed) == len(found):
        for number, pair in enumerate(zip(claimed, found, strict=True)):
            yield from find_differences(f"{where}[{number}]", *pair)
    elif not _same(claimed, found):
        yield Difference(where, show(claimed), show(found))


def _same(claimed: Any, found: Any) -> bool:
    if bool in (kinds := {type(claimed), type(found)}) or not kinds <= {int, float}:
        return len(kinds) == 1 and bool(claimed == found)
    try:
        return math.isclose(claimed, found, rel_tol=TOLERANCE) if float in kinds else bool(claimed == found)
    except OverflowError:  # a whole number beyond all floats
        return False


def show(value: Any) -> str:
    """A value as it is printed: in ASCII, whatever it holds, and not too long."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
