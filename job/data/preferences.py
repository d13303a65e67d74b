"""Rows of preferences: checks them, and renders and tokenizes their answers.

| schema | fields | answers |
|---|---|---|
| preference | chosen, rejected; optional: prompt | two, the better one first |
| unpaired_preference | prompt, completion, label | one, and whether it is a good one |

All fields but the label are texts, or all are lists of messages, which the chat template renders; the whole data set is
of one kind. Without a `prompt`, the common beginning of `chosen` and `rejected` is the prompt: of texts their common
beginning, of conversations their common first messages. If the answers are conversations and `prompt` is text, it
becomes their first message.

The target tokens of an answer are all tokens after the prompt, as in TRL's trainers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.common.near_duplicates import row_hash
from job.data.batch_plan import epoch_order
from job.data.chat_template import Template, TemplateRefusalError
from job.data.conversations import check_role, odd_order
from job.data.examples import Examples, rewrite_examples
from job.data.fields import Rendered, check_target, check_text, is_empty, left_out
from job.data.formats import Row, RowError, type_name
from job.data.text_tokenizer import TextTokenizer
from job.data.tokenization import Encoded, encode
from job.records import Example

SIDES: Mapping[str, tuple[str, ...]] = {"preference": ("chosen", "rejected"), "unpaired_preference": ("completion",)}
"""Schema -> the fields that hold its answers."""

_WORDS = 3
_LETTERS = 16
_LABELS = {"true": True, "false": False, "1": True, "0": False}
"""How tables without types write a label."""


@dataclass(frozen=True)
class Answers:
    """A row as texts: each holds the prompt and one of its answers. `desirable` is the label of a single one.

    `own_texts` are the texts compared when rows are held out, if they were requested; see `own_texts_of`.
    """

    where: str
    sides: tuple[Rendered, ...]
    desirable: bool | None = None
    own_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedAnswers:
    """A row as tokens. `end` and `unused` as in `Encoded`; the end is that of the first answer."""

    sides: tuple[Encoded, ...]
    desirable: bool | None = None
    unused: tuple[str, ...] = ()

    @property
    def example(self) -> Example:
        """The example: of a pair both sequences, concatenated."""
        first, *others = (side.example for side in self.sides)
        if not others:
            return Example(first.input_ids, first.targets, desirable=self.desirable)
        return join(first, others[0])

    @property
    def compared_by(self) -> bytes:
        """The row's `near_duplicates.row_hash`, which its first answer has."""
        return self.sides[0].compared_by

    @property
    def long(self) -> tuple[tuple[str, int], ...]:
        """Nothing: rows of preferences are neither cut nor split."""
        return ()

    @property
    def end(self) -> int | None:
        """The special token that the first answer ends with."""
        return self.sides[0].end

    def parts(self) -> tuple[bytes, bytes, tuple[int | None, bool | None, float]]:
        """As of `Encoded`, with the second answer behind the first."""
        second_at = len(self.sides[0].targets) if len(self.sides) > 1 else None
        ids, targets = (b"".join(parts) for parts in zip(*((s.ids, s.targets) for s in self.sides), strict=True))
        return ids, targets, (second_at, self.desirable, 1.0)

    def canonical(self) -> bytes:
        """Texts, tokens, targets and label; other rows never give the same bytes."""
        label = b"" if self.desirable is None else bytes([self.desirable])
        return bytes([len(self.sides)]) + b"".join(side.canonical() for side in self.sides) + label


def is_conversation(fields: Mapping[str, Any], schema: str) -> bool:
    """Whether a row's answers are messages, which need a chat template."""
    return isinstance(fields.get(SIDES[schema][0]), list)


def check_preference(row: Row, schema: str) -> list[RowError]:
    """All that is wrong with the fields of a row, apart from its length in tokens; empty for a good row."""
    fields, where = row.fields, row.where
    conversation = is_conversation(fields, schema)
    check = _check_answer if conversation else check_target
    faults = [fault for field in SIDES[schema] for fault in check(fields, field, where)]
    if schema == "unpaired_preference":
        faults += check_label(fields, where)
    if schema == "unpaired_preference" or not is_empty(fields.get("prompt")):
        faults += _check_prompt(fields, where, conversation=conversation)
    if faults or schema != "preference":
        return faults
    return _check_pair(fields, where, conversation=conversation)


