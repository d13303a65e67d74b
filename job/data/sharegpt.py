"""Rows in ShareGPT's form, brought into the form of messages before anything else looks at them.

| field | becomes |
|---|---|
| conversations: list of {from, value} | messages: list of {role, content}; other fields of a turn stay |
| system | the first message |
| from: human, user / gpt, chatgpt, assistant, model / system | role: user / assistant / system |
| from: tool, observation, function_response | role: tool |
| from: function_call, whose value is the JSON of {name, arguments} or a list of such | an assistant's tool_calls |

A turn may have role and content in place of from and value.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from job.data.fields import is_empty
from job.data.formats import Row, RowError, type_name

FIELD = "conversations"
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_CALL = "function_call"


def is_sharegpt(fields: dict[str, Any]) -> bool:
    """Whether a row is of this form: it has conversations and no messages."""
    return FIELD in fields and "messages" not in fields


def as_messages(row: Row) -> Row | list[RowError]:
    """The row with messages in place of conversations, or all that prevents that."""
    where = f"{row.where} {FIELD}"
    turns = row.fields[FIELD]
    if not isinstance(turns, list):
        kind, what = ("missing_field", "is null") if turns is None else ("wrong_type", f"is {type_name(turns)}")
        return [RowError(kind, where, f"{what}; it must be a list of turns, {{from, value}}")]
    faults: list[RowError] = []
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        message = _message(turn, f"{where}[{index}]")
        if isinstance(message, RowError):
            faults.append(message)
        else:
            messages.append(message)
    system = row.fields.get("system")
    if not is_empty(system):
        if not isinstance(system, str):
            faults.append(RowError("wrong_type", f"{row.where} system", f"must be text, is {type_name(system)}"))
        elif messages and messages[0]["role"] == "system":
            faults.append(
                RowError("wrong_type", f"{row.where} system", "is given twice: the first turn is a system message, too")
            )
        else:
            messages.insert(0, {"role": "system", "content": system})
    if faults:
        return faults
    others = {name: value for name, value in row.fields.items() if name not in {FIELD, "system"}}
    return Row(row.where, {**others, "messages": messages})


def in_conversations(faults: list[RowError], original: Row) -> list[RowError]:
    """Faults of the converted row with their locations in the original row; others unchanged."""
    if not is_sharegpt(original.fields):
        return faults
    shift = 0 if is_empty(original.fields.get("system")) else 1  # the system prompt comes before the turns

    def relocate(fault: RowError) -> RowError:
        before, messages, rest = fault.where.partition(f"{original.where} messages")
        if before or not messages:
            return fault
        rest = re.sub(r"^\[(\d+)\]", lambda match: f"[{int(match[1]) - shift}]", rest)
        return replace(fault, where=f"{original.where} {FIELD}{rest}")

    return [relocate(fault) for fault in faults]


def _message(turn: Any, where: str) -> dict[str, Any] | RowError:
    if not isinstance(turn, dict):
        return RowError("wrong_type", where, f"must be an object, is {type_name(turn)}")
    speaker_field, content_field = ("from", "value") if "from" in turn else ("role", "content")
    speaker, value = turn.get(speaker_field), turn.get(content_field)
    if speaker is None:
        return RowError("missing_field", f"{where} from", "is missing")
    other_fields = {name: item for name, item in turn.items() if name not in {speaker_field, content_field}}
    if speaker == _CALL:
        return _with_calls(value, other_fields, f"{where} {content_field}")
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join((*_ROLES, _CALL))
        return RowError("wrong_type", f"{where} {speaker_field}", f"is an unknown speaker; known are {known}")
    if not isinstance(value, str) and not (value is None and other_fields.get("tool_calls")):
        kind, why = ("missing_field", "is missing") if value is None else ("wrong_type", f"is {type_name(value)}")
        return RowError(kind, f"{where} {content_field}", f"{why}; it must be text")
    return {"role": role, "content": value, **other_fields}


def _with_calls(value: Any, other_fields: dict[str, Any], where: str) -> dict[str, Any] | RowError:
    """The assistant's message that calls tools."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        parsed = None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return RowError("wrong_type", where, "must be the JSON of a call, {name, arguments}, or of a list of calls")
    made = [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]
    return {"role": "assistant", "content": None, "tool_calls": made, **other_fields}
