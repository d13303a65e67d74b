"""Bad rows: named together in one error, or left out and counted by kind (JOB_DATA__ON_BAD_ROW)."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from job.common.bad_row_reasons import by_reason
from job.data.formats import TO_UTF8, UNREADABLE, RowError
from job.errors import MAX_SHOWN, DataError, Problem

OnBadRow = Literal["error", "skip"]
_SKIPPING = "correct the {rows}, or set JOB_DATA__ON_BAD_ROW=skip{after} to skip and count invalid rows"
_LONG = "raise JOB_TRAIN__MAX_LENGTH, or set JOB_DATA__ON_LONG_ROW to skip, truncate or split long rows"
_ADVICE = {"too_long": _LONG, "broken_utf8": TO_UTF8, UNREADABLE: ""}
"""Kind -> its own advice. Skipping is the advice for the other kinds, which are mistakes in single rows."""

FIELDS_SETTING = "JOB_DATA__FIELDS="
"""A missing field with this in its message is under another name, perhaps in all rows, none of which is to skip."""


class BadRows:
    """Collects what is wrong: problems that are raised together, or, if bad rows are skipped, their number by kind."""

    def __init__(self, on_bad_row: OnBadRow, *, skip_long: bool = False) -> None:
        self.skipped: Counter[str] = Counter()
        self._skip_long = skip_long
        self._skip = on_bad_row == "skip"
        self._problems: list[Problem] = []
        self._total = 0
        self._kinds: Counter[str] = Counter()
        self._fixes: set[str] = set()

    def add(self, faults: list[RowError]) -> None:
        """Adds the faults of one row, at least one."""
        skip = self._skip or (self._skip_long and faults[0].kind == "too_long")
        if skip and faults[0].kind != UNREADABLE:
            self.skipped[faults[0].kind] += 1
            return
        self._total += len(faults)
        self._kinds.update(fault.kind for fault in faults)
        # Text that another encoding of the file would not correct says itself what would, as does a field's other name.
        self._fixes |= {
            one.kind
            for one in faults
            if (one.kind != "broken_utf8" or "; " not in one.what) and FIELDS_SETTING not in one.what
        }
        remaining = MAX_SHOWN - len(self._problems)
        self._problems += [Problem(fault.where, fault.what) for fault in faults[:remaining]]

    def add_problem(self, where: str, message: str) -> None:
        """Adds what is wrong with a source as a whole, which cannot be skipped."""
        self._total += 1
        self._problems.append(Problem(where, message))

    @property
    def found(self) -> bool:
        """Whether there is a problem."""
        return bool(self._problems)

    def raise_problems(self, name: str) -> None:
        """Raises the problems, if there are any, all in one error, with the advice of each kind that occurs.

        `name` is what the source is called where their number by kind is said, since not all of them are shown.
        """
        if not self._problems:
            return
        advice = [text for fix, text in _ADVICE.items() if text and fix in self._fixes]
        if self._fixes - _ADVICE.keys():
            # A file in another encoding would lose all its rows with an accent.
            after = " once the file is UTF-8," if "broken_utf8" in self._fixes else ""
            advice.append(_SKIPPING.format(rows="other rows" if advice else "rows", after=after))
        if self._total > MAX_SHOWN:
            kinds = "; ".join(f"{count:,}: {why}" for why, count in by_reason(self._kinds).items())
            advice.insert(0, f"problems of {name} by kind: {kinds}")
        raise DataError(self._problems, self._total, "\n".join(advice))

    def nothing_left(self, name: str) -> DataError:
        """The error that no row was selected, and why."""
        skipped = "; ".join(f"{count}: {why}" for why, count in by_reason(self.skipped).items())
        return DataError([Problem(name, f"has no valid row (skipped {skipped})" if skipped else "has no rows")])