def check_label(fields: Mapping[str, Any], where: str) -> list[RowError]:
    """What is wrong with a label, which has to say yes or no."""
    label_where = f"{where} label"
    if fields.get("label") is None:
        return [RowError("missing_field", label_where, "is null" if "label" in fields else "is missing")]
    if _label(fields) is None:
        what = "must be true (a good completion) or false (a bad one)"
        return [RowError("wrong_type", label_where, what)]
    return []


def _label(fields: Mapping[str, Any]) -> bool | None:
    value = fields["label"]
    if isinstance(value, bool):
        return value
    return _LABELS.get(str(value).strip().lower()) if isinstance(value, int | str) else None


def _check_prompt(fields: dict[str, Any], where: str, *, conversation: bool) -> list[RowError]:
    prompt, prompt_where = fields.get("prompt"), f"{where} prompt"
    if not conversation or prompt is None:
        return check_text(fields, "prompt", where)
    if isinstance(prompt, list):
        return _check_messages(prompt, prompt_where)
    sides = [fields.get(field) for field in ("chosen", "rejected") if field in fields]
    if sides and all(_opens_with(side, prompt) for side in sides):
        return []
    what = "must be messages like the answers, or the text of the message with which both answers begin"
    return [RowError("wrong_type", prompt_where, what)]


def _opens_with(side: Any, prompt: Any) -> bool:
    """Whether a conversation begins with the prompt as its first message, or behind a system message."""
    messages = [message for message in side or () if isinstance(message, dict) and message.get("role") != "system"]
    return isinstance(prompt, str) and bool(messages) and messages[0].get("content") == prompt


def _check_messages(messages: list[Any], where: str) -> list[RowError]:
    if not messages:
        return [RowError("empty_target", where, "has no message")]
    faults: list[RowError] = []
    for index, message in enumerate(messages):
        message_where = f"{where}[{index}]"
        if not isinstance(message, dict):
            faults.append(RowError("wrong_type", message_where, f"must be an object, is {type_name(message)}"))
            continue
        faults += [fault for field in ("role", "content") for fault in check_text(message, field, message_where)]
        faults += check_role(message, message_where)
    return faults


def _check_answer(fields: dict[str, Any], field: str, where: str) -> list[RowError]:
    """What is wrong with the messages of an answer, the last of which is its target."""
    value, answer_where = fields.get(field), f"{where} {field}"
    if value is None:
        return [RowError("missing_field", answer_where, "is null" if field in fields else "is missing")]
    if not isinstance(value, list):
        return [RowError("wrong_type", answer_where, f"must be messages like the other answer, is {type_name(value)}")]
    if faults := _check_messages(value, answer_where):
        return faults
    last = f"{answer_where}[{len(value) - 1}]"
    if value[-1]["role"] != "assistant":
        return [RowError("empty_target", last, "must be of role assistant: the answer comes last")]
    return check_target(value[-1], "content", last)


def _check_pair(fields: dict[str, Any], where: str, *, conversation: bool) -> list[RowError]:
    """What is wrong with a pair whose two answers are each valid."""
    prompt, answers = _split(fields, conversation=conversation)
    if all(begins_with(answer, prompt) for answer in answers):
        message = (
            "is also the beginning of both answers, and would occur twice; remove it from the prompt or "
            "from the answers"
        )
        return [RowError("repeated_prompt", f"{where} prompt", message)]
    if answers[0] == answers[1]:
        return [RowError("same_answers", f"{where} rejected", "is the same as chosen: there is no preference to learn")]
    for field, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer or (isinstance(answer, str) and not answer.strip()):
            message = "is empty after the common beginning of both answers, which is used as the prompt; give a prompt"
            return [RowError("empty_target", f"{where} {field}", message)]
    if conversation and not prompt:
        message = "begins with another message than rejected, so there is no common prompt; give a prompt"
        return [RowError("missing_field", f"{where} chosen", message)]
    return []


