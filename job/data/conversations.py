"""Rows of messages: checks them, and renders them with the tokenizer's chat template.

| field | meaning |
|---|---|
| messages | a list of {role, content}; other fields of a message, such as `tool_calls`, go to the template as well |
| messages[].content | text, or a list of parts {type: text, text}; may be absent where tools are called |
| messages[].weight | 0: the message is context only and never in the loss; 1 or absent: it is in the loss |
| messages[].train, ... | the same, under the names that other tools have for it (`LEARNED`) |
| tools | the tools that may be called: a list of objects, or that list as JSON text |

Only the template decides which order of roles is valid: templates differ, and rows with tools have many orders. A
message that the template ignores is an error. A field that it ignores is missing from the rendered text: for tools,
tool calls and the last answer's reasoning that is an error, too; other ignored fields are counted and reported. A field
that selects target tokens in a way that is not supported is an error. Rows of ShareGPT's form: `job.data.sharegpt`.

The assistant's turns are found in one of two ways. Where JOB_TRAIN__LOSS_ON is `assistant`, and the template has
`{% generation %}` marks or TRL has a training template with marks for it, the marks are used. Otherwise two renderings
are compared for each turn: of the conversation up to the turn, and through it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

from job.data.chat_template import Template, TemplateRefusalError
from job.data.fields import Rendered, check_target, check_text, is_empty, is_zero, left_out
from job.data.formats import Row, RowError, type_name, without_nulls

Turns = Literal["completion", "assistant", "last"]
"""Which turns of a conversation are targets: all of the assistant's turns (`completion`, `assistant`), or the last one.
With `completion` they are always found by comparison, and need not end with a special token."""

Span = tuple[int, int]
_USED = ("messages", "tools")
_CALLS = ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking", "refusal")
"""Parts of an answer besides its content. Templates write them for the last answer only."""
_NO_TEXT = ("audio", "image", "images", "video", "videos")
LEARNED = ("weight", "train", "training", "trainable", "train_on_turn", "loss", "loss_weight")
"""Fields that say whether a message is in the loss, in OpenAI's and other tools' formats: 0 or 1, or a flag."""
_OTHER_MASKS = ("mask", "masked", "loss_mask", "ignore", "ignore_loss", "train_detail")
"""Fields that say the same in ways that differ from tool to tool."""
_BY_CHANCE = 16
"""Length in characters from which a text of a conversation is not expected twice in it."""
_LEARNED_IF_FALSE = ("masked", "ignore", "ignore_loss")
"""Of these, those of which false can only mean that the message is in the loss."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_FIRST = ("system", "developer")
"""Roles that usually come before all others."""
_OTHER_NAMES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "ai"), "assistant")}
"""Speakers in other formats: most chat templates write any role unchanged, and the model was not trained on these."""
_OF_A_MESSAGE = ("role", "content", *LEARNED)


