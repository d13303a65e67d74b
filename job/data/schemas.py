"""Row schemas: which fields a row must have, what is wrong with one, and the text it is rendered to.

| schema | fields | text | completion |
|---|---|---|---|
| alpaca | instruction, output; optional: input, system, history | tatsu-lab's template | output |
| prompt_completion | prompt, completion | both, end to end | completion |
| messages | messages: list of {role, content}; optional: tools | the chat template | the assistant's turns |
| text | text | as it is | all of it |

Alpaca's `system` takes the place of the template's first sentence, and each pair of `history` stands as a turn of its
own before the instruction; both are prompt. A message of weight 0 is read and never learned. Fields that mean something
which a schema cannot express are refused (`_MEANING`); others are left out and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from job.data.chat_template import Template, TemplateRefusalError
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
_OPTIONAL: dict[Schema, tuple[str, ...]] = {
    "alpaca": ("input", "system", "history"),
    "prompt_completion": (),
    "messages": ("tools",),
    "text": (),
}
MAX_CHARACTERS = 4 << 20
"""Of one text in a row: more would take minutes to tokenize, and no model reads as much."""

_OF_IMAGES = "the job trains on text alone; remove the field if the text means something without it"
_OF_PAIRS = "the job learns from single answers, not from pairs of them (DPO); give the good one as the completion"
_MEANING: dict[str, str] = {
    **dict.fromkeys(("chosen", "rejected"), _OF_PAIRS),
    "system": "put it into the first message, or in front of the prompt",
    "history": "put the earlier turns into messages, or in front of the prompt",
    "tools": "tools are given to a chat template with rows of the schema messages",
    "functions": "give them as `tools` with rows of the schema messages",
    "documents": "write them into the messages",
    "chat_template_kwargs": "remove the field, or write what it stands for into the messages",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _OF_IMAGES),
}
"""Fields that say what a row means, and what to do where its schema has no place for them. Plain text has all of it."""
_CALLS = ("tool_calls", "function_call")
_OF_A_MESSAGE = ("role", "content", "weight")

_PREAMBLE = "Below is an instruction that describes a task. "
_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
)
_REQUEST = "Write a response that appropriately completes the request."
_TURN = "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
_TURN_WITH_INPUT = "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
_ALPACA_WITHOUT_INPUT = _PREAMBLE + _REQUEST + _TURN


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
        ignored: The spans that are never learned, whatever the loss is on.
        unused: The fields that were left out.
    """

    where: str
    text: str
    completions: tuple[tuple[int, int], ...]
    ignored: tuple[tuple[int, int], ...] = ()
    unused: tuple[str, ...] = ()


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
    if broken := [place for field, value in row.fields.items() for place in _broken(value, f"{row.where} {field}")]:
        return [RowError("broken_utf8", place, "is not valid UTF-8 text; save the file as UTF-8") for place in broken]
    faults = _check_meaning(row, schema)
    if schema == "messages":
        return faults + _check_messages(row)
    *others, target = REQUIRED[schema]
    given = [field for field in _OPTIONAL[schema] if row.fields.get(field) is not None and field != "history"]
    faults += [fault for field in (*others, *given) for fault in _check_text(row.fields, field, row.where)]
    if schema == "alpaca":
        faults += _check_history(row)
    return faults + _check_target(row.fields, target, row.where)


def texts_of(row: Row, schema: Schema) -> list[str]:
    """The texts of a good row that become part of what is trained on."""
    if schema == "messages":
        return [message["content"] for message in row.fields["messages"] if message.get("content")]
    return [text for field in (*_OPTIONAL[schema], *REQUIRED[schema]) if isinstance(text := row.fields.get(field), str)]


def render(row: Row, schema: Schema, template: Template | None, *, find_turns: bool) -> Rendered | RowError:
    """The text of a row that `check_row` found good.

    Args:
        row: The row.
        schema: Its schema.
        template: Renders `messages`; no other schema uses it.
        find_turns: Whether to find the assistant's turns in a conversation, which takes two more renderings a turn;
            otherwise the whole conversation counts as completion.

    Returns:
        The rendered row; a fault where the chat template refuses the conversation.

    Raises:
        DataError: The chat template is broken, or runs out of its bounds.
    """
    if schema == "messages":
        if template is None:
            raise ValueError("messages need a chat template")
        return _render_messages(row, template, find_turns=find_turns)
    fields = row.fields
    if schema == "alpaca":
        prompt, completion = _alpaca_prompt(fields), fields["output"]
    elif schema == "prompt_completion":
        prompt, completion = fields["prompt"], fields["completion"]
    else:
        prompt, completion = "", fields["text"]
    text = prompt + completion
    longest = max((*REQUIRED[schema], *_OPTIONAL[schema]), key=lambda field: len(str(fields.get(field) or "")))
    return Rendered(f"{row.where} {longest}", text, ((len(prompt), len(text)),), unused=_unused(row, schema))


