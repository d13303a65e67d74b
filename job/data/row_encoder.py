"""From rows to tokens: each row is checked, rendered and tokenized independently of the other rows.

So the result is the same in chunks of any size and with any number of processes (`job.data.workers`).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

from job.audit.rows import AuditSetup, RowAudit
from job.data.chat_template import Template
from job.data.field_names import in_own_names, rename_fields
from job.data.fields import Rendered, weight_of
from job.data.formats import Line, LineDecoder, Row, RowError
from job.data.preferences import (
    SIDES,
    Answers,
    EncodedAnswers,
    contradicting_score,
    encode_answers,
    is_conversation,
)
from job.data.prompt_messages import (
    FIELDS,
    are_the_conversation,
    count_prompt_messages,
    in_prompt_and_completion,
    join_prompt_messages,
)
from job.data.remarks import MISSING, Remark, Tally, tally
from job.data.schemas import (
    Schema,
    audited_texts,
    check_row,
    naming_other_schema,
    own_texts,
    render,
    repeats_prompt,
    texts_of,
    with_near_names,
)
from job.data.sharegpt import as_messages, in_conversations, is_sharegpt
from job.data.text_tokenizer import TextTokenizer, pattern_of
from job.data.tokenization import Encoded, LossOn, OnLongRow, encode


@dataclass(frozen=True)
class Reading:
    """What is made of rows: JSON-able, and all that decides it but the tokenizer and its chat template.

    `compare` says whether rows are hashed to be compared with others, `row_weights` whether they have a field `weight`;
    the rest is as in `dataset.load_examples`.
    """

    schema: Schema
    templated: bool
    loss_on: LossOn
    max_length: int
    vocabulary: int | None
    on_long_row: OnLongRow
    field_names: Mapping[str, str]
    compare: bool
    row_weights: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one row gives: examples, or faults; and what is noticed in it, by kind."""

    where: str
    examples: tuple[Encoded | EncodedAnswers, ...] = ()
    faults: tuple[RowError, ...] = ()
    remarks: Mapping[str, Remark] = field(default_factory=dict)
    audited: bytes = b""
    """What the audit found in a row that gives examples (`audit.rows.AuditedRow.to_bytes`), where rows are audited."""


@dataclass(frozen=True)
class Bundle:
    """All that rows give, put together: what one process hands to another, which then has no work for each row.

    Attributes:
        canonical: The canonical bytes of the examples, concatenated.
        ids, targets: Their tokens and targets, concatenated.
        lengths: Tokens of each example, int32, little-endian.
        more: For each example second_at, desirable and weight; None where they are those of plain examples.
        ends, unused, long: Counts, in the order in which they were first met.
        remarks: What was noticed, by kind.
        faults: Faults of each row that has any.
        audited: Where rows are audited, of each row with examples its location, how many it gives, and the bytes of it
            in `audits`.
        audits: What was found in these rows, concatenated.
        longest: Tokens of the longest example, and the location of its row.
    """

    canonical: bytes
    ids: bytes
    targets: bytes
    lengths: bytes
    more: list[tuple[int | None, bool | None, float]] | None
    ends: Sequence[tuple[int | None, int]]
    unused: Sequence[tuple[str, int]]
    long: Sequence[tuple[str, int]]
    remarks: Mapping[str, Tally]
    faults: tuple[tuple[RowError, ...], ...]
    audited: Sequence[tuple[str, int, int]] = ()
    audits: bytes = b""
    longest: tuple[int, str] = (0, "")


PLAIN = (None, None, 1.0)
"""`Bundle.more` of a plain example."""


def bundle(outcomes: Sequence[Outcome]) -> Bundle:
    """The outcomes of some rows, put together."""
    examples = [example for outcome in outcomes for example in outcome.examples]
    parts = [example.parts() for example in examples]
    more = [part[2] for part in parts]
    long: Counter[str] = Counter()
    for example in examples:
        long.update(dict(example.long))
    return Bundle(
        canonical=b"".join(example.canonical() for example in examples),
        ids=b"".join(part[0] for part in parts),
        targets=b"".join(part[1] for part in parts),
        lengths=struct.pack(f"<{len(parts)}i", *(len(part[1]) for part in parts)),
        more=None if all(one == PLAIN for one in more) else more,
        ends=tuple(Counter(example.end for example in examples).items()),
        unused=tuple(Counter(name for example in examples for name in example.unused).items()),
        long=tuple(long.items()),
        remarks=tally(outcome.remarks for outcome in outcomes),
        faults=tuple(outcome.faults for outcome in outcomes if outcome.faults),
        audited=[(one.where, len(one.examples), len(one.audited)) for one in outcomes if one.audited],
        audits=b"".join(outcome.audited for outcome in outcomes),
        longest=max(map(longest_of, outcomes), key=itemgetter(0), default=(0, "")),
    )


def longest_of(outcome: Outcome) -> tuple[int, str]:
    """Tokens of the longest example of a row, 0 where it gives none, and the row's location."""
    return max((len(example.parts()[1]) for example in outcome.examples), default=0), outcome.where