def _text_of(content: Any) -> Any:
    """A content as one text, where it is parts of text; None is empty text, and anything else is unchanged."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) and content else None
    if parts is None or not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return content
    texts = [part.get("text") for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def texts_of_messages(messages: Iterable[dict[str, Any]]) -> list[str]:
    """The texts of good messages."""
    return [text for message in messages if (text := _text_of(message.get("content")))]


def check_messages(row: Row) -> list[RowError]:
    """Everything that is wrong with the messages and tools of a row; empty if the row is valid."""
    where = f"{row.where} messages"
    messages = row.fields.get("messages")
    if messages is None:
        return [RowError("missing_field", where, "is null" if "messages" in row.fields else "is missing")]
    if not isinstance(messages, list):
        table = "; a table cannot contain lists: write the rows as JSON lines" if isinstance(messages, str) else ""
        return [RowError("wrong_type", where, f"must be a list of messages, is {type_name(messages)}{table}")]
    faults: list[RowError] = []
    for index, message in enumerate(messages):
        message_where = f"{where}[{index}]"
        if not isinstance(message, dict):
            faults.append(RowError("wrong_type", message_where, f"must be an object, is {type_name(message)}"))
            continue
        silent = message.get("content") is None and any(message.get(field) for field in _CALLS)
        required = ("role",) if silent else ("role", "content")  # an assistant that calls a tool need not say anything
        read = {**message, "content": _text_of(message["content"])} if message.get("content") is not None else message
        faults += [fault for field in required for fault in check_text(read, field, message_where)]
        faults += check_role(message, message_where)
        faults += _check_weight(message, message_where)
    faults += _check_tools(row)
    if faults:
        return faults
    return _check_answers(messages, where)


def check_role(message: dict[str, Any], where: str) -> list[RowError]:
    """Refuses a role that is one of `_ROLES` under another name; an unknown role is left to the template."""
    role = message.get("role")
    plain = role.strip().lower() if isinstance(role, str) else None
    meant = plain if plain in _ROLES else _OTHER_NAMES.get(plain or "")
    if meant is None or meant == role:
        return []
    return [RowError("wrong_type", f"{where} role", f"is {role!a}, which is not a role; rename it to {meant!r}")]


def _check_answers(messages: list[dict[str, Any]], where: str) -> list[RowError]:
    """What is wrong with the last answer that has target tokens."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return [RowError("empty_target", where, "has no message of role assistant: there is nothing to learn")]
    learned = [index for index in answers if not _is_unlearned(messages[index])]
    if not learned:
        return [RowError("empty_target", where, "has no message of role assistant whose weight is not 0")]
    last = messages[learned[-1]]
    if any(last.get(field) for field in _CALLS):
        return []
    return check_target(_with_content(last), "content", f"{where}[{learned[-1]}]")


def _is_unlearned(message: dict[str, Any]) -> bool:
    return any(is_zero(message.get(field)) for field in LEARNED)


def _check_weight(message: dict[str, Any], where: str) -> list[RowError]:
    faults = []
    for field in LEARNED:
        value = message.get(field)
        if value is not None and not (isinstance(value, int | float) and value in {0, 1}):
            fault = "must be 0 (context only) or 1; other weights are not supported"
            faults.append(RowError("wrong_type", f"{where} {field}", fault))
    for field in _OTHER_MASKS:
        if not is_empty(message.get(field)) and (message[field] is not False or field not in _LEARNED_IF_FALSE):
            fault = "selects the messages to learn in an unknown way; give each message the field weight: 0 or 1"
            faults.append(RowError("field_without_use", f"{where} {field}", fault))
    return faults


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
    if is_empty(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"is {type_name(tools)}")
    return tools


def _from_a_table(tools: list[dict[str, Any]] | None) -> bool:
    """Whether the row was written from a table, in which each tool has the parameters of all others, as null.

    No parameter is described by null otherwise.
    """
    functions = (tool.get("function", tool) for tool in tools or ())
    parameters = (one.get("parameters") for one in functions if isinstance(one, dict))
    described = (one.get("properties") for one in parameters if isinstance(one, dict))
    return any(None in one.values() for one in described if isinstance(one, dict))


def render_messages(
    row: Row, template: Template, *, turns: Turns | None, prompt_messages: int = 0
) -> Rendered | RowError:
    """The text of a valid conversation, with these turns as its completions; None for all of the text.

    Args:
        row: The row.
        template: The chat template.
        turns: Which turns are the completions.
        prompt_messages: How many of the first messages are a prompt, which has no completion in it. With `completion`
            all messages behind it are the completion then, as in TRL's trainer.

    Raises:
        DataError: The chat template is broken, or exceeds its time or memory limit.
    """
    where = f"{row.where} messages"
    tools, plain = _tools(row.fields), row.fields["messages"]
    if _from_a_table(tools):
        tools, plain = without_nulls(tools), without_nulls(plain)
    plain_texts = [_with_content(message) for message in plain]
    try:
        messages, text = _render_accepted(plain_texts, tools, template)
        unused = [*left_out(row, _USED), *_unused_in_messages(messages, tools, text, template)]
        if field := next((name for name in unused if _is_missed(name, messages)), None):
            return RowError(
                "field_without_use", where, f"has {field}, which the tokenizer's chat template does not write"
            )
        if tools is not None and _rendered(template, messages, None) == text:
            fault = "is not written by the tokenizer's chat template; use a model whose template writes tools"
            return RowError("field_without_use", f"{row.where} tools", fault)
        if (index := _unwritten(messages, tools, text, template)) is not None:
            fault = f"is not written by the tokenizer's chat template, which ignores this {messages[index]['role']!a}"
            return RowError("field_without_use", f"{where}[{index}]", fault)
        split_text = _find_turns(messages, tools, text, template, turns, prompt_messages=prompt_messages)
    except TemplateRefusalError as error:
        what = f"is refused by the tokenizer's chat template: {error}"
        if (odd := _refused_order(plain_texts, tools, template)) is not None:
            index, order = odd
            where, what = f"{where}[{index}]", f"{what}; {order}"
        return RowError("bad_conversation", where, what)
    if split_text is None:
        fault = (
            "cannot be split into turns: the chat template changes earlier turns when later ones follow;"
            " set JOB_TRAIN__LOSS_ON=all, or last to learn only the last turn"
        )
        return RowError("bad_conversation", where, fault)
    text, learned, ignored = split_text
    return Rendered(where, text, learned, ignored, tuple(unused), must_end=turns in {"assistant", "last"})