def _alpaca_prompt(fields: dict[str, Any]) -> str:
    """Everything before the output, as tatsu-lab wrote it; with a system prompt and earlier turns where there are."""
    context, system = fields.get("input") or "", fields.get("system") or ""
    begin = system or (_PREAMBLE_WITH_INPUT if context else _PREAMBLE) + _REQUEST
    turns = [_TURN.format(instruction=asked) + answer for asked, answer in fields.get("history") or ()]
    turn = _TURN_WITH_INPUT if context else _TURN
    return begin + "".join(turns) + turn.format(instruction=fields["instruction"], input=context)


def _unused(row: Row, schema: Schema) -> tuple[str, ...]:
    """The fields of a row that hold something and are not part of its schema."""
    used = {*REQUIRED[schema], *_OPTIONAL[schema]}
    return tuple(field for field, value in row.fields.items() if field not in used and not _is_empty(value))


def _check_meaning(row: Row, schema: Schema) -> list[RowError]:
    """Fields that say what the row means, and have no place in its schema: without them it is another row."""
    faults = []
    if schema != "text":
        outside = [
            field for field in _MEANING if field not in _OPTIONAL[schema] and not _is_empty(row.fields.get(field))
        ]
        faults = [
            RowError(
                "field_without_use", f"{row.where} {field}", f"has no use in the schema {schema}: {_MEANING[field]}"
            )
            for field in outside
        ]
    if _is_zero(row.fields.get("weight")):
        what = "is 0, and a row cannot be weighed; leave the row out, or give messages their weights"
        faults.append(RowError("field_without_use", f"{row.where} weight", what))
    if schema == "prompt_completion" and row.fields.get("label") is False:
        what = "is false, so the completion is a bad one (KTO), and it would be learned; leave the row out"
        faults.append(RowError("field_without_use", f"{row.where} label", what))
    return faults


def _check_history(row: Row) -> list[RowError]:
    history, place = row.fields.get("history"), f"{row.where} history"
    if history is None:
        return []
    pairs = isinstance(history, list | tuple) and all(
        isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str] for pair in history
    )
    return [] if pairs else [RowError("wrong_type", place, "must be a list of pairs, [instruction, output]")]


def _check_text(fields: dict[str, Any], field: str, where: str) -> list[RowError]:
    place = f"{where} {field}"
    value = fields.get(field)
    if value is None:
        return [RowError("missing_field", place, "is null" if field in fields else "is missing")]
    if not isinstance(value, str):
        return [RowError("wrong_type", place, f"must be text, is {type_name(value)}")]
    if len(value) > MAX_CHARACTERS:
        return [RowError("too_long", place, f"has {len(value):,} characters, {MAX_CHARACTERS:,} are the most")]
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
        silent = message.get("content") is None and any(message.get(field) for field in _CALLS)
        required = ("role",) if silent else ("role", "content")  # an assistant that calls a tool need not say anything
        faults += [fault for field in required for fault in _check_text(message, field, where)]
        faults += _check_weight(message, where)
    faults += _check_tools(row)
    if faults:
        return faults
    return _check_answers(messages, place)


def _check_answers(messages: list[dict[str, Any]], place: str) -> list[RowError]:
    """What is wrong with the last answer that is learned."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return [RowError("empty_target", place, "has no message of role assistant: there is nothing to learn")]
    learned = [index for index in answers if not _is_zero(messages[index].get("weight"))]
    if not learned:
        return [RowError("empty_target", place, "has no message of role assistant whose weight is not 0")]
    last = messages[learned[-1]]
    if any(last.get(field) for field in _CALLS):
        return []
    return _check_target(last, "content", f"{place}[{learned[-1]}]")


def _check_weight(message: dict[str, Any], where: str) -> list[RowError]:
    weight = message.get("weight")
    if weight is None or (isinstance(weight, int | float) and weight in {0, 1}):
        return []
    return [RowError("wrong_type", f"{where} weight", "must be 0 (not learned) or 1; no other weight is known")]


def _check_tools(row: Row) -> list[RowError]:
    try:
        _tools(row.fields)
    except ValueError as error:
        return [RowError("wrong_type", f"{row.where} tools", f"must be a list of objects, or that as JSON: {error}")]
    return []


def _tools(fields: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools that a conversation may call, which some write as JSON text; None for none."""
    tools = fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = json.loads(tools)
    if _is_empty(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"is {type_name(tools)}")
    return tools