def begins_with(answer: Any, prompt: Any) -> bool:
    """Whether an answer begins with its prompt, as messages or as text.

    A short text may be an answer's beginning by chance: "Hello", or "I think".
    """
    if isinstance(prompt, list):
        return bool(prompt) and isinstance(answer, list) and answer[: len(prompt)] == prompt
    if not isinstance(prompt, str) or not isinstance(answer, str):
        return False
    stripped = prompt.strip()
    long = len(stripped) >= _LETTERS or len(stripped.split()) >= _WORDS
    return long and answer.lstrip().startswith(stripped)


def contradicting_score(fields: Mapping[str, Any]) -> str | None:
    """The field with the score of a pair's chosen answer, where it is lower than that of the rejected one.

    Data sets that were made of rated answers keep the scores; their names are those of UltraFeedback's and of others.
    """
    for names in ("score_{}", "{}_score", "{}_rating", "{}-rating"):
        good, bad = (fields.get(names.format(side)) for side in ("chosen", "rejected"))
        if isinstance(good, int | float) and isinstance(bad, int | float) and good < bad:
            return names.format("chosen")
    return None


def _split(fields: Mapping[str, Any], *, conversation: bool) -> tuple[Any, list[Any]]:
    """The prompt and the two answers of a pair, as texts or as messages, without the prompt in them."""
    prompt, answers = fields.get("prompt"), [fields["chosen"], fields["rejected"]]
    has_prompt = prompt is not None and not is_empty(prompt)
    if has_prompt and (isinstance(prompt, list) or not conversation):
        return prompt, answers
    common = _common_length(*answers)
    if not conversation and 0 < common < min(map(len, answers)) and answers[0][common - 1] == " ":
        common -= 1  # as TRL has it: tokens begin with their space
    return answers[0][:common], [side[common:] for side in answers]


