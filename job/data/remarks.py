"""What is noticed in rows that are good all the same: counted over all rows, and noted once.

To add a kind: enter it in `KINDS`, and find it in `row_encoder`.
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
"""Words that tables are read as missing values by (pandas' `na_values`), and that `str` makes of missing values."""


class Remark(NamedTuple):
    """Something noticed in a row: where, and the words that it is about."""

    where: str
    words: tuple[str, ...]


Tally = tuple[int, str, Sequence[tuple[str, int]]]
"""Of some rows with one kind of remark: how many there are, the first place, and how often each word was met."""


@dataclass(frozen=True)
class Kind:
    """What is said of a kind of remark; below the share of rows it is information, from it on a warning."""

    what: str
    words: str
    share: float = 0.0


KINDS = {
    "control": Kind("texts of rows contain control tokens, which the tokenizer encodes as such", "tokens"),
    "missing": Kind("texts are words for a missing value, and are trained on as they are", "words", 0.001),
    "repeated": Kind("completions begin with the prompt, which then stands there twice", "fields", 0.5),
}
"""Words of tables and repeated prompts may be meant in a few rows: None may be an answer."""


def tally(remarks: Iterable[Mapping[str, Remark]]) -> dict[str, Tally]:
    """The remarks on some rows, by kind."""
    counts = RemarkCounts()
    for found in remarks:
        counts.add(found)
    return counts.tallies()


class RemarkCounts:
    """Counts remarks by kind, in the order in which they were first met."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._words: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}

    def add(self, found: Mapping[str, Remark]) -> None:
        """Counts the remarks on one row."""
        for kind, (where, words) in found.items():
            self._rows[kind] += 1
            self._first.setdefault(kind, where)
            self._words[kind].update(words)

    def add_all(self, found: Mapping[str, Tally]) -> None:
        """Counts the remarks on many rows."""
        for kind, (rows, first, words) in found.items():
            self._rows[kind] += rows
            self._first.setdefault(kind, first)
            self._words[kind].update(dict(words))

    def tallies(self) -> dict[str, Tally]:
        """What was counted, for `add_all`."""
        return {kind: (rows, self._first[kind], list(self._words[kind].items())) for kind, rows in self._rows.items()}

    def note(self, note: Notes, name: str, rows: int) -> None:
        """Notes each kind that was met; `rows` are all rows that give examples."""
        for key, kind in KINDS.items():
            if count := self._rows[key]:
                words = dict(self._words[key].most_common(MAX_SHOWN))
                level: Level = "warning" if count >= kind.share * rows else "info"
                note(level, kind.what, source=name, rows=count, first=self._first[key], **{kind.words: words})
