"""Row schemas: which fields a row must have, what is wrong with one, and the text it is rendered to.

| schema | fields | text | completion |
|---|---|---|---|
| alpaca | instruction, output; input optional | tatsu-lab's template | output |
| prompt_completion | prompt, completion | both, end to end | completion |
| messages | messages: list of {role, content} | the tokenizer's chat template | the assistant's turns |
| text | text | as it is | all of it |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from job.data.formats import Row, RowError, is_valid_text, type_name

Schema = Literal["alpaca", "prompt_completion", "messages", "text"]
SCHEMAS: tuple[Schema, ...] = get_args(Schema)

# The last of them is the target: what is learned, and may not be empty.
REQUIRED: dict[Schema, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
_OPTIONAL: dict[Schema, tuple[str, ...]] = {"alpaca": ("input",), "prompt_completion": (), "messages": (), "text": ()}

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Prompt:
    """How to ask a model that learned from rows of a schema: in words, and the text around an instruction, if any."""

    about: str
    template: str | None = None


PROMPTS: dict[Schema, Prompt] = {
    "alpaca": Prompt("It learned from this prompt, with the instruction in its place:", _ALPACA_WITHOUT_INPUT),
    "prompt_completion": Prompt("It learned to go on from a prompt as it stands in the data, with nothing around it."),
    "messages": Prompt("It learned from conversations in the tokenizer's chat template."),
    "text": Prompt("It learned plain text, and goes on with whatever text it is given."),
}


@dataclass(frozen=True)
class Rendered:
    """A row as one text.

    Attributes:
        where: Where the row stands, and the longest of its fields, which is to blame if the row is too long.
        text: What is tokenised.
        completions: The spans (start, end) of its characters that a model is to produce.
    """

    where: str
    text: str
    completions: tuple[tuple[int, int], ...]


def detect_schema(fields: dict[str, Any]) -> Schema | None:
    """The first schema that a row fits, or at least has a field of; None if it has none.

    The order matters: Alpaca's own rows also have a `text`. A half fit counts, so that the field that is missing is
    what gets reported.
    """
    whole = (schema for schema in SCHEMAS if all(field in fields for field in REQUIRED[schema]))
    half = (schema for schema in SCHEMAS if any(field in fields for field in REQUIRED[schema]))
    return next(whole, None) or next(half, None)


def check_row(row: Row, schema: Schema) -> list[RowError]:
    """All that is wrong with a row's fields, apart from its length in tokens; empty for a good row."""
    faults = [_broken_text(f"{row.where} {field}") for field, value in row.fields.items() if not _is_clean(value)]
    if faults:
        return faults
    if schema == "messages":
        return _check_messages(row)
    *others, target = REQUIRED[schema]
    given = [field for field in _OPTIONAL[schema] if row.fields.get(field) is not None]
    faults = [fault for field in (*others, *given) for fault in _check_text(row.fields, field, row.where)]
    return faults + _check_target(row.fields, target, row.where)


def render(row: Row, schema: Schema, tokenizer: Any, *, find_turns: bool) -> Rendered | RowError:
    """The text of a row that `check_row` found good.

    Args:
        row: The row.
        schema: Its schema.
        tokenizer: Its chat template renders `messages`; no other schema uses it.
        find_turns: Whether to find the assistant's turns in a conversation, which takes two more renderings a turn;
            otherwise the whole conversation counts as completion.

    Returns:
        The rendered row; a fault where the chat template refuses the conversation.
    """
    if schema == "messages":
        return _render_messages(row, tokenizer, find_turns=find_turns)
    fields = row.fields
    if schema == "alpaca":
        context = fields.get("input") or ""
        template = _ALPACA_WITH_INPUT if context else _ALPACA_WITHOUT_INPUT
        prompt, completion = template.format(instruction=fields["instruction"], input=context), fields["output"]
    elif schema == "prompt_completion":
        prompt, completion = fields["prompt"], fields["completion"]
    else:
        prompt, completion = "", fields["text"]
    text = prompt + completion
    longest = max((*REQUIRED[schema], *_OPTIONAL[schema]), key=lambda field: len(fields.get(field) or ""))
    return Rendered(f"{row.where} {longest}", text, ((len(prompt), len(text)),))


def _check_text(fields: dict[str, Any], field: str, where: str) -> list[RowError]:
    place = f"{where} {field}"
    value = fields.get(field)
    if value is None:
        return [RowError("missing_field", place, "is null" if field in fields else "is missing")]
    if not isinstance(value, str):
        return [RowError("wrong_type", place, f"must be text, is {type_name(value)}")]
    return []


def _check_target(fields: dict[str, Any], field: str, where: str) -> list[RowError]:
    faults = _check_text(fields, field, where)
    if not faults and not fields[field].strip():
        return [RowError("empty_target", f"{where} {field}", "is empty: there is nothing to learn")]
    return faults


def _check_messages(row: Row) -> list[RowError]:
    place = f"{row.where} messages"
    messages = row.fields.get("messages")
    if messages is None:
        return [RowError("missing_field", place, "is null" if "messages" in row.fields else "is missing")]
    if not isinstance(messages, list):
        return [RowError("wrong_type", place, f"must be a list of messages, is {type_name(messages)}")]
    faults: list[RowError] = []
    for index, message in enumerate(messages):
        where = f"{place}[{index}]"
        if not isinstance(message, dict):
            faults.append(RowError("wrong_type", where, f"must be an object, is {type_name(message)}"))
            continue
        faults += [fault for field in ("role", "content") for fault in _check_text(message, field, where)]
        faults += [_broken_text(f"{where} {field}") for field, value in message.items() if not _is_clean(value)]
    if faults:
        return faults
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return [RowError("empty_target", place, "has no message of role assistant: there is nothing to learn")]
    return _check_target(messages[answers[-1]], "content", f"{place}[{answers[-1]}]")


def _is_clean(value: Any) -> bool:
    return not isinstance(value, str) or is_valid_text(value)


def _broken_text(where: str) -> RowError:
    return RowError("broken_utf8", where, "is not valid UTF-8 text")


def _render_messages(row: Row, tokenizer: Any, *, find_turns: bool) -> Rendered | RowError:
    from jinja2 import TemplateError

    messages = row.fields["messages"]
    place = f"{row.where} messages"
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        turns = _assistant_turns(text, messages, tokenizer) if find_turns else ((0, len(text)),)
    except (TemplateError, TypeError, ValueError) as error:
        return RowError("bad_conversation", place, f"is refused by the tokenizer's chat template: {error}")
    if turns is None:
        what = (
            "cannot be split into turns: the chat template changes earlier turns when later ones follow; learn on all"
        )
        return RowError("bad_conversation", place, what)
    return Rendered(place, text, turns)


def _assistant_turns(text: str, messages: list[dict[str, Any]], tokenizer: Any) -> tuple[tuple[int, int], ...] | None:
    """Spans of the assistant's turns in `text`, which is all of `messages` rendered.

    A turn runs from where the prompt for it ends (the messages before it, and the header that asks for an answer) to
    where the conversation cut off behind it ends. None if a cut conversation is not how the whole one begins.
    """
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        through = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not text.startswith(through):
            return None
        before = (
            tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True) if index else ""
        )
        # The header may promise more than the turn has, such as an empty block of thoughts.
        turns.append((_common_length(before, through), len(through)))
    return tuple(turns)


def _common_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