def _is_empty(value: Any) -> bool:
    """Whether a field holds nothing, as tables must in the rows that lack it."""
    return value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip())


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _broken(value: Any, place: str) -> Iterator[str]:
    """The places of texts in a value that are not UTF-8."""
    if isinstance(value, str):
        if not is_valid_text(value):
            yield place
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _broken(item, f"{place} {key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _broken(item, f"{place}[{index}]")


def _render_messages(row: Row, template: Template, *, find_turns: bool) -> Rendered | RowError:
    place = f"{row.where} messages"
    tools = _tools(row.fields)
    given = [_with_content(message) for message in row.fields["messages"]]
    try:
        messages, text = _render_all(given, tools, template)
        unused = [*_unused(row, "messages"), *_unused_in_messages(messages, tools, text, template)]
        for field, where in ((name, place) for name in unused if name.removeprefix("messages[].") in _CALLS):
            return RowError(
                "field_without_use", where, f"has {field}, which the tokenizer's chat template does not write"
            )
        if tools is not None and _rendered(template, messages, None) == text:
            what = "is not written by the tokenizer's chat template; use a model whose template writes tools"
            return RowError("field_without_use", f"{row.where} tools", what)
        ignored = [index for index, message in enumerate(messages) if _is_zero(message.get("weight"))]
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = sorted({*ignored, *(answers if find_turns else ())})
        spans = {index: _turn(index, text, messages, tools, template) for index in wanted}
    except TemplateRefusalError as error:
        return RowError("bad_conversation", place, f"is refused by the tokenizer's chat template: {error}")
    turns = {index: span for index, span in spans.items() if span is not None}
    if len(turns) < len(spans):
        what = (
            "cannot be split into turns: the chat template changes earlier turns when later ones follow; learn on all"
        )
        return RowError("bad_conversation", place, what)
    learned = [turns[index] for index in answers if index not in ignored] if find_turns else [(0, len(text))]
    return Rendered(place, text, tuple(learned), tuple(turns[index] for index in ignored), tuple(unused))


def _with_content(message: dict[str, Any]) -> dict[str, Any]:
    """The message, with an empty content where it only calls tools: templates write a missing one as `None`."""
    return message if message.get("content") is not None else {**message, "content": ""}


def _render_all(
    given: list[dict[str, Any]], tools: list[dict[str, Any]] | None, template: Template
) -> tuple[list[dict[str, Any]], str]:
    """The whole conversation, and the messages in the form that the template takes.

    Arguments of a tool call come as JSON text, as OpenAI has them, and most templates expect an object: text would be
    written with a second layer of quotes. The few that expect text refuse the object, and get what was given.
    """
    parsed = [_with_parsed_arguments(message) for message in given]
    if parsed == given:
        return given, template(given, tools=tools)
    try:
        return parsed, template(parsed, tools=tools)
    except TemplateRefusalError:
        return given, template(given, tools=tools)


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
    """A tool call, its arguments as an object where they are the JSON of one."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_object(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        arguments = json.loads(call["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _unused_in_messages(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, text: str, template: Template
) -> list[str]:
    """The fields of messages that change nothing in the text: the template does not write them."""
    names = Counter(
        name
        for message in messages
        for name, value in message.items()
        if name not in _OF_A_MESSAGE and not _is_empty(value)
    )

    def without(name: str) -> list[dict[str, Any]]:
        return [{key: value for key, value in message.items() if key != name} for message in messages]

    return [f"messages[].{name}" for name in names if _rendered(template, without(name), tools) == text]


def _rendered(template: Template, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str | None:
    """The text of a conversation that lacks something; None where the template, which looks for that, refuses it."""
    try:
        return template(messages, tools=tools)
    except TemplateRefusalError:
        return None


def _turn(
    index: int,
    text: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    template: Template,
) -> tuple[int, int] | None:
    """The span of a message in `text`, which is all of `messages` rendered.

    It runs from where the prompt for it ends (the messages before it, and for the assistant the header that asks for
    an answer) to where the conversation cut off behind it ends. None if a cut conversation is not how the whole one
    begins.
    """
    through = template(messages[: index + 1], tools=tools)
    if not text.startswith(through):
        return None
    asks = messages[index]["role"] == "assistant"
    before = template(messages[:index], tools=tools, add_generation_prompt=asks) if index else ""
    # The header may promise more than the turn has, such as an empty block of thoughts.
    return _common_length(before, through), len(through)


def _common_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
