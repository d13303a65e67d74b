"""Collects the examples of all sources of a data set, each as often as it says, and counts and hashes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import sha256
from math import ceil
from operator import itemgetter
from typing import Any

from job.audit.audit import Audit
from job.common.methods import METHODS, MethodName
from job.common.source_list import Source
from job.data.bad_rows import BadRows
from job.data.examples import ExampleWriter
from job.data.field_names import rename_fields
from job.data.formats import Line, LineDecoder, Lines, Row, RowError
from job.data.notes import Notes
from job.data.preferences import EncodedAnswers
from job.data.remarks import RemarkCounts
from job.data.row_encoder import PLAIN, Bundle, Outcome
from job.data.schema_of_rows import other_schema, peek
from job.data.schemas import Schema
from job.data.sources import open_source, watched
from job.data.tokenization import Encoded
from job.data.workers import Encoding
from job.records import DataSourceRecord

_DIGEST = b"examples 1\0"
"""What each digest of examples begins with: the version of what is hashed."""
_SAME_SCHEMA = (
    "all sources must have the same schema: convert one of them, or set JOB_DATA__FORMAT if a schema was "
    "detected wrongly"
)


@dataclass(frozen=True)
class OpenSource:
    """A source that is open: its commit (None for files), whether the split chose its files, and its rows."""

    commit: str | None
    chosen_by_split: bool
    rows: Lines


class SourceReader:
    """Opens sources, and gives their rows the schema's names of fields.

    Args:
        revision: On the hub, of sources that have none of their own.
        split: Of the hub, or of a directory in the hub's layout.
        field_names: Field of the schema -> the rows' own name for it.
        note: Where what is logged about the rows is kept.
        check_stop: Called about twice a second while rows are read; an exception from it ends the reading.
    """

    def __init__(
        self,
        *,
        revision: str | None,
        split: str,
        field_names: Mapping[str, str],
        note: Notes,
        check_stop: Callable[..., None],
    ) -> None:
        self._revision, self._split, self._field_names = revision, split, field_names
        self._note, self._check_stop = note, check_stop
        self._decode = LineDecoder()

    def open(self, source: Source) -> OpenSource:
        """Opens a source; again from its first row if it was open before.

        Raises:
            DataError, SettingsError, Unreachable, AccessDenied: As `dataset.load_examples`.
        """
        revision = source.revision or self._revision
        commit, chosen_by_split, rows = open_source(
            source.location, revision, self._split, source.name, note=self._note, check_stop=self._check_stop
        )
        return OpenSource(commit, chosen_by_split, watched(rows, source.name, self._check_stop))

    def decode(self, row: Row | RowError | Line) -> Row | RowError:
        """The row of what is read, with the schema's names of fields."""
        return rename_fields(self._decode(row), self._field_names)


class CollectedExamples:
    """The examples collected so far, and what is counted of them.

    Args:
        writer: Writes them.
        on_example: Called with each example, in order; None for nothing.
        audit: Collects what is found in the rows that give examples; None where they are not audited.

    Attributes:
        one_by_one: Whether each example is looked at, so that rows must not come in bundles.
        digest: SHA-256 over all examples, in order.
        ends: How many examples end in each token; None for those without an end in the loss.
        unused: How many rows have each field that is not used.
        labels: How many examples have each label.
        long_rows: As in `DatasetRecord`.
        longest: Tokens of the longest example, and the location of its row.
        remarks: What was noticed in rows.
    """

    def __init__(
        self,
        writer: ExampleWriter,
        on_example: Callable[[Encoded | EncodedAnswers], None] | None,
        audit: Audit | None,
    ) -> None:
        self._on_example = on_example
        self.one_by_one = on_example is not None
        self._audit = audit
        self.writer = writer
        self.digest = sha256(_DIGEST)
        self.ends: Counter[int | None] = Counter()
        self.unused: Counter[str] = Counter()
        self.labels: Counter[bool | None] = Counter()
        self.long_rows: Counter[str] = Counter()
        self.longest: tuple[int, str] = (0, "")
        self.remarks = RemarkCounts()

    @property
    def rows(self) -> int:
        """How many examples there are."""
        return len(self.writer.lengths)

    def add(self, item: Encoded | EncodedAnswers, canonical: bytes) -> None:
        """Adds an example; `canonical` is what it says of itself."""
        ids, targets, more = item.parts()
        self.writer.add(ids, targets, *more)
        self.labels[more[1]] += 1
        self.digest.update(canonical)
        self.ends[item.end] += 1
        if item.unused:
            self.unused.update(item.unused)
        if item.long:
            self.long_rows.update(dict(item.long))
        if self._on_example is not None:
            self._on_example(item)

    def add_all(self, bundle: Bundle) -> None:
        """Adds the examples of many rows, and counts what they count; not for `on_example`."""
        count = len(bundle.lengths) // 4
        more = bundle.more or [PLAIN] * count
        self.writer.add_all(bundle.ids, bundle.targets, bundle.lengths, more)
        self.labels.update(one[1] for one in more)
        self.digest.update(bundle.canonical)
        self.ends.update(dict(bundle.ends))
        self.unused.update(dict(bundle.unused))
        self.long_rows.update(dict(bundle.long))
        self.remarks.add_all(bundle.remarks)
        self.note_longest(bundle.longest)
        at = 0
        for where, examples, size in bundle.audited:
            self.audited(where, bundle.audits[at : at + size], examples)
            at += size

    def note_longest(self, one: tuple[int, str]) -> None:
        """Keeps the tokens of the longest example and the location of its row: the first of several."""
        self.longest = max(self.longest, one, key=itemgetter(0))

    def begin(self, *, again: bool) -> None:
        """Says that the rows of the next source come, or those of the last one again."""
        if self._audit is not None:
            self._audit.begin(again=again)

    def audited(self, where: str, data: bytes, examples: int) -> None:
        """Adds what the audit found in a row, of which so many examples were taken."""
        if self._audit is not None and examples:
            self._audit.add(where, data, examples)