def _refused_order(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, template: Template
) -> tuple[int, str] | None:
    """Index and `odd_order` of the message at which a template refuses a conversation; None: not for such an order.

    It is the message whose role is unusual at its place, if the template refuses the conversation through it but not
    without it. Nothing but system messages before it is no conversation, which some templates refuse.
    """
    if (odd := odd_order(messages)) is None or _rendered(template, messages[: odd[0] + 1], tools) is not None:
        return None
    before = messages[: odd[0]]
    alone = all(message["role"] in _FIRST for message in before)
    return odd if alone or _rendered(template, before, tools) is not None else None


def odd_order(messages: Sequence[dict[str, Any]]) -> tuple[int, str] | None:
    """Index of the first message whose role is unusual after the one before it, and the two in words; None: no such.

    It explains why a template refuses a conversation, and refuses nothing itself.
    """
    roles = [None, *(message["role"] for message in messages)]
    for index, (before, role) in enumerate(pairwise(roles)):
        known = {"user": ("user",), "assistant": (None, *_FIRST, "assistant"), "tool": (None, *_FIRST, "user")}
        odd = before not in {None, *_FIRST} if role in _FIRST else before in known.get(str(role), ())
        if odd:
            order = f"{role!a} is the first" if before is None else f"{role!a} follows {before!a}"
            return index, f"the order of the roles is unusual: {order}"
    return None


def _find_turns(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    text: str,
    template: Template,
    turns: Turns | None,
    *,
    prompt_messages: int,
) -> tuple[str, tuple[Span, ...], tuple[Span, ...]] | None:
    """(text, learned spans, spans that are never learned); None if the spans of the turns cannot be determined.

    Args:
        messages: The conversation.
        tools: Tools of the conversation.
        text: The conversation as rendered by the template.
        template: The chat template.
        turns: Which turns are learned; None for the whole text.
        prompt_messages: How many of the first messages are a prompt.
    """
    ignored = [index for index, message in enumerate(messages) if _is_unlearned(message)]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    target_turns = [index for index in answers if index >= prompt_messages]
    target_turns = [] if turns is None else target_turns[-1:] if turns == "last" else target_turns
    # With `last`, only the model's own template may mark turns: TRL's training templates render another text.
    if (turns == "assistant" and template.marks) or (turns == "last" and template.marks == "own"):
        marked, spans = template.marked(messages, tools=tools)
        if len(spans) == len(answers):
            behind = _behind_prompt(spans, marked, messages[:prompt_messages], tools, template)
            of_turn = dict(zip(answers, behind, strict=True))
            return marked, tuple(of_turn[index] for index in target_turns if index not in ignored), ()
        if turns == "assistant" and not ignored and not prompt_messages:
            return marked, spans, ()
    completion: tuple[Span, ...] = ()
    if turns == "completion" and prompt_messages:
        target_turns, start = [], _prompt_length(text, messages[:prompt_messages], tools, template)
        last = messages[prompt_messages - 1]["content"]
        if isinstance(last, str) and last.strip() not in text[:start]:
            return None
        completion = ((start, len(text)),)
    compared = {
        index: _turn(index, text, messages, tools, template)
        for index in sorted({*target_turns, *(ignored if turns in {None, "completion"} else ())})
    }
    span_of = {index: span for index, span in compared.items() if span is not None}
    if len(span_of) < len(compared):
        return None
    learned = tuple(span_of[index] for index in target_turns if index not in ignored)
    whole = ((0, len(text)),) if turns is None else completion or learned
    return text, whole, tuple(span_of[index] for index in ignored if index in span_of)


