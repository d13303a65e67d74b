"""Rows whose prompt and completion are lists of messages (TRL's conversational prompt-completion), as messages.

| field | becomes |
|---|---|
| prompt: list of {role, content} | the first of messages, which are in the loss only with JOB_TRAIN__LOSS_ON=all |
| completion: list of {role, content} | the messages behind them |

If a row has `messages` beside them, these are its conversation, and prompt and completion are not used. A text is not
mixed with messages: TRL fails on such a row as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from job.data.fields import is_empty
from job.data.formats import Row, RowError, type_name

FIELDS = ("prompt", "completion")


def has_prompt_messages(fields: Mapping[str, Any]) -> bool:
    """Whether a row has a prompt and a completion, of which one is a list, as messages are."""
    return all(field in fields for field in FIELDS) and any(isinstance(fields[field], list) for field in FIELDS)


def are_the_conversation(fields: Mapping[str, Any]) -> bool:
    """Whether prompt and completion are the conversation of a row; not if it has `messages`, which are it then."""
    return has_prompt_messages(fields) and is_empty(fields.get("messages"))


def count_prompt_messages(fields: Mapping[str, Any]) -> int:
    """How many of the row's messages are its prompt; 0 for rows of another form."""
    return len(fields["prompt"]) if are_the_conversation(fields) else 0


def join_prompt_messages(row: Row) -> Row | list[RowError]:
    """The row with messages in place of prompt and completion, or all that prevents that."""
    faults = [fault for field in FIELDS for fault in _check_list(row, field)]
    if faults:
        return faults
    prompt, completion = (row.fields[field] for field in FIELDS)
    if not any(isinstance(message, dict) and _is_answer(message) for message in completion):
        what = "has no message of role assistant: there is nothing to learn"
        return [RowError("empty_target", f"{row.where} completion", what)]
    others = {name: value for name, value in row.fields.items() if name not in FIELDS}
    return Row(row.where, {**others, "messages": [*prompt, *completion]})


def in_prompt_and_completion(faults: list[RowError], original: Row) -> list[RowError]:
    """Faults of the joined row with their locations in the original row; those of other rows unchanged."""
    if not are_the_conversation(original.fields):
        return faults
    return [replace(fault, where=locate(fault.where, original)) for fault in faults]


def locate(where: str, original: Row) -> str:
    """A location in the messages of the joined row, as one in the original row's prompt or completion."""
    count, place = count_prompt_messages(original.fields), re.escape(f"{original.where} messages")
    if (match := re.fullmatch(rf"{place}(?:\[(\d+)\](.*))?", where, re.DOTALL)) is None:
        return where
    if match[1] is None:
        return f"{original.where} completion"
    index = int(match[1])
    field, index = ("prompt", index) if index < count else ("completion", index - count)
    return f"{original.where} {field}[{index}]{match[2]}"


def _is_answer(message: Mapping[str, Any]) -> bool:
    """Whether a message is an answer; one whose role is not valid may be, and is reported later."""
    role = message.get("role")
    return not isinstance(role, str) or role.strip().lower() not in {"system", "developer", "user", "tool"}


def _check_list(row: Row, field: str) -> list[RowError]:
    value, where = row.fields[field], f"{row.where} {field}"
    other = next(name for name in FIELDS if name != field)
    if value is None:
        return [RowError("missing_field", where, f"is null; it must be a list of messages, as {other} is")]
    if not isinstance(value, list):
        fix = f"it must be a list of messages, as {other} is: [{{role, content}}]"
        return [RowError("wrong_type", where, f"is {type_name(value)}; {fix}")]
    if not value:
        return [RowError("empty_target" if field == "completion" else "missing_field", where, "has no message")]
    return []