@dataclass(frozen=True)
class Collector:
    """Collects the examples of all sources.

    Attributes:
        reader: Opens the sources.
        encode: Makes examples of rows.
        collected: Where the examples are added.
        bad_rows: Where what is wrong is added.
        schema: Of all sources.
        method: What the rows are for.
        limit: As of `load_examples`, for sources that do not say how many rows they give.
        hash_each: Whether each source gets a record with a digest of its own.
    """

    reader: SourceReader
    encode: Encoding
    collected: CollectedExamples
    bad_rows: BadRows
    schema: Schema
    method: MethodName
    limit: int | None
    hash_each: bool

    def collect(self, sources: Sequence[Source], first: OpenSource) -> tuple[OpenSource, list[DataSourceRecord]]:
        """Collects from the sources in order; returns the last one that was opened, and the record of each.

        `first` is the first of them, open. A further one with rows of another schema is a problem, and gives no
        examples.
        """
        records: list[DataSourceRecord] = []
        opened = first
        for source in sources:
            if source is not sources[0]:
                opened = self.reader.open(source)
                row, rows = peek(opened.rows, self.reader.decode)
                opened = replace(opened, rows=rows)
                if (other := other_schema(row, self.schema, METHODS[self.method].schemas)) is not None:
                    what = f"has rows of the schema {other}, and {sources[0].name} of {self.schema}; {_SAME_SCHEMA}"
                    self.bad_rows.add_problem(source.name, what)
                    continue
            digest = sha256(_DIGEST) if self.hash_each else None
            before = self.collected.rows
            self._collect_one(source, opened.rows, digest)
            if digest is not None:
                rows_taken = self.collected.rows - before
                self._check_amount(source, rows_taken)
                records.append(DataSourceRecord(source.name, opened.commit, rows_taken, digest.hexdigest()))
        return opened, records

    def _collect_one(self, source: Source, rows: Lines, digest: Any | None) -> None:
        """Collects from one source as often as it says; it is read again each time, and the last time in part."""
        for turn in range(ceil(source.times)):
            share = min(source.times - turn, Fraction(1))
            self.collected.begin(again=turn > 0)
            most, lines = source.rows or self.limit, self.reader.open(source).rows if turn else rows
            together = share == 1 and most is None and not self.collected.one_by_one
            outcomes = self.encode(lines, most, together=together)
            _add_share(outcomes, share, self.collected, digest, None if turn else self.bad_rows)

    def _check_amount(self, source: Source, rows: int) -> None:
        """That one of several sources gives too few rows is a problem."""
        if source.rows is not None and rows < source.rows:
            self.bad_rows.add_problem(source.name, f"has {rows:,} valid rows, and {source.rows:,} were requested")
        elif not rows and not self.bad_rows.found:
            self.bad_rows.add_problem(source.name, "gives no row")


def _add_share(
    outcomes: Iterator[Outcome | Bundle],
    share: Fraction,
    collected: CollectedExamples,
    digest: Any | None,
    bad_rows: BadRows | None,
) -> None:
    """Adds a share of the examples to those collected, evenly spaced, so that their number is exact.

    Args:
        outcomes: What the rows of a source give.
        share: How many of the examples, up to 1; bundles are for 1 alone.
        collected: Where they are added.
        digest: The SHA-256 of the source, which is updated; None for none.
        bad_rows: Where faults are added; None where they have been added before.
    """
    good = 0
    for outcome in outcomes:
        if isinstance(outcome, Bundle):
            if bad_rows is not None:
                for faults in outcome.faults:
                    bad_rows.add(list(faults))
            collected.add_all(outcome)
            if digest is not None:
                digest.update(outcome.canonical)
            continue
        collected.remarks.add(outcome.remarks)
        if outcome.faults and bad_rows is not None:
            bad_rows.add(list(outcome.faults))
        before = collected.rows
        for item in outcome.examples:
            good += 1
            if share == 1 or int(good * share) > int((good - 1) * share):
                canonical = item.canonical()
                collected.add(item, canonical)
                collected.note_longest((len(item.parts()[1]), outcome.where))
                if digest is not None:
                    digest.update(canonical)
        collected.audited(outcome.where, outcome.audited, collected.rows - before)