def _prompt_length(
    text: str, prompt: list[dict[str, Any]], tools: list[dict[str, Any]] | None, template: Template
) -> int:
    """Where the completion begins in a text: behind what it has in common with the prompt that asks for it."""
    return _common_length(template(prompt, tools=tools, add_generation_prompt=True), text)


def _behind_prompt(
    spans: Sequence[Span],
    text: str,
    prompt: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    template: Template,
) -> list[Span]:
    """Marked spans without what the prompt of a row has of them: Qwen2.5's marks begin within the generation prompt."""
    begin = _prompt_length(text, prompt, tools, template) if prompt else 0
    return [(min(max(start, begin), stop), stop) for start, stop in spans]


def _unwritten(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, text: str, template: Template
) -> int | None:
    """The index of the first message that the template ignores entirely; None if there is none.

    The template ignores a message if the text without it is the same. This is tested for messages whose content is not
    in the text, and for short ones, whose content may be in the text by chance, except those of user and assistant.
    """
    for index, message in enumerate(messages):
        content = message["content"].strip() if isinstance(message["content"], str) else ""
        by_chance = len(content) < _BY_CHANCE and message["role"] not in {"user", "assistant"}
        if not content or (content in text and not by_chance):
            continue
        if _rendered(template, [*messages[:index], *messages[index + 1 :]], tools) == text:
            return index
    return None


def _is_missed(unused: str, messages: list[dict[str, Any]]) -> bool:
    """Whether a field that the template does not render means that the text lacks something."""
    name = unused.removeprefix("messages[].")
    last = next(message for message in reversed(messages) if message["role"] == "assistant")
    return name != unused and (name in {*_CALLS, *_NO_TEXT} or (name in _REASONING and not is_empty(last.get(name))))


def _with_content(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content as one text, which every template can render.

    A message that only calls tools gets an empty content, because templates render a missing one as `None`.
    """
    return {**message, "content": _text_of(message.get("content"))}


def _render_accepted(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, template: Template
) -> tuple[list[dict[str, Any]], str]:
    """The messages in the form that the template accepts, and the rendered conversation.

    As in OpenAI's format, the arguments of a tool call are JSON text, but most templates expect an object: they would
    quote the text a second time. The few templates that expect text refuse the object, and get the text.
    """
    parsed = [_with_parsed_arguments(message) for message in messages]
    if parsed == messages:
        return messages, template(messages, tools=tools)
    try:
        return parsed, template(parsed, tools=tools)
    except TemplateRefusalError:
        return messages, template(messages, tools=tools)


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
    """The tool call; arguments that are the JSON text of an object are replaced by the object."""
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
    """The fields of messages that the template ignores, so that the text is the same without them."""
    names = Counter(
        name
        for message in messages
        for name, value in message.items()
        if name not in _OF_A_MESSAGE and not is_empty(value)
    )

    def without(name: str) -> list[dict[str, Any]]:
        return [{key: value for key, value in message.items() if key != name} for message in messages]

    return [f"messages[].{name}" for name in names if _rendered(template, without(name), tools) == text]


def _rendered(template: Template, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str | None:
    """The text of a conversation from which something was removed; None if the template then refuses it."""
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
    """The span of a message in `text`, which is the rendering of all `messages`.

    It starts where the rendering of the messages before it ends (for the assistant, including the generation prompt),
    and ends where the rendering up to this message ends. None if the rendering of the messages up to this one is not a
    prefix of `text`.
    """
    through = template(messages[: index + 1], tools=tools)
    if not text.startswith(through):
        return None
    asks = messages[index]["role"] == "assistant"
    before = template(messages[:index], tools=tools, add_generation_prompt=asks) if index else ""
    # The generation prompt may contain text that the turn lacks, such as an empty block of reasoning.
    return _common_length(before, through), len(through)


def _common_length(first: str, second: str) -> int:
    """Length of the common prefix of two texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
