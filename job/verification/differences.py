"""The result of a check, and the comparison of the values in a record with those recomputed or read elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Another version of scipy or another processor may give slightly different digits. Relative, because p values can be
# arbitrarily small.
TOLERANCE = 1e-7
MAX_SHOWN = 120
"""Characters of a value or a message that are printed."""
Copies = Mapping[str, Path]
"""Path in the run's folder -> the downloaded copy, of files that agree with the manifest."""


@dataclass(frozen=True)
class Difference:
    """One value or file that differs from what a record of the run says.

    Attributes:
        where: The file, and the path of the value in it.
        claimed: What the record says.
        found: What was recomputed or read.
    """

    where: str
    claimed: str
    found: str

    def __str__(self) -> str:
        return f"{self.where}: claimed {self.claimed}, found {self.found}"


@dataclass(frozen=True)
class CheckResult:
    """One check: what was checked, on how many items, all differences, and notes, which do not fail the check."""

    what: str
    extent: str
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()


def find_differences(where: str, claimed: Any, computed: Any) -> Iterator[Difference]:
    """Every leaf in which two JSON-able values differ; floats may differ in the last digits.

    Args:
        where: File of the claim, and its path there; the path to the leaf is appended.
        claimed: The value in the file.
        computed: The value computed or read elsewhere.
    """
    if isinstance(claimed, Mapping) and isinstance(computed, Mapping):
        for key in dict.fromkeys([*claimed, *computed]):
            leaf_where = f"{where}{'.' if ' ' in where else ' '}{key}"
            if key not in computed:
                yield Difference(leaf_where, show(claimed[key]), "nothing")
            elif key not in claimed:
                yield Difference(leaf_where, "nothing", show(computed[key]))
            else:
                yield from find_differences(leaf_where, claimed[key], computed[key])
    elif isinstance(claimed, list | tuple) and isinstance(computed, list | tuple) and len(claimed) == len(computed):
        for number, pair in enumerate(zip(claimed, computed, strict=True)):
            yield from find_differences(f"{where}[{number}]", *pair)
    elif not _same(claimed, computed):
        yield Difference(where, show(claimed), show(computed))


def _same(claimed: Any, computed: Any) -> bool:
    if bool in (kinds := {type(claimed), type(computed)}) or not kinds <= {int, float}:
        return len(kinds) == 1 and bool(claimed == computed)
    try:
        return math.isclose(claimed, computed, rel_tol=TOLERANCE) if float in kinds else bool(claimed == computed)
    except OverflowError:  # a whole number beyond all floats
        return False


def show(value: Any) -> str:
    """A value as ASCII JSON, cut off after `MAX_SHOWN` characters."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def other_run(where: str, recorded_run: str | None, run: str | None) -> Iterator[Difference]:
    """A difference if a record belongs to another run.

    Args:
        where: The record.
        recorded_run: The run's fingerprint in the record; None in records of earlier versions.
        run: This run's fingerprint; None if it is not known.
    """
    if recorded_run and run is not None and recorded_run != run:
        yield Difference(where, f"a record of the run {run}", f"a record of the run {recorded_run}")
