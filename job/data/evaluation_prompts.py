"""The prompts of `JOB_EVAL__PROMPTS`, which base and adapter answer: rows of a file, or the first validation rows.

| a row of the file | the prompt |
|---|---|
| `{"prompt": "The sky is"}` | the unchanged text |
| `{"instruction": "Name a colour.", "input": ""}` | Alpaca's, as training writes it |
| `messages`, `conversations`, or a list as `prompt` | by the chat template, with its generation prompt |
| a line of a `.txt` file | like the rows that are trained on: a user's message, Alpaca's instruction, or a text |

So a file of training rows may be given unchanged: what the row answers itself (the last turn of the assistant,
`output`, `completion`, `chosen`) is left out of the prompt and kept as its reference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from job.data.chat_template import Template, TemplateRefusalError, open_template
from job.data.conversations import texts_of_messages
from job.data.fields import find_invalid_utf8
from job.data.files import find_file
from job.data.formats import NOT_UTF8, TO_UTF8, Row, RowError, other_encoding, read_rows, what_to_convert
from job.data.schemas import alpaca_prompt
from job.data.sharegpt import as_messages, in_conversations, is_sharegpt
from job.data.text_tokenizer import text_tokenizer
from job.errors import DataError, Problem
from job.records import Example, PromptRow

MAX_PROMPTS = 1000
"""They are answered one token at a time, twice, and read by people."""
TEXT = ".txt"
_SHOWN = 20
_MAX_TEXT_BYTES = 64 << 20
_ANSWERS = ("output", "completion", "chosen")


def find_prompts(location: str) -> Path:
    """The file of prompts.

    Raises:
        DataError: It is not there, or of no kind that is read.
    """
    path = Path(location)
    return path if location.lower().endswith(TEXT) and path.is_file() else find_file(location)


def read_prompts(
    path: Path,
    name: str,
    *,
    tokenizer: Any,
    schema: str,
    most_tokens: int,
    vocabulary: int | None = None,
    date: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> list[PromptRow]:
    """The prompts of a file, in its order.

    Args:
        path: The file, from `find_prompts`.
        name: What to call it in messages.
        tokenizer: The model's.
        schema: Schema of the training rows, which decides what a line of text is.
        most_tokens: The longest prompt that leaves room for an answer.
        vocabulary: Rows of the model's embedding; None if that is not known.
        date: The current date as a chat template sees it.
        template_arguments: Further variables of the chat template; they are for conversations alone.
        check_stop: Called while a chat template takes long.

    Raises:
        DataError: With the first 20 rows that are no prompts or too long; or the file has no prompts, or too many.
    """
    encoder = text_tokenizer(tokenizer)
    prompts: list[PromptRow] = []
    faults: list[RowError] = []
    with ExitStack() as stack:
        opened: list[Template] = []

        def render(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> str:
            if not getattr(tokenizer, "chat_template", None):
                raise TemplateRefusalError("the model has no chat template")
            if not opened:
                opened.append(stack.enter_context(open_template(tokenizer, date, check_stop, template_arguments)))
            return opened[0](messages, tools=tools, add_generation_prompt=True)

        for row in _rows(path, name, schema):
            if len(prompts) + len(faults) >= MAX_PROMPTS:
                raise DataError([Problem(name, f"has more than {MAX_PROMPTS:,} prompts; give fewer")])
            prompt = row if isinstance(row, RowError) else _prompt_of(row, render)
            if isinstance(prompt, RowError):
                faults.append(prompt)
                continue
            text, templated, reference = prompt
            (encoding,) = encoder.encode([text], special=not templated, offsets=False)
            ids = _without_edges(encoding.ids, encoding.special_tokens_mask, None if templated else encoder)
            if (what := _wrong(ids, most_tokens, vocabulary)) is not None:
                faults.append(RowError("prompt", row.where, what))
            else:
                prompts.append(PromptRow(row.where, text, reference, tuple(ids)))
    if faults:
        problems = [Problem(fault.where, fault.what) for fault in faults[:_SHOWN]]
        more = len(faults) - len(problems)
        raise DataError(problems + ([Problem(name, f"{more} more such rows")] if more else []))
    if not prompts:
        raise DataError([Problem(name, "holds no prompts")])
    return prompts


def validation_prompts(
    examples: Sequence[Example], count: int, tokenizer: Any, most_tokens: int
) -> Iterator[PromptRow]:
    """The prompts of the first `count` validation rows that leave room for an answer, in their order.

    Args:
        examples: Their tokens, with the completions as targets; of a pair, the first answer counts.
        count: How many prompts; there may be fewer.
        tokenizer: The model's.
        most_tokens: The longest prompt that leaves room for an answer.
    """
    write = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    yielded = 0
    for number, example in enumerate(examples, start=1):
        first = example.sequences[0]
        end = len(first.targets) - 1 - first.targets[::-1].index(True) if True in first.targets else 0
        begin = end
        while begin > 0 and first.targets[begin - 1]:
            begin -= 1
        if 0 < begin <= most_tokens and yielded < count and any(_plain(first.input_ids[:begin], tokenizer)):
            yielded += 1
            prompt, answer = first.input_ids[:begin], first.input_ids[begin : end + 1]
            text = write(_plain(prompt, tokenizer, edge=True), skip_special_tokens=False)
            yield PromptRow(f"validation row {number}", text, write(answer, skip_special_tokens=True), prompt)


def prompts_sha256(texts: Sequence[tuple[str, str | None]]) -> str:
    """SHA-256 over text and own answer of all prompts, as `verify` computes it from the published answers."""
    return hashlib.sha256(json.dumps([list(pair) for pair in texts]).encode()).hexdigest()


def _plain(ids: Sequence[int], tokenizer: Any, *, edge: bool = False) -> Sequence[int]:
    """The tokens without special ones; with `edge` without that at the beginning of a sequence alone."""
    if edge:
        return ids[1:] if ids[:1] == (tokenizer.bos_token_id,) else ids
    special = {*tokenizer.all_special_ids}
    return [token for token in ids if token not in special]


def _without_edges(ids: list[int], special: Sequence[int], encoder: Any) -> list[int]:
    """As `tokenization` has it: one token at the beginning, though the text begins with it as well; none at the end."""
    if encoder is None:
        return ids
    if encoder.bos is not None and ids[:2] == [encoder.bos, encoder.bos] and special[0]:
        ids, special = ids[1:], special[1:]
    return ids[:-1] if encoder.eos is not None and ids[-1:] == [encoder.eos] and special[-1] else ids


def _wrong(ids: Sequence[int], most: int, vocabulary: int | None) -> str | None:
    if not ids:
        return "the tokenizer returns no tokens for it"
    if len(ids) > most:
        what = f"is {len(ids):,} tokens long, and {max(most, 0):,} are allowed: JOB_TRAIN__MAX_LENGTH less"
        return f"{what} JOB_EVAL__PROMPTS_MAX_NEW_TOKENS"
    if vocabulary is not None and max(ids) >= vocabulary:
        return f"has the token number {max(ids)}, and the model has embeddings of {vocabulary} tokens"
    return None


def _rows(path: Path, name: str, schema: str) -> Iterator[Row | RowError]:
    if not path.name.lower().endswith(TEXT):
        yield from read_rows(path, name)
        return
    try:
        data = path.read_bytes() if path.stat().st_size <= _MAX_TEXT_BYTES else None
        if data is None:
            yield RowError("prompt", name, f"has more than {_MAX_TEXT_BYTES:,} bytes")
            return
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        if encoding := other_encoding(error.object):
            yield RowError("prompt", name, what_to_convert(encoding, path))
        else:
            number = error.object[: error.start].count(b"\n") + 1
            yield RowError("prompt", f"{name}:{number}", f"{NOT_UTF8}; {TO_UTF8}")
        return
    except OSError as error:
        yield RowError("prompt", name, f"cannot be read: {error.strerror}")
        return
    for number, line in enumerate(lines, start=1):
        if text := line.removesuffix("\r"):
            yield Row(f"{name}:{number}", _of_text(text, schema))


def _of_text(text: str, schema: str) -> dict[str, Any]:
    if schema == "messages":
        return {"messages": [{"role": "user", "content": text}]}
    return {"instruction": text} if schema == "alpaca" else {"prompt": text}


def _prompt_of(
    row: Row, render: Callable[[Sequence[dict[str, Any]], Sequence[dict[str, Any]] | None], str]
) -> tuple[str, bool, str | None] | RowError:
    """(text, whether a chat template wrote it, the row's own answer); or why the row is no prompt."""
    for field, value in row.fields.items():
        for where, what in find_invalid_utf8(value, f"{row.where} {field}"):
            return RowError("prompt", where, f"{what}; {TO_UTF8}" if what == NOT_UTF8 else what)
    fields = row.fields
    if is_sharegpt(fields):
        converted = as_messages(row)
        if isinstance(converted, list):
            return in_conversations(converted, row)[0]
        fields = converted.fields
    prompt = fields.get("messages") if fields.get("messages") is not None else fields.get("prompt")
    if isinstance(prompt, list):
        return _of_conversation(row, prompt, fields, render)
    reference = next((fields[name] for name in _ANSWERS if isinstance(fields.get(name), str)), None)
    if isinstance(prompt, str) and prompt:
        return prompt, False, reference
    instruction, context = fields.get("instruction"), fields.get("input")
    if isinstance(instruction, str) and instruction and (context is None or isinstance(context, str)):
        return alpaca_prompt({**fields, "input": context}), False, reference
    return RowError("prompt", row.where, "has no prompt: a text `prompt`, `instruction`, or a list `messages`")


def _of_conversation(
    row: Row,
    messages: list[Any],
    fields: Mapping[str, Any],
    render: Callable[[Sequence[dict[str, Any]], Sequence[dict[str, Any]] | None], str],
) -> tuple[str, bool, str | None] | RowError:
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return RowError("prompt", f"{row.where} messages[{index}]", "must be an object with role and content")
    prompt, reference = list(messages), None
    if prompt and prompt[-1]["role"] == "assistant":
        texts = texts_of_messages([prompt.pop()])
        reference = texts[0] if texts and isinstance(texts[0], str) else None
    if not prompt:
        return RowError("prompt", f"{row.where} messages", "has no message to answer")
    tools = fields.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
        return render(prompt, tools), True, reference
    except ValueError as error:  # of the template, or of the tools' JSON
        return RowError("prompt", f"{row.where} messages", f"is refused by the tokenizer's chat template: {error}")
