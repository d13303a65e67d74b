"""Reads the training data: rows are checked, rendered, tokenized and hashed, before any model is loaded."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from job import log
from job.common.methods import METHODS, MethodName, methods_for
from job.data.batch_plan import epoch_order
from job.data.chat_template import Template, open_template, uses_date
from job.data.conversations import Turns
from job.data.fields import Rendered
from job.data.formats import UNREADABLE, Row, RowError, Rows, find_files, read_rows
from job.data.hub_dataset import is_hub_id, open_dataset
from job.data.preferences import SIDES, Answers, EncodedAnswers, encode_answers, is_conversation, with_partners
from job.data.schemas import REQUIRED, Schema, check_row, detect_schema, render, texts_of
from job.data.sharegpt import as_messages, in_conversations, is_sharegpt
from job.data.tokenization import Encoded, LossOn, encode
from job.errors import MAX_SHOWN, DataError, Problem, SettingsError
from job.records import DatasetRecord, Example

OnBadRow = Literal["error", "skip"]

_ALIVE_SECONDS = 0.5


def load_examples(
    source: str,
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
    vocabulary: int | None = None,
    method: MethodName = "sft",
    seed: int = 0,
    alive: Callable[[], None] = lambda: None,
) -> tuple[list[Example], DatasetRecord]:
    """Reads training examples, in the order of the source.

    The tokens are those of the rendered text tokenised as one string, with the special tokens that the tokenizer adds
    to it, and the end-of-sequence token behind; a chat template writes its own. With `limit`, reading stops at the
    row that completes the selection: rows after it are not checked. Fields that were left out, and control tokens that
    stand in the text, are counted and logged once.

    Args:
        source: A path that exists (a file, or a directory that holds one or the shards of the split), or else a hub id,
            `[namespace/]name`.
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
        vocabulary: Rows of the model's embedding; None if that is not known.
        method: What the rows are for, which decides the schemas that they may have.
        seed: The run's; KTO pairs the rows in the order of its first epoch.
        alive: Called about twice a second while rows are read; an exception from it ends the reading.

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
    name = name or source
    commit, chosen, rows = _open(source, revision, split, name, alive)
    rows = _watched(rows, alive)
    findings = _Findings(on_bad_row)
    schema, rows = _settle_schema(rows, schema, findings, name, method)
    first, rows = _peek(rows)
    conversations = schema in SIDES and first is not None and is_conversation(first.fields, schema)
    templated = schema == "messages" or conversations
    _check_tokenizer(tokenizer, name, templated=templated)
    _check_turns(schema, loss_on, template_arguments, templated=templated)
    control = _ControlTokens(tokenizer, templated=templated)
    examples: list[Example] = []
    ends: Counter[int | None] = Counter()
    unused: Counter[str] = Counter()
    digest = sha256(b"examples 1\0")
    if templated and uses_date(tokenizer):
        log.get_logger().info("the chat template can write the date; JOB_DATA__DATE sets it", date=date or "today")
    with open_template(tokenizer, date, alive, template_arguments) if templated else nullcontext() as template:
        texts: Iterator[Any] = _render_all(rows, schema, template, control, turns=None if loss_on == "all" else loss_on)
        options: dict[str, Any] = {
            "templated": templated,
            "max_length": max_length,
            "limit": limit,
            "vocabulary": vocabulary,
        }
        items: Iterator[Encoded | EncodedAnswers | list[RowError]] = (
            encode_answers(texts, tokenizer, **options)
            if schema in SIDES
            else encode(texts, tokenizer, loss_on=loss_on, **options)
        )
        for item in items:
            if isinstance(item, Encoded | EncodedAnswers):
                examples.append(item.example)
                digest.update(item.canonical())
                ends[item.end] += 1
                unused.update(item.unused)
            else:
                findings.add(item)
    findings.raise_problems()
    if not examples:
        raise findings.nothing_left(name)
    if templated:
        _check_ends(ends, tokenizer, name)
    control.warn(name)
    if unused:
        log.get_logger().info("fields that are not used", source=name, schema=schema, rows=dict(sorted(unused.items())))
    if schema == "unpaired_preference":
        examples = with_partners(examples, epoch_order(seed, len(examples), 0), max_length)
    lengths = [len(example.input_ids) for example in examples]
    return examples, DatasetRecord(
        source=name,
        revision=commit,
        split=split if commit or chosen else None,
        format=schema,
        rows=len(examples),
        skipped=dict(sorted(findings.skipped.items())),
        sha256=digest.hexdigest(),
        tokens=sum(lengths),
        target_tokens=sum(sum(example.targets) for example in examples),
        longest=max(lengths),
    )


def check_source(source: str, revision: str | None, split: str) -> None:
    """Refuses a source that cannot be read, as far as can be checked without reading it or using the network.

    Raises:
        DataError: A path that is not there, or holds nothing that is read.
        SettingsError: A hub id without a revision.
    """
    if is_hub_id(source):
        require_revision(revision)
    else:
        find_files(source, split)


def require_revision(revision: str | None) -> str:
    """The revision of a hub data set, which has to be given."""
    if revision is None:
        what = "a data set of the hub needs a revision, best a commit, so that the run can be repeated"
        raise SettingsError([Problem("JOB_DATA__REVISION", what)])
    return revision


class _Findings:
    """Collects what is wrong: problems that are raised together, or, if bad rows are skipped, their number by kind."""

    def __init__(self, on_bad_row: OnBadRow) -> None:
        self.skipped: Counter[str] = Counter()
        self._skip = on_bad_row == "skip"
        self._problems: list[Problem] = []
        self._total = 0

    def add(self, faults: list[RowError]) -> None:
        """Adds the faults of one row, at least one."""
        if self._skip and faults[0].kind != UNREADABLE:
            self.skipped[faults[0].kind] += 1
            return
        self._total += len(faults)
        remaining = MAX_SHOWN - len(self._problems)
        self._problems += [Problem(fault.where, fault.what) for fault in faults[:remaining]]

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
    names = [
        name if file == Path(source) else f"{name.rstrip('/')}/{file.relative_to(source).as_posix()}" for file in files
    ]
    return None, chosen, chain.from_iterable(map(read_rows, files, names))


def _settle_schema(
    rows: Rows, schema: Schema | None, findings: _Findings, name: str, method: MethodName
) -> tuple[Schema, Rows]:
    """The schema, by name or by the first row that is an object; and the rows, that one included."""
    among = METHODS[method].schemas
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
            if other := detect_schema(row.fields, REQUIRED.keys() - set(among)):
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


def _check_turns(schema: Schema, loss_on: LossOn, arguments: Mapping[str, Any] | None, *, templated: bool) -> None:
    """Refuses settings that mean something for messages alone, where rows are of another schema."""
    problems = []
    if loss_on in {"assistant", "last"} and schema != "messages":
        what = f"is {loss_on}, which learns turns of messages, and the rows are of the schema {schema}; use completion"
        problems.append(Problem("JOB_TRAIN__LOSS_ON", what))
    if arguments and not templated:
        what = f"is for rows of messages, and the rows are of the schema {schema}; remove it"
        problems.append(Problem("JOB_DATA__CHAT_TEMPLATE_ARGUMENTS", what))
    if problems:
        raise SettingsError(problems)


def _render_all(
    rows: Rows, schema: Schema, template: Template | None, control: _ControlTokens, *, turns: Turns | None
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
            yield in_conversations(faults, given)
            continue
        text = render(row, schema, template, turns=turns)
        if isinstance(text, RowError):
            yield in_conversations([text], given)
            continue
        control.count(texts_of(row, schema), row.where)
        yield text
