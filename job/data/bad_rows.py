"""Bad rows: named together in one error, or left out and counted by kind (JOB_DATA__ON_BAD_ROW)."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from job.common.bad_row_reasons import by_reason
from job.data.formats import UNREADABLE, RowError
from job.errors import MAX_SHOWN, DataError, Problem

OnBadRow = Literal["error", "skip"]
_SKIPPING = "correct the rows, or set JOB_DATA__ON_BAD_ROW=skip to skip and count invalid rows"
_LONG = "raise JOB_TRAIN__MAX_LENGTH, or set JOB_DATA__ON_LONG_ROW to skip, truncate or split long rows"


class BadRows:
    """Collects what is wrong: problems that are raised together, or, if bad rows are skipped, their number by kind."""

    def __init__(self, on_bad_row: OnBadRow, *, skip_long: bool = False) -> None:
        self.skipped: Counter[str] = Counter()
        self._skip_long = skip_long
        self._skip = on_bad_row == "skip"
        self._problems: list[Problem] = []
        self._total = 0
        self._kinds: set[str] = set()

    def add(self, faults: list[RowError]) -> None:
        """Adds the faults of one row, at least one."""
        skip = self._skip or (self._skip_long and faults[0].kind == "too_long")
        if skip and faults[0].kind != UNREADABLE:
            self.skipped[faults[0].kind] += 1
            return
        self._total += len(faults)
        self._kinds |= {fault.kind for fault in faults}
        remaining = MAX_SHOWN - len(self._problems)
        self._problems += [Problem(fault.where, fault.what) for fault in faults[:remaining]]

    def add_problem(self, where: str, what: str) -> None:
        """Adds what is wrong with a source as a whole, which cannot be skipped."""
        self._total += 1
        self._problems.append(Problem(where, what))

    @property
    def found(self) -> bool:
        """Whether there is a problem."""
        return bool(self._problems)

    def raise_problems(self) -> None:
        """Raises the problems, if there are any, all in one error."""
        if self._problems:
            skippable = self._kinds - {UNREADABLE}
            advice = _LONG if skippable == {"too_long"} else _SKIPPING if skippable else ""
            raise DataError(self._problems, self._total, advice)

    def nothing_left(self, name: str) -> DataError:
        """The error that no row was selected, and why."""
        skipped = "; ".join(f"{count}: {why}" for why, count in by_reason(self.skipped).items())
        return DataError([Problem(name, f"has no valid row (skipped {skipped})" if skipped else "has no rows")])