def _common_length(first: Any, second: Any) -> int:
    """Of the common beginning of two texts or lists."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def texts_of_preference(row: Row, schema: str) -> list[str]:
    """The texts of a good row."""
    fields = (row.fields.get(field) for field in ("prompt", *SIDES[schema]))
    return [text for value in fields for text in _texts(value)]


def own_texts_of(row: Row, schema: str) -> tuple[str, ...]:
    """What identifies a valid row when rows are held out: its prompt, so that all answers to it are in the same part.

    A prompt of fewer words than `_WORDS` (such as the accidental common beginning of two answers) does not identify it:
    then all texts do.
    """
    fields = row.fields
    conversation = is_conversation(fields, schema)
    if schema == "preference":
        prompt, _ = _split(fields, conversation=conversation)
    else:
        prompt = fields["prompt"]
    without_system = [one for one in prompt if one["role"] != "system"] if isinstance(prompt, list) else prompt
    texts = tuple(_texts(without_system))
    return texts if len(" ".join(texts).split()) >= _WORDS else tuple(texts_of_preference(row, schema))


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return [message["content"] for message in value if message.get("content")]
    return [value] if isinstance(value, str) else []


def render_preference(row: Row, schema: str, template: Template | None) -> Answers | RowError:
    """The texts of a row that `check_preference` found good.

    Raises:
        DataError: The chat template is broken, or exceeds its time or memory limit.
    """
    fields = row.fields
    conversation = is_conversation(fields, schema)
    if schema == "preference":
        prompt, answers = _split(fields, conversation=conversation)
    else:
        prompt, answers = fields["prompt"], [fields["completion"]]
        if conversation and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
    unused = left_out(row, ("prompt", "label", *SIDES[schema]))
    try:
        texts = [_text(prompt, answer, template if conversation else None) for answer in answers]
    except TemplateRefusalError as error:
        where = f"{row.where} {SIDES[schema][0]}"
        odd = odd_order([*prompt, *answers[0]])
        what = f"is refused by the tokenizer's chat template: {error}" + (f"; {odd[1]}" if odd else "")
        return RowError("bad_conversation", where, what)
    sides = tuple(
        Rendered(f"{row.where} {field}", text, ((start, len(text)),), unused=unused)
        for field, (text, start) in zip(SIDES[schema], texts, strict=True)
    )
    return Answers(row.where, sides, _label(fields) if schema == "unpaired_preference" else None)


def _text(prompt: Any, answer: Any, template: Template | None) -> tuple[str, int]:
    """Prompt and answer as one text, and where the answer begins in it."""
    if template is None:
        return prompt + answer, len(prompt)
    whole = template([*prompt, *answer])
    # The header of the answer belongs to the prompt; it may hold text that the turn lacks.
    return whole, _common_length(template(prompt, add_generation_prompt=True), whole)


def encode_answers(
    rows: Sequence[Answers | list[RowError]], tokenizer: TextTokenizer, *, compare: bool = False, **options: Any
) -> Iterator[list[EncodedAnswers] | list[RowError]]:
    """Yields for each row its example, or what is wrong with its tokens; faults pass through.

    Args:
        rows: Rendered rows and faults.
        tokenizer: The tokenizer.
        compare: Whether rows are hashed to be compared with others.
        options: Further arguments of `encode`; `max_length` counts for each answer with its prompt.
    """
    texts = [side for row in rows if isinstance(row, Answers) for side in row.sides]
    encoded = encode(texts, tokenizer, loss_on="completion", **options)
    for row in rows:
        if not isinstance(row, Answers):
            yield row
            continue
        results = [item for _ in row.sides for item in next(encoded)]
        sequences = tuple(side for side in results if isinstance(side, Encoded))
        if faults := [fault for fault in results if isinstance(fault, RowError)]:
            yield faults
        elif len(sequences) > 1 and (sequences[0].ids, sequences[0].targets) == (
            sequences[1].ids,
            sequences[1].targets,
        ):
            yield [RowError("same_answers", f"{row.where} rejected", "has the same tokens as chosen")]
        else:
            if compare:
                sequences = (replace(sequences[0], compared_by=row_hash(row.own_texts)), *sequences[1:])
            yield [EncodedAnswers(sequences, row.desirable, row.sides[0].unused)]


def join(first: Example, second: Example, *, desirable: bool | None = None) -> Example:
    """One example of two sequences."""
    return Example(
        first.input_ids + second.input_ids,
        first.targets + second.targets,
        second_at=len(first.input_ids),
        desirable=desirable,
    )


def with_partners(examples: Sequence[Example], cycles: Sequence[tuple[int, ...]], max_length: int) -> Iterator[Example]:
    """Gives each labelled example a second, mismatched sequence, for KTO's estimate of the KL divergence.

    It is the example's prompt with the completion of the example before it in its cycle, cut to `max_length` tokens, as
    in TRL's batches. A cycle is the batch plan's first epoch: there too, all but the first example of a step
    get the completion of another one of the same step. Rows that are trained on and held-out rows are two cycles.
    """
    before = {row: order[position - 1] for order in cycles for position, row in enumerate(order)}
    for row, example in enumerate(examples):
        other = examples[before[row]]
        prompt, others = example.targets.index(True), other.targets.index(True)
        ids = (example.input_ids[:prompt] + other.input_ids[others:])[:max_length]
        targets = (example.targets[:prompt] + other.targets[others:])[:max_length]
        yield join(example, Example(ids, targets), desirable=example.desirable)


def paired(
    examples: Examples, sides: Sequence[Sequence[int]], seed: int, max_length: int, file: Path | None
) -> Examples:
    """Labelled examples with a second sequence each (`with_partners`).

    Args:
        examples: Without second sequences.
        sides: The numbers of the examples to train on, and of those to validate on: each gets its second sequence from
            an example of the same side.
        seed: The run's, which decides the order of the first epoch.
        max_length: Maximum number of tokens of a second sequence.
        file: The file that `examples` lie in, which is replaced; None if they are in memory.

    Raises:
        Unreachable: The disk is full or cannot be written.
    """
    cycles = [tuple(side[index] for index in epoch_order(seed, len(side), 0)) for side in sides]
    return rewrite_examples(with_partners(examples, cycles, max_length), file)