class RowEncoder:
    """Encodes rows.

    Args:
        reading: How.
        tokenizer: The tokenizer.
        template: Its chat template; for rows of texts None.
        audit: What to look for in the rows; None for nothing.
    """

    def __init__(
        self, reading: Reading, tokenizer: TextTokenizer, template: Template | None, audit: AuditSetup | None = None
    ) -> None:
        self._audit = None if audit is None else RowAudit(audit)
        self._reading, self._tokenizer, self._template = reading, tokenizer, template
        self._pattern = pattern_of(tokenizer.control)
        self._decode = LineDecoder()

    def __call__(self, given_rows: Sequence[Row | RowError | Line]) -> list[Outcome]:
        """What each row gives.

        Raises:
            DataError: The chat template is broken, or exceeds its time or memory limit.
        """
        reading, remarks, audited = self._reading, dict[int, dict[str, Remark]](), dict[int, bytes]()
        rows = [rename_fields(self._decode(row), reading.field_names) for row in given_rows]
        rendered: list[Any] = []
        for index, row in enumerate(rows):
            outcome, valid_row = self._weighed(row)
            rendered.append(outcome)
            if valid_row is not None:
                remarks[index] = self._remarks(valid_row)
                if self._audit is not None:
                    audited[index] = self._audit(audited_texts(valid_row, reading.schema))
        options: dict[str, Any] = {
            "templated": reading.templated,
            "max_length": reading.max_length,
            "vocabulary": reading.vocabulary,
            "on_long_row": reading.on_long_row,
            "compare": reading.compare,
        }
        items: Iterator[list[Encoded] | list[RowError]] | Iterator[list[EncodedAnswers] | list[RowError]]
        if reading.schema in SIDES:
            items = encode_answers(rendered, self._tokenizer, **options)
        else:
            items = encode(rendered, self._tokenizer, loss_on=reading.loss_on, **options)
        return [
            Outcome(
                row.where,
                tuple(one for one in item if not isinstance(one, RowError)),
                tuple(one for one in item if isinstance(one, RowError)),
                remarks.get(index, {}),
                b"" if not item or isinstance(item[0], RowError) else audited.get(index, b""),
            )
            for index, (row, item) in enumerate(zip(rows, items, strict=True))
        ]

    def _weighed(self, row: Row | RowError) -> tuple[Rendered | Answers | list[RowError], Row | None]:
        """`_render`, with the number in the field `weight`."""
        if isinstance(row, RowError) or not self._reading.row_weights:
            return self._render(row)
        # It has a separate check: without JOB_DATA__ROW_WEIGHTS, a weight of 0 is a mistake.
        text, schema_row = self._render(replace(row, fields={k: v for k, v in row.fields.items() if k != "weight"}))
        weight = weight_of(row)
        if isinstance(weight, RowError):
            return [*(text if isinstance(text, list) else []), weight], None
        return replace(text, weight=weight) if isinstance(text, Rendered) else text, schema_row

    def _render(self, row: Row | RowError) -> tuple[Rendered | Answers | list[RowError], Row | None]:
        """The row as text or what is wrong with it; and for a rendered row the row in the schema's form."""
        schema, template, names = self._reading.schema, self._template, self._reading.field_names
        if isinstance(row, RowError):
            return [row], None
        if schema in SIDES and is_conversation(row.fields, schema) != (template is not None):
            kind, other = ("text", "messages") if template is not None else ("messages", "text")
            what = f"must be {other}, as in the first row, is {kind}"
            return [RowError("wrong_type", f"{row.where} {SIDES[schema][0]}", what)], None
        original = row
        if schema == "messages":
            converted = _as_messages(row)
            if isinstance(converted, list):
                return list(in_own_names(converted, original, names)), None
            row = converted
        if faults := check_row(row, schema):
            faults = with_near_names(_in_original(faults, original), original, schema, names)
            faults = naming_other_schema(faults, row, schema)
            return list(in_own_names(faults, original, names)), None
        loss_on, of_prompt = self._reading.loss_on, 0
        if schema == "messages":
            of_prompt = count_prompt_messages(original.fields)
        turns = None if loss_on == "all" else loss_on
        text = render(row, schema, template, turns=turns, prompt_messages=of_prompt)
        if isinstance(text, RowError):
            return _in_original([text], original), None
        if of_prompt and isinstance(text, Rendered):
            text = replace(text, where=f"{row.where} {max(FIELDS, key=lambda name: len(str(original.fields[name])))}")
        if self._reading.compare:
            text = replace(text, own_texts=own_texts(row, schema))
        return text, row

    def _remarks(self, row: Row) -> dict[str, Remark]:
        """What is noticed in a row that was rendered."""
        remarks: dict[str, Remark] = {}
        texts = texts_of(row, self._reading.schema)
        if control := self._control(texts):
            remarks["control"] = Remark(row.where, control)
        if missing := tuple(text for text in texts if text.strip() in MISSING):
            names = [f" {name}" for name, value in row.fields.items() if value == missing[0]]
            remarks["missing"] = Remark(row.where + "".join(names[:1]), tuple(word.strip() for word in missing))
        if (name := repeats_prompt(row, self._reading.schema)) is not None:
            remarks["repeated"] = Remark(f"{row.where} {name}", (name,))
        if self._reading.schema == "preference" and (name := contradicting_score(row.fields)) is not None:
            remarks["scores"] = Remark(f"{row.where} {name}", (name,))
        return remarks

    def _control(self, texts: Sequence[str]) -> tuple[str, ...]:
        """The control tokens in the texts of a row, which the tokenizer encodes as such.

        A text of no chat template may begin and end with the tokens that are put there anyway.
        """
        if self._pattern is None or not texts:
            return ()
        begin, end = ("", "") if self._reading.templated else self._tokenizer.edges
        first, *others = texts
        texts = [first.removeprefix(begin), *others]
        texts[-1] = texts[-1].removesuffix(end)
        return tuple(word for text in texts for word in self._pattern.findall(text))


def _as_messages(row: Row) -> Row | list[RowError]:
    """A row of the schema `messages` with its conversation as `messages`, or all that prevents that."""
    if are_the_conversation(row.fields):
        return join_prompt_messages(row)
    return as_messages(row) if is_sharegpt(row.fields) else row


def _in_original(faults: list[RowError], original: Row) -> list[RowError]:
    """Faults of a row that `_as_messages` converted, with their locations in the original row."""
    return in_prompt_and_completion(in_conversations(faults, original), original)
