"""Reads the training data, before any model is loaded: from sources to tokenized examples and their record.

`load_examples` calls the steps in order:

    schema_of_rows     which schema the rows have
    dataset_checks     whether settings and tokenizer fit it; what is logged about the data set as a whole
    workers            rows become examples, in several processes (`row_encoder`)
    collect_examples   the examples of all sources, each as often as it says, counted and hashed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from job.audit.audit import Audit
from job.common.methods import METHODS, MethodName
from job.common.source_list import Source
from job.data.bad_rows import BadRows, OnBadRow
from job.data.collect_examples import CollectedExamples, Collector, SourceReader
from job.data.dataset_checks import (
    check_ends,
    check_settings,
    check_tokenizer,
    note_date,
    note_equal_weights,
    note_unexpected,
    note_unused_split,
)
from job.data.examples import Examples, ExampleWriter
from job.data.field_names import schemas_with
from job.data.formats import Lines
from job.data.notes import Notes
from job.data.preferences import SIDES, EncodedAnswers, is_conversation, paired
from job.data.row_encoder import Reading
from job.data.schema_of_rows import peek, settle_schema
from job.data.schemas import FIELDS, Schema
from job.data.tokenization import Encoded, LossOn, OnLongRow
from job.data.workers import open_encoding
from job.records import DatasetRecord


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
    check_stop: Callable[..., None] = lambda **_: None,
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
        check_stop: Called about twice a second while rows are read, with `progress=False` while other processes work;
            an exception from it ends the reading.
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
    note, names = notes or Notes(), field_names or {}
    sources = [Source(source, name or source)] if isinstance(source, str) else source
    name = name or ", ".join(one.name for one in sources)
    reader = SourceReader(revision=revision, split=split, field_names=names, note=note, check_stop=check_stop)
    bad_rows = BadRows(on_bad_row, skip_long=on_long_row == "skip")
    first = reader.open(sources[0])
    if len(sources) == 1 and not first.chosen_by_split:
        note_unused_split(note, split, name)
    among = schemas_with(names, METHODS[method].schemas, FIELDS)
    schema, rows = settle_schema(first.rows, reader.decode, schema, bad_rows, name, method=method, among=among)
    templated, rows = _uses_template(schema, rows, reader)
    check_tokenizer(tokenizer, name, templated=templated)
    check_settings(schema, loss_on, template_arguments, on_long_row, templated=templated)
    note_date(note, tokenizer, date, templated=templated)
    reading = Reading(
        schema=schema,
        templated=templated,
        loss_on=loss_on,
        max_length=max_length,
        vocabulary=vocabulary,
        on_long_row=on_long_row,
        field_names=names,
        compare=compare,
        row_weights=row_weights,
    )
    encoding = open_encoding(
        reading,
        tokenizer,
        date=date,
        template_arguments=template_arguments,
        processes=processes,
        check_stop=check_stop,
        audit=None if audit is None else audit.setup,
    )
    with ExampleWriter(file) as writer, encoding as encode:
        collected = CollectedExamples(writer, on_example, audit)
        collector = Collector(
            reader,
            encode,
            collected,
            bad_rows,
            schema=schema,
            method=method,
            limit=limit,
            hash_each=not isinstance(source, str),
        )
        last, records = collector.collect(sources, replace(first, rows=rows))
        bad_rows.raise_problems(name)
        if not collected.rows:
            raise bad_rows.nothing_left(name)
        if templated:
            check_ends(note, collected.ends, tokenizer, name)
        note_unexpected(note, collected, name, schema, limit)
    examples = writer.examples()
    if row_weights:
        note_equal_weights(note, examples.weights, name)
    if schema == "unpaired_preference" and pair:
        examples = paired(examples, [range(len(examples))], seed, max_length, file)
    by_split = last.commit or last.chosen_by_split or any(record.revision for record in records)
    return examples, DatasetRecord(
        source=name,
        revision=last.commit if isinstance(source, str) else None,
        split=split if by_split else None,
        format=schema,
        skipped=dict(sorted(bad_rows.skipped.items())),
        sources=records,
        **_facts(examples, collected),
    )


def _facts(examples: Examples, collected: CollectedExamples) -> dict[str, Any]:
    """What the record says of the examples themselves."""
    return {
        "rows": len(examples),
        "sha256": collected.digest.hexdigest(),
        "tokens": sum(examples.lengths),
        "target_tokens": sum(examples.target_counts),
        "longest": max(examples.lengths),
        "long_rows": dict(sorted(collected.long_rows.items())),
        "longest_at": collected.longest[1],
    }


def _uses_template(schema: Schema, rows: Lines, reader: SourceReader) -> tuple[bool, Lines]:
    """Whether a chat template renders the rows, by the schema and the first row; and the rows, that one included."""
    first, rows = peek(rows, reader.decode)
    conversation = schema in SIDES and first is not None and is_conversation(first.fields, schema)
    return schema == "messages" or conversation, rows
