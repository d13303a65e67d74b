"""What is refused or logged about a data set as a whole: by its schema, the tokenizer, the settings, and its counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from job.data.chat_template import uses_date
from job.data.collect_examples import CollectedExamples
from job.data.notes import Notes
from job.data.preferences import SIDES
from job.data.schemas import Schema
from job.data.tokenization import LossOn, OnLongRow
from job.errors import DataError, Problem, SettingsError

_DEFAULT_SPLITS = ("train", "validation")


def check_tokenizer(tokenizer: Any, name: str, *, templated: bool) -> None:
    """Refuses a tokenizer that cannot end the rows' texts, or has no chat template for messages.

    Raises:
        DataError: It names the data set, `name`.
    """
    if templated:
        if not tokenizer.chat_template:
            what = (
                "holds messages, and the model's tokenizer has no chat template to render them; use an instruct model,"
                " or a copy of the model with a file chat_template.jinja in its folder (JOB_MODEL__ID=FOLDER)"
            )
            raise DataError([Problem(name, what)])
    elif tokenizer.eos_token_id is None:
        raise DataError([Problem(name, "cannot be terminated: the model's tokenizer has no end-of-sequence token")])


def check_settings(
    schema: Schema, loss_on: LossOn, arguments: Mapping[str, Any] | None, on_long_row: OnLongRow, *, templated: bool
) -> None:
    """Refuses settings that mean something only for other schemas than that of the rows.

    Raises:
        SettingsError: With all of them.
    """
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


def note_date(note: Notes, tokenizer: Any, date: str | None, *, templated: bool) -> None:
    """Notes which date a chat template sees, if it can write one."""
    if templated and uses_date(tokenizer):
        note("info", "the chat template can write the date; JOB_DATA__DATE sets it", date=date or "today")


def check_ends(note: Notes, ends: Counter[int | None], tokenizer: Any, name: str) -> None:
    """Refuses data in which no conversation has its end in the loss; logs the end if it is an unusual token.

    Args:
        note: Where what is logged is kept.
        ends: `CollectedExamples.ends`.
        tokenizer: The tokenizer.
        name: Of the data set.

    Raises:
        DataError: Trained on it, the model would never stop.
    """
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


def note_unexpected(note: Notes, collected: CollectedExamples, name: str, schema: Schema, limit: int | None) -> None:
    """Notes what one would not expect: control tokens, unused fields, too few rows, one label for all."""
    collected.remarks.note(note, name, collected.rows)
    _note_unused(note, collected.unused, name, schema)
    if limit is not None and collected.rows < limit:
        note("warning", "there are fewer rows than JOB_DATA__LIMIT", source=name, rows=collected.rows, limit=limit)
    if len(collected.labels) == 1 and None not in collected.labels:
        label = next(iter(collected.labels))
        note(
            "warning",
            "all answers have the same label, so training cannot learn a difference",
            source=name,
            label=label,
        )


def note_unused_split(note: Notes, split: str, name: str) -> None:
    """Warns that a split that somebody must have set chooses none of a source's rows, because it has no splits.

    Args:
        note: Takes the warning.
        split: `JOB_DATA__SPLIT`, or that of the validation rows.
        name: The source.
    """
    if split not in _DEFAULT_SPLITS:
        what = f"the split {split} has no effect: the source has no splits, and all its rows are used"
        note("warning", what, source=name, change="remove the setting, or name the file of these rows")


def note_equal_weights(note: Notes, weights: Iterable[float], name: str) -> None:
    """Warns that JOB_DATA__ROW_WEIGHTS changes nothing, as where the field has another name than `weight`.

    Args:
        note: Takes the warning.
        weights: Of the rows.
        name: The source.
    """
    if all(weight == 1 for weight in weights):
        what = "JOB_DATA__ROW_WEIGHTS has no effect: no row has a field weight other than 1"
        note("warning", what, source=name, change="JOB_DATA__FIELDS=weight=..., or remove the setting")


def _note_unused(note: Notes, unused: Counter[str], name: str, schema: Schema) -> None:
    if "weight" in unused:
        what = "rows have weights that are not used; set JOB_DATA__ROW_WEIGHTS=true, or remove them"
        note("warning", what, source=name, rows=unused["weight"])
    if unused:
        note("info", "fields that are not used", source=name, schema=schema, rows=dict(sorted(unused.items())))
