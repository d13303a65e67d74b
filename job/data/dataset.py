"""Reads the training data: rows are checked, rendered, tokenized and hashed, before any model is loaded."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any, Literal

from job import log
from job.common.methods import METHODS, MethodName, methods_for
from job.common.source_list import Source
from job.data.batch_plan import epoch_order
from job.data.chat_template import Template, open_template, uses_date
from job.data.conversations import Turns
from job.data.field_names import in_own_names, rename_fields, schemas_with
from job.data.fields import Rendered
from job.data.formats import UNREADABLE, Row, RowError, Rows, find_files, fixed_part, read_rows
from job.data.hub_dataset import is_hub_id, open_dataset
from job.data.preferences import SIDES, Answers, EncodedAnswers, encode_answers, is_conversation, with_partners
from job.data.schemas import FIELDS, REQUIRED, Schema, check_row, detect_schema, own_texts, render, texts_of
from job.data.sharegpt import as_messages, in_conversations, is_sharegpt
from job.data.tokenization import Encoded, LossOn, OnLongRow, encode
from job.errors import MAX_SHOWN, DataError, Problem, SettingsError
from job.records import DatasetRecord, DataSourceRecord, Example

OnBadRow = Literal["error", "skip"]

_ALIVE_SECONDS = 0.5
_DIGEST = b"examples 1\0"


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
    alive: Callable[[], None] = lambda: None,
    on_example: Callable[[Encoded | EncodedAnswers], None] | None = None,
) -> tuple[list[Example], DatasetRecord]:
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
        seed: The run's; KTO pairs the rows in the order of its first epoch.
        alive: Called about twice a second while rows are read; an exception from it ends the reading.
        on_example: Called with each example, in order, its `own_texts` included.

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
    single = isinstance(source, str)
    parts = _one_part(source, name)
    name = name or ", ".join(part.name for part in parts)

    def read(part: Source) -> tuple[str | None, bool, Rows]:
        commit, chosen, rows = _open(part.place, part.revision or revision, split, part.name, alive)
        return commit, chosen, rename_fields(_watched(rows, alive), field_names or {})

    findings = _Findings(on_bad_row, skip_long=on_long_row == "skip")
    commit, chosen, rows = read(parts[0])
    among = schemas_with(field_names or {}, METHODS[method].schemas, FIELDS)
    schema, rows = _settle_schema(rows, schema, findings, name, method=method, among=among)
    first, rows = _peek(rows)
    conversations = schema in SIDES and first is not None and is_conversation(first.fields, schema)
    templated = schema == "messages" or conversations
    _check_tokenizer(tokenizer, name, templated=templated)
    _check_fit(schema, loss_on, template_arguments, on_long_row, templated=templated)
    control = _ControlTokens(tokenizer, templated=templated)
    found = _Found(on_example)
    records: list[DataSourceRecord] = []
    _log_date(tokenizer, date, templated=templated)
    with open_template(tokenizer, date, alive, template_arguments) if templated else nullcontext() as template:

        def encoded(rows: Rows, most: int | None) -> Iterator[Encoded | EncodedAnswers | list[RowError]]:
            texts: Iterator[Any] = _render_all(
                rows,
                schema,
                template,
                control,
                turns=None if loss_on == "all" else loss_on,
                names=field_names or {},
                own=on_example is not None,
            )
            options: dict[str, Any] = {
                "templated": templated,
                "max_length": max_length,
                "limit": most,
                "vocabulary": vocabulary,
                "on_long_row": on_long_row,
            }
            if schema in SIDES:
                return encode_answers(texts, tokenizer, **options)
            return encode(texts, tokenizer, loss_on=loss_on, **options)

        for part in parts:
            if part is not parts[0]:
                commit, chosen, rows = read(part)
            own = None if single else sha256(_DIGEST)
            before = len(found.examples)
            for turn in range(ceil(part.times)):
                items = encoded(read(part)[2] if turn else rows, part.rows or limit)
                _take_share(items, part.times - turn, found, own, None if turn else findings)
            records += _records(part, commit, len(found.examples) - before, own, findings)
    findings.raise_problems()
    if not found.examples:
        raise findings.nothing_left(name)
    if templated:
        _check_ends(found.ends, tokenizer, name)
    control.warn(name)
    _log_unused(found.unused, name, schema)
    examples = found.examples
    if schema == "unpaired_preference":
        examples = with_partners(examples, epoch_order(seed, len(examples), 0), max_length)
    lengths = [len(example.input_ids) for example in examples]
    return examples, DatasetRecord(
        source=name,
        revision=commit if single else None,
        split=split if commit or chosen or any(record.revision for record in records) else None,
        format=schema,
        rows=len(examples),
        skipped=dict(sorted(findings.skipped.items())),
        sha256=found.digest.hexdigest(),
        tokens=sum(lengths),
        target_tokens=sum(sum(example.targets) for example in examples),
        longest=max(lengths),
        sources=records,
        long_rows=dict(sorted(found.long_rows.items())),
    )


def _log_date(tokenizer: Any, date: str | None, *, templated: bool) -> None:
    if templated and uses_date(tokenizer):
        log.get_logger().info("the chat template can write the date; JOB_DATA__DATE sets it", date=date or "today")


def _log_unused(unused: Counter[str], name: str, schema: Schema) -> None:
    if unused:
        log.get_logger().info("fields that are not used", source=name, schema=schema, rows=dict(sorted(unused.items())))


def _one_part(source: str | Sequence[Source], name: str | None) -> Sequence[Source]:
    return [Source(source, name or source)] if isinstance(source, str) else source


class _Found:
    """The examples that were taken, and what is counted of them."""

    def __init__(self, on_example: Callable[[Encoded | EncodedAnswers], None] | None) -> None:
        self._on_example = on_example
        self.examples: list[Example] = []
        self.digest = sha256(_DIGEST)
        self.ends: Counter[int | None] = Counter()
        self.unused: Counter[str] = Counter()
        self.long_rows: Counter[str] = Counter()

    def add(self, item: Encoded | EncodedAnswers) -> None:
        """Adds an example."""
        self.examples.append(item.example)
        self.digest.update(item.canonical())
        self.ends[item.end] += 1
        self.unused.update(item.unused)
        self.long_rows.update(dict(item.long))
        if self._on_example is not None:
            self._on_example(item)


def _take_share(
    items: Iterator[Encoded | EncodedAnswers | list[RowError]],
    share: Fraction,
    found: _Found,
    own: Any | None,
    findings: _Findings | None,
) -> None:
    """Adds a share of the examples to those found, evenly spaced, so that their number is exact; all from 1 on.

    Args:
        items: The examples of a source, and faults.
        share: How many of them.
        found: Where they are added.
        own: The digest of the source; None for none.
        findings: Where faults are added; None where they have been added before.
    """
    good, share = 0, min(share, Fraction(1))
    for item in items:
        if not isinstance(item, Encoded | EncodedAnswers):
            if findings is not None:
                findings.add(item)
            continue
        good += 1
        if int(good * share) > int((good - 1) * share):
            found.add(item)
            if own is not None:
                own.update(item.canonical())


def _records(
    part: Source, commit: str | None, rows: int, digest: Any | None, findings: _Findings
) -> list[DataSourceRecord]:
    """The record of one of several sources, none without a digest; that it gives too little is a finding."""
    if digest is None:
        return []
    if part.rows is not None and rows < part.rows:
        findings.add_problem(part.name, f"has {rows:,} valid rows, and {part.rows:,} are asked for")
    elif not rows and not findings.found:
        findings.add_problem(part.name, "gives no row")
    return [DataSourceRecord(part.name, commit, rows, digest.hexdigest())]


def check_source(source: str, revision: str | None, split: str, setting: str = "JOB_DATA__REVISION") -> None:
    """Refuses a source that cannot be read, as far as can be checked without reading it or using the network.

    Raises:
        DataError: A path that is not there, or holds nothing that is read.
        SettingsError: A hub id without a revision.
    """
    if is_hub_id(source):
        require_revision(revision, setting)
    else:
        find_files(source, split)


def require_revision(revision: str | None, setting: str = "JOB_DATA__REVISION") -> str:
    """The revision of a hub data set, which has to be given by a setting."""
    if revision is None:
        what = "a data set of the hub needs a revision, best a commit, so that the run can be repeated"
        raise SettingsError([Problem(setting, what)])
    return revision


class _Findings:
    """Collects what is wrong: problems that are raised together, or, if bad rows are skipped, their number by kind."""

    def __init__(self, on_bad_row: OnBadRow, *, skip_long: bool = False) -> None:
        self.skipped: Counter[str] = Counter()
        self._skip_long = skip_long
        self._skip = on_bad_row == "skip"
        self._problems: list[Problem] = []
        self._total = 0

    def add(self, faults: list[RowError]) -> None:
        """Adds the faults of one row, at least one."""
        skip = self._skip or (self._skip_long and faults[0].kind == "too_long")
        if skip and faults[0].kind != UNREADABLE:
            self.skipped[faults[0].kind] += 1
            return
        self._total += len(faults)
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
            raise DataError(self._problems, self._total)

    def nothing_left(self, name: str) -> DataError:
        """The error that no row was selected, and why."""
        skipped = ", ".join(f"{count} {kind}" for kind, count in sorted(self.skipped.items()))
        return DataError([Problem(name, f"has no good row (skipped: {skipped})" if skipped else "has no rows")])


class _ControlTokens:
    """Counts the special tokens that stand as text in rows: the tokenizer makes the tokens of them.

    A text of no chat template may begin and end with the tokens that are put there anyway.
    """

    def __init__(self, tokenizer: Any, *, templated: bool) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        words = {*getattr(tokenizer, "all_special_tokens", ()), *(token.content for token in added if token.special)}
        longest_first = sorted(words - {""}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._begin = "" if templated else getattr(tokenizer, "bos_token", None) or ""
        self._end = "" if templated else getattr(tokenizer, "eos_token", None) or ""
        self._found: Counter[str] = Counter()
        self._rows = 0
        self._first = ""

    def count(self, texts: Sequence[str], where: str) -> None:
        """Counts the control tokens in the texts of a row."""
        if self._pattern is None or not texts:
            return
        first, *others = texts
        texts = [first.removeprefix(self._begin), *others]
        texts[-1] = texts[-1].removesuffix(self._end)
        if found := [word for text in texts for word in self._pattern.findall(text)]:
            self._found.update(found)
            self._rows += 1
            self._first = self._first or where

    def warn(self, name: str) -> None:
        """Logs a warning with the counts, if there are any."""
        if self._rows:
            log.get_logger().warning(
                "texts of rows contain control tokens, which the tokenizer encodes as such",
                source=name,
                tokens=dict(self._found.most_common(MAX_SHOWN)),
                rows=self._rows,
                first=self._first,
            )


def _watched(rows: Rows, alive: Callable[[], None]) -> Rows:
    """The rows; `alive` is called about twice a second, between two of them."""
    due = time.monotonic() + _ALIVE_SECONDS
    for row in rows:
        if time.monotonic() > due:
            alive()
            due = time.monotonic() + _ALIVE_SECONDS
        yield row


def _check_ends(ends: Counter[int | None], tokenizer: Any, name: str) -> None:
    """Refuses data in which no conversation has its end in the loss; logs the end if it is an unusual token."""
    eos = tokenizer.eos_token_id
    if not hasattr(tokenizer, "all_special_ids") or eos in ends:
        return
    known = {token: count for token, count in ends.items() if token is not None}
    if not known:
        what = (
            "would teach the model never to stop: the tokenizer's chat template writes no end-of-sequence token behind"
            f" an answer; use a model whose template ends each message with {tokenizer.eos_token!r} or another special"
            " token, or rows of another schema"
        )
        raise DataError([Problem(name, what)])
    word = tokenizer.convert_ids_to_tokens(max(known, key=lambda token: known[token]))
    log.get_logger().warning(
        "answers do not end with the end of sequence; serve the adapter with this token as a stop token",
        ends_with=word,
        end_of_sequence=tokenizer.eos_token,
    )


def _open(
    source: str, revision: str | None, split: str, name: str, alive: Callable[[], None]
) -> tuple[str | None, bool, Rows]:
    """The commit (None for files), whether the split chose the files, and the rows of a source."""
    if is_hub_id(source):
        commit, rows = open_dataset(source, require_revision(revision), split, name, alive)
        return commit, True, rows
    files, chosen = find_files(source, split)
    # A file found in a directory is named by its path in it.
    base, shown = (source, name) if Path(source).exists() else (fixed_part(source) or ".", fixed_part(name))
    if shown and not shown.endswith("/"):
        shown += "/"
    names = [name if file == Path(source) else f"{shown}{file.relative_to(base).as_posix()}" for file in files]
    parts: Iterator[Rows] = map(read_rows, files, names)
    return None, chosen, chain.from_iterable(parts if len(files) == 1 else map(_with_warning, parts, names))


def _with_warning(rows: Rows, name: str) -> Rows:
    """The rows of one of several files; that it has none is told, since the copy of a file may have failed."""
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        log.get_logger().warning("one of the files has no rows", file=name)


def _settle_schema(
    rows: Rows,
    schema: Schema | None,
    findings: _Findings,
    name: str,
    *,
    method: MethodName,
    among: Collection[str],
) -> tuple[Schema, Rows]:
    """The schema, by name or by the first row that is an object; and the rows, that one included."""
    if schema is not None:
        return schema, rows
    for row in rows:
        if isinstance(row, RowError):
            findings.add([row])
        elif found := detect_schema(row.fields, among):
            return found, chain([row], rows)
        else:
            known = "; ".join(f"{schema}: {', '.join(REQUIRED[schema])}" for schema in REQUIRED if schema in among)
            fields = ", ".join(map(ascii, row.fields)) or "none"
            what = f"fits no schema. It has the fields {fields}; known are {known}"
            if other := detect_schema(row.fields, REQUIRED.keys() - set(METHODS[method].schemas)):
                what = (
                    f"{what}, for JOB_TRAIN__METHOD={method}. JOB_TRAIN__METHOD={' or '.join(methods_for(other))} fits"
                )
            raise DataError([Problem(row.where, what)])
    findings.raise_problems()
    raise findings.nothing_left(name)


def _peek(rows: Rows) -> tuple[Row | None, Rows]:
    """The first row that is an object, if there is one; and all rows."""
    seen: list[Row | RowError] = []
    for row in rows:
        seen.append(row)
        if isinstance(row, Row):
            return row, chain(seen, rows)
    return None, iter(seen)


def _check_tokenizer(tokenizer: Any, name: str, *, templated: bool) -> None:
    if templated:
        if not tokenizer.chat_template:
            what = "holds messages, and the model's tokenizer has no chat template to render them; use another schema"
            raise DataError([Problem(name, what)])
    elif tokenizer.eos_token_id is None:
        raise DataError([Problem(name, "cannot be ended: the model's tokenizer has no end-of-sequence token")])


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
        what = "is truncate, which would cut answers that are compared; use skip"
        problems.append(Problem("JOB_DATA__ON_LONG_ROW", what))
    if problems:
        raise SettingsError(problems)


def _render_all(
    rows: Rows,
    schema: Schema,
    template: Template | None,
    control: _ControlTokens,
    *,
    turns: Turns | None,
    names: Mapping[str, str],
    own: bool,
) -> Iterator[Rendered | Answers | list[RowError]]:
    for row in rows:
        if isinstance(row, RowError):
            yield [row]
            continue
        if schema in SIDES and is_conversation(row.fields, schema) != (template is not None):
            kind, other = ("text", "messages") if template is not None else ("messages", "text")
            what = f"must be {other}, as in the first row, is {kind}"
            yield [RowError("wrong_type", f"{row.where} {SIDES[schema][0]}", what)]
            continue
        given = row
        if schema == "messages" and is_sharegpt(row.fields):
            converted = as_messages(row)
            if isinstance(converted, list):
                yield converted
                continue
            row = converted  # noqa: PLW2901 - the same row in another form
        if faults := check_row(row, schema):
            yield list(in_own_names(in_conversations(faults, given), given, names))
            continue
        text = render(row, schema, template, turns=turns)
        if isinstance(text, RowError):
            yield in_conversations([text], given)
            continue
        control.count(texts_of(row, schema), row.where)
        yield replace(text, own_texts=own_texts(row, schema)) if own and isinstance(text, Rendered) else text
