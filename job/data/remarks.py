"""Remarks on valid rows, such as words for missing values: counted over all rows, and logged once for each kind.

To add a kind: enter it in `KINDS`, and detect it in `row_encoder`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from job.data.notes import Level, Notes
from job.errors import MAX_SHOWN

MISSING = frozenset(
    (
        *("NA", "N/A", "n/a", "#NA", "#N/A", "#N/A N/A", "<NA>", "NaN", "nan", "-NaN", "-nan", "NaT"),
        *("null", "NULL", "Null", "None", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
    )
)
"""Words that pandas reads as missing values (`na_values`), and those that `str` makes of missing values."""


class Remark(NamedTuple):
    """A remark on a row: its location, and the words or fields in question."""

    where: str
    words: tuple[str, ...]


Tally = tuple[int, str, Sequence[tuple[str, int]]]
"""For one kind of remark: the number of rows, the location of the first, and the count of each word."""


@dataclass(frozen=True)
class Kind:
    """How a kind of remark is logged: as a warning if at least this share of the rows has it, else as information."""

    what: str
    words: str
    share: float = 0.0


KINDS = {
    "control": Kind("texts of rows contain control tokens, which the tokenizer encodes as such", "tokens"),
    "missing": Kind("texts stand for a missing value (such as NA), and are trained on as they are", "words", 0.001),
    "scores": Kind("chosen answers have lower scores than the rejected ones in their rows", "fields"),
    "repeated": Kind("completions begin with the prompt, which then occurs twice", "fields", 0.5),
}
"""The shares are above 0 where a few such rows may be intended: None may be an answer."""


def tally(remarks: Iterable[Mapping[str, Remark]]) -> dict[str, Tally]:
    """Counts the remarks on some rows, by kind."""
    counts = RemarkCounts()
    for remarks_of_row in remarks:
        counts.add(remarks_of_row)
    return counts.tallies()


class RemarkCounts:
    """Counts remarks by kind, in the order of their first occurrence."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._words: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}

    def add(self, remarks: Mapping[str, Remark]) -> None:
        """Counts the remarks on one row."""
        for kind, (where, words) in remarks.items():
            self._rows[kind] += 1
            self._first.setdefault(kind, where)
            self._words[kind].update(words)

    def add_all(self, tallies: Mapping[str, Tally]) -> None:
        """Counts the remarks on many rows."""
        for kind, (rows, first, words) in tallies.items():
            self._rows[kind] += rows
            self._first.setdefault(kind, first)
            self._words[kind].update(dict(words))

    def tallies(self) -> dict[str, Tally]:
        """The counts, for `add_all`."""
        return {kind: (rows, self._first[kind], list(self._words[kind].items())) for kind, rows in self._rows.items()}

    def note(self, note: Notes, name: str, rows: int) -> None:
        """Logs each kind that occurred; `rows` is the number of all rows that give examples."""
        for key, kind in KINDS.items():
            if count := self._rows[key]:
                words = dict(self._words[key].most_common(MAX_SHOWN))
                level: Level = "warning" if count >= kind.share * rows else "info"
                note(level, kind.what, source=name, rows=count, first=self._first[key], **{kind.words: words})
