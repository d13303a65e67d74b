"""Reads the training data: rows are checked, rendered, tokenized and hashed, before any model is loaded."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import sha256
from math import ceil
from operator import itemgetter
from pathlib import Path
from typing import Any

from job.audit.audit import Audit
from job.audit.rows import AuditSetup
from job.common.disk import disk_errors
from job.common.methods import METHODS, MethodName
from job.common.source_list import Source
from job.data.bad_rows import BadRows, OnBadRow
from job.data.batch_plan import epoch_order
from job.data.chat_template import uses_date
from job.data.examples import Examples, ExampleWriter
from job.data.field_names import rename_fields, schemas_with
from job.data.formats import Line, LineDecoder, Lines, Row, RowError
from job.data.notes import Notes
from job.data.preferences import SIDES, EncodedAnswers, is_conversation, with_partners
from job.data.remarks import RemarkCounts
from job.data.row_encoder import PLAIN, Bundle, Outcome, Reading
from job.data.schema_of_rows import other_schema, peek, settle_schema
from job.data.schemas import FIELDS, Schema
from job.data.sources import open_source, watched
from job.data.tokenization import Encoded, LossOn, OnLongRow
from job.data.workers import Encoding, open_encoding
from job.errors import DataError, Problem, SettingsError
from job.records import DatasetRecord, DataSourceRecord

_DIGEST = b"examples 1\0"
_ONE = (
    "all sources must have the same schema: convert one of them, or set JOB_DATA__FORMAT if a schema was "
    "detected wrongly"
)


def load_examples(
    source: str | Sequence[Source],
    *,
    revision: str | None,
    split: str,
    limit: int | None,
    schema: Schema | None,
    on_bad_row: OnBadRow,
    loss_on: LossOn,
    max_length: int,
    tokenizer: Any,
    name: str | None = None,
    date: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    field_names: Mapping[str, str] | None = None,
    on_long_row: OnLongRow = "error",
    vocabulary: int | None = None,
    method: MethodName = "sft",
    seed: int = 0,
    row_weights: bool = False,
    pair: bool = True,
    alive: Callable[..., None] = lambda **_: None,
    on_example: Callable[[Encoded | EncodedAnswers], None] | None = None,
    compare: bool = False,
    file: Path | None = None,
    processes: int = 1,
    notes: Notes | None = None,
    audit: Audit | None = None,
) -> tuple[Examples, DatasetRecord]:
    """Reads training examples, in the order of the source.

    The tokens are those of the rendered text tokenised as one string, with the special tokens that the tokenizer adds
    to it, and the end-of-sequence token behind; a chat template writes its own. With `limit`, reading stops at the
    row that completes the selection: rows after it are not checked. Fields that were left out, and control tokens that
    stand in the text, are counted and logged once.

    Args:
        source: A path that exists (a file, or a directory that holds one or the shards of the split), or else a hub id,
            `[namespace/]name`.
            Or several sources, whose examples follow one another; `limit` is not for them.
        revision: The hub's revision; required for a hub id, not used for a path.
        split: The split, of the hub or of a directory in the hub's layout; not used for a file.
        limit: Select this many valid rows, the first ones; None for all.
        schema: The schema of the rows; None to detect it from the first row.
        on_bad_row: Whether a bad row is an error, or left out and counted.
        loss_on: Whether all tokens are targets, or only those of the completion and the end of the sequence; of
            messages, those of the assistant's turns, or of its last turn.
        max_length: The most tokens an example may have, special tokens included. A longer row is a bad row.
        tokenizer: A `transformers.PreTrainedTokenizerFast`.
        name: What to call the source in messages and in the record, where it was fetched from elsewhere.
        date: The current date as a chat template sees it, `YYYY-MM-DD`; None for the day in UTC.
        template_arguments: Further variables of the chat template.
        field_names: Field of the schema -> the rows' own name for it, with dots between the keys of nested objects.
        on_long_row: What becomes of a row of more than `max_length` tokens: a bad row; left out and counted; cut at its
            end; or split into several examples, for plain text.
        vocabulary: Rows of the model's embedding; None if that is not known.
        method: What the rows are for, which decides the schemas that they may have.
        row_weights: Whether rows have a field `weight`; see `JOB_DATA__ROW_WEIGHTS`.
        pair: Whether labelled answers get a second sequence, as KTO needs it.
        seed: The run's; KTO pairs the rows in the order of its first epoch.
        alive: Called about twice a second while rows are read, with `progress=False` while other processes work; an
            exception from it ends the reading.
        on_example: Called with each example, in order.
        compare: Whether examples get a `compared_by`.
        file: The Arrow file that the examples are written to; None to keep them in memory.
        processes: How many processes may encode rows.
        notes: Where what is logged about the rows is kept.
        audit: Collects what is found in the rows that give examples; None where they are not audited.

    Returns:
        The examples, at least one, and the record for the manifest.

    Raises:
        DataError: Bad rows, all of those read counted and the first 20 named; a source that is not there or not
            readable; no row left; a chat template that is broken, out of bounds, or never ends an answer.
        SettingsError: A hub id without a revision; the loss is on turns, and rows are no messages; arguments that no
            chat template uses.
        Unreachable: The hub did not answer.
        AccessDenied: The hub refused.
    """
    note = notes or Notes()
    parts = _one_part(source, name)
    name = name or ", ".join(part.name for part in parts)

    def open_part(part: Source) -> _Opened:
        opened = open_source(part.place, part.revision or revision, split, part.name, note=note, alive=alive)
        return _Opened(*opened[:2], watched(opened[2], alive))

    decode = LineDecoder()

    def decoded(row: Row | RowError | Line) -> Row | RowError:
        return rename_fields(decode(row), field_names or {})

    findings = BadRows(on_bad_row, skip_long=on_long_row == "skip")
    opened = open_part(parts[0])
    among = schemas_with(field_names or {}, METHODS[method].schemas, FIELDS)
    schema, rows = settle_schema(opened.rows, decoded, schema, findings, name, method=method, among=among)
    first, rows = peek(rows, decoded)
    conversations = schema in SIDES and first is not None and is_conversation(first.fields, schema)
    templated = schema == "messages" or conversations
    _check_tokenizer(tokenizer, name, templated=templated)
    _check_fit(schema, loss_on, template_arguments, on_long_row, templated=templated)
    _note_date(note, tokenizer, date, templated=templated)
    reading = Reading(
        schema=schema,
        templated=templated,
        loss_on=loss_on,
        max_length=max_length,
        vocabulary=vocabulary,
        on_long_row=on_long_row,
        field_names=field_names or {},
        compare=compare,
        row_weights=row_weights,
    )
    with ExitStack() as stack:
        taken = _Taken(stack.enter_context(ExampleWriter(file)), on_example, audit)
        encoding = open_encoding(
            reading,
            tokenizer,
            date=date,
            template_arguments=template_arguments,
            processes=processes,
            alive=alive,
            audit=taken.audit_setup,
        )
        parts_reader = _PartsReader(
            open_part=open_part,
            decoded=decoded,
            encode=stack.enter_context(encoding),
            schema=schema,
            method=method,
            limit=limit,
            one_by_one=on_example is not None,
            hashed=not isinstance(source, str),
        )
        opened, records = _take_parts(parts_reader, parts, replace(opened, rows=rows), taken, findings)
        findings.raise_problems()
        if not taken.rows:
            raise findings.nothing_left(name)
        if templated:
            _check_ends(note, taken.ends, tokenizer, name)
        _note_findings(note, taken, name, schema, limit)
    examples = taken.writer.examples()
    if schema == "unpaired_preference" and pair:
        examples = paired(examples, [range(len(examples))], seed, max_length, file)
    return examples, DatasetRecord(
        source=name,
        revision=opened.commit if isinstance(source, str) else None,
        split=split if opened.commit or opened.chosen or any(record.revision for record in records) else None,
        format=schema,
        rows=len(examples),
        skipped=dict(sorted(findings.skipped.items())),
        sha256=taken.digest.hexdigest(),
        tokens=sum(examples.lengths),
        target_tokens=sum(examples.target_counts),
        longest=max(examples.lengths),
        sources=records,
        long_rows=dict(sorted(taken.long_rows.items())),
        longest_at=taken.longest[1],
    )


@dataclass(frozen=True)
class _Opened:
    """A source that is open: its commit (None for files), whether the split chose its files, and its rows."""

    commit: str | None
    chosen: bool
    rows: Lines


@dataclass(frozen=True)
class _PartsReader:
    """How the rows of all sources are read.

    Attributes:
        open_part: Opens a source.
        decoded: Gives the row of what is read, with the schema's names of fields.
        encode: Makes examples of rows.
        schema: Of all sources.
        method: What the rows are for.
        limit: As of `load_examples`, for sources that do not say how many rows they give.
        one_by_one: Whether each example is looked at, so that rows are not encoded in bundles.
        hashed: Whether each source gets a record with a digest of its own.
    """

    open_part: Callable[[Source], _Opened]
    decoded: Callable[[Row | RowError | Line], Row | RowError]
    encode: Encoding
    schema: Schema
    method: MethodName
    limit: int | None
    one_by_one: bool
    hashed: bool


def _take_parts(
    reader: _PartsReader, parts: Sequence[Source], opened: _Opened, taken: _Taken, findings: BadRows
) -> tuple[_Opened, list[DataSourceRecord]]:
    """Takes the examples of all sources: the last source that was opened, and the record of each.

    `opened` is the first source. A further one with rows of another schema is a finding, and gives no examples.
    """
    records: list[DataSourceRecord] = []
    for part in parts:
        if part is not parts[0]:
            opened = reader.open_part(part)
            first, rows = peek(opened.rows, reader.decoded)
            opened = replace(opened, rows=rows)
            if (other := other_schema(first, reader.schema, METHODS[reader.method].schemas)) is not None:
                what = f"has rows of the schema {other}, and {parts[0].name} of {reader.schema}; {_ONE}"
                findings.add_problem(part.name, what)
                continue
        own = sha256(_DIGEST) if reader.hashed else None
        before = taken.rows
        _take_part(reader, part, opened.rows, taken, own=own, findings=findings)
        records += _records(part, opened.commit, taken.rows - before, own, findings)
    return opened, records


def _take_part(
    reader: _PartsReader, part: Source, rows: Lines, taken: _Taken, *, own: Any | None, findings: BadRows
) -> None:
    """Takes the examples of a source as often as it says; it is read again each time, and the last time in part."""
    for turn in range(ceil(part.times)):
        share = min(part.times - turn, Fraction(1))
        taken.begin(again=turn > 0)
        most, lines = part.rows or reader.limit, reader.open_part(part).rows if turn else rows
        together = share == 1 and most is None and not reader.one_by_one
        outcomes = reader.encode(lines, most, together=together)
        _take_share(outcomes, share, taken, own, None if turn else findings)


def paired(
    examples: Examples, sides: Sequence[Sequence[int]], seed: int, max_length: int, file: Path | None
) -> Examples:
    """Labelled examples with a second sequence each, in the place of the file without.

    `sides` are the rows to train and to validate on: each gets its second sequence from a row of the same side.
    """
    cycles = [tuple(side[place] for place in epoch_order(seed, len(side), 0)) for side in sides]
    beside = None if file is None else file.with_name(f"paired-{file.name}")
    with ExampleWriter(beside) as writer:
        for example in with_partners(examples, cycles, max_length):
            ids = struct.pack(f"<{len(example.input_ids)}i", *example.input_ids)
            writer.add(ids, bytes(example.targets), example.second_at, example.desirable)
    if beside is not None and file is not None:
        with disk_errors(f"cannot write {file}"):
            beside.replace(file)
        return Examples(file)
    return writer.examples()


def _note_date(note: Notes, tokenizer: Any, date: str | None, *, templated: bool) -> None:
    if templated and uses_date(tokenizer):
        note("info", "the chat template can write the date; JOB_DATA__DATE sets it", date=date or "today")


def _note_unused(note: Notes, unused: Counter[str], name: str, schema: Schema) -> None:
    if "weight" in unused:
        what = "rows have weights that are not used; set JOB_DATA__ROW_WEIGHTS=true, or remove them"
        note("warning", what, source=name, rows=unused["weight"])
    if unused:
        note("info", "fields that are not used", source=name, schema=schema, rows=dict(sorted(unused.items())))


def _note_findings(note: Notes, taken: _Taken, name: str, schema: Schema, limit: int | None) -> None:
    """Notes what is more than one would expect, as control tokens and unused fields, or less: rows, kinds of labels."""
    taken.remarks.note(note, name, taken.rows)
    _note_unused(note, taken.unused, name, schema)
    if limit is not None and taken.rows < limit:
        note("warning", "there are fewer rows than JOB_DATA__LIMIT", source=name, rows=taken.rows, limit=limit)
    if len(taken.labels) == 1 and None not in taken.labels:
        label = next(iter(taken.labels))
        note(
            "warning",
            "all answers have the same label, so training cannot learn a difference",
            source=name,
            label=label,
        )


def _one_part(source: str | Sequence[Source], name: str | None) -> Sequence[Source]:
    return [Source(source, name or source)] if isinstance(source, str) else source


class _Taken:
    """The examples that were taken, and what is counted of them."""

    def __init__(
        self,
        writer: ExampleWriter,
        on_example: Callable[[Encoded | EncodedAnswers], None] | None,
        audit: Audit | None,
    ) -> None:
        self._on_example = on_example
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
    def audit_setup(self) -> AuditSetup | None:
        """What the audit looks for; None where rows are not audited."""
        return None if self._audit is None else self._audit.setup

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
        """Keeps the tokens of the longest example and the place of its row: the first of several."""
        self.longest = max(self.longest, one, key=itemgetter(0))

    def begin(self, *, again: bool) -> None:
        """Says that the rows of the next source come, or those of the last one again."""
        if self._audit is not None:
            self._audit.begin(again=again)

    def audited(self, where: str, data: bytes, examples: int) -> None:
        """Adds what the audit found in a row, of which so many examples were taken."""
        if self._audit is not None and examples:
            self._audit.add(where, data, examples)


def _take_share(
    outcomes: Iterator[Outcome | Bundle], share: Fraction, taken: _Taken, own: Any | None, findings: BadRows | None
) -> None:
    """Adds a share of the examples to those taken, evenly spaced, so that their number is exact.

    Args:
        outcomes: What the rows of a source give.
        share: How many of the examples, up to 1; bundles are for 1 alone.
        taken: Where they are added.
        own: The digest of the source; None for none.
        findings: Where faults are added; None where they have been added before.
    """
    good = 0
    for outcome in outcomes:
        if isinstance(outcome, Bundle):
            if findings is not None:
                for faults in outcome.faults:
                    findings.add(list(faults))
            taken.add_all(outcome)
            if own is not None:
                own.update(outcome.canonical)
            continue
        taken.remarks.add(outcome.remarks)
        if outcome.faults and findings is not None:
            findings.add(list(outcome.faults))
        before = taken.rows
        for item in outcome.examples:
            good += 1
            if share == 1 or int(good * share) > int((good - 1) * share):
                canonical = item.canonical()
                taken.add(item, canonical)
                taken.note_longest((len(item.parts()[1]), outcome.where))
                if own is not None:
                    own.update(canonical)
        taken.audited(outcome.where, outcome.audited, taken.rows - before)


def _records(
    part: Source, commit: str | None, rows: int, digest: Any | None, findings: BadRows
) -> list[DataSourceRecord]:
    """The record of one of several sources, none without a digest; that it gives too little is a finding."""
    if digest is None:
        return []
    if part.rows is not None and rows < part.rows:
        findings.add_problem(part.name, f"has {rows:,} valid rows, and {part.rows:,} were requested")
    elif not rows and not findings.found:
        findings.add_problem(part.name, "gives no row")
    return [DataSourceRecord(part.name, commit, rows, digest.hexdigest())]


def _check_ends(note: Notes, ends: Counter[int | None], tokenizer: Any, name: str) -> None:
    """Refuses data in which no conversation has its end in the loss; logs the end if it is an unusual token."""
    eos = tokenizer.eos_token_id
    if not hasattr(tokenizer, "all_special_ids") or eos in ends:
        return
    known = {token: count for token, count in ends.items() if token is not None}
    if not known:
        what = (
            "would teach the model never to stop: the tokenizer's chat template writes no end-of-sequence token after"
            f" an answer; use a model whose template ends each message with {tokenizer.eos_token!r} or another special"
            " token, or rows of another schema"
        )
        raise DataError([Problem(name, what)])
    word = tokenizer.convert_ids_to_tokens(max(known, key=lambda token: known[token]))
    note(
        "warning",
        "answers do not end with the end of sequence; serve the adapter with this token as a stop token",
        ends_with=word,
        end_of_sequence=tokenizer.eos_token,
    )


def _check_tokenizer(tokenizer: Any, name: str, *, templated: bool) -> None:
    if templated:
        if not tokenizer.chat_template:
            what = (
                "holds messages, and the model's tokenizer has no chat template to render them; use an instruct model"
            )
            raise DataError([Problem(name, what)])
    elif tokenizer.eos_token_id is None:
        raise DataError([Problem(name, "cannot be terminated: the model's tokenizer has no end-of-sequence token")])


def _check_fit(
    schema: Schema, loss_on: LossOn, arguments: Mapping[str, Any] | None, on_long_row: OnLongRow, *, templated: bool
) -> None:
    """Refuses settings that mean something for other schemas alone than that of the rows."""
    problems = []
    if loss_on in {"assistant", "last"} and schema != "messages":
        what = f"is {loss_on}, which learns turns of messages, and the rows are of the schema {schema}; use completion"
        problems.append(Problem("JOB_TRAIN__LOSS_ON", what))
    if arguments and not templated:
        what = f"is for rows of messages, and the rows are of the schema {schema}; remove it"
        problems.append(Problem("JOB_DATA__CHAT_TEMPLATE_ARGUMENTS", what))
    if on_long_row == "split" and schema != "text":
        what = f"is split, which is for plain text, and the rows are of the schema {schema}; use skip or truncate"
        problems.append(Problem("JOB_DATA__ON_LONG_ROW", what))
    if on_long_row == "truncate" and schema in SIDES:
        what = "is truncate, which would cut answers that are to be compared; use skip"
        problems.append(Problem("JOB_DATA__ON_LONG_ROW", what))
    if problems:
        raise SettingsError(problems)
