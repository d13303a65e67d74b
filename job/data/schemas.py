"""Row schemas: which fields a row must have, how it is checked, and the text it is rendered to.

| schema | fields | text | completion |
|---|---|---|---|
| alpaca | instruction, output; optional: input, system, history | tatsu-lab's template | output |
| prompt_completion | prompt, completion | both, concatenated | completion |
| messages | messages: list of {role, content}; optional: tools | the chat template | the assistant's turns |
| messages | conversations: list of {from, value}; optional: system, tools | `job.data.sharegpt` | the same |
| messages | prompt, completion: lists of {role, content}; optional: tools | `job.data.prompt_messages` | completion |
| text | text | unchanged | all of it |
| preference, unpaired_preference | `job.data.preferences` | prompt and answer | the answer |

Alpaca's `system` replaces the template's first sentence, and each pair of `history` becomes a turn before the
instruction; both belong to the prompt. Messages: `job.data.conversations`. Fields with a meaning that the
schema cannot express are refused (`_MEANING`); other fields are left out and counted.

To add a schema: enter it in `Schema`, `REQUIRED`, `_OPTIONAL` and `PROMPTS`, and give its text in `render`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

from job.data.bad_rows import FIELDS_SETTING
from job.data.chat_template import Template
from job.data.conversations import Turns, check_messages, render_messages, texts_of_messages
from job.data.fields import Rendered, check_target, check_text, find_invalid_utf8, is_empty, is_zero, left_out
from job.data.formats import Row, RowError
from job.data.preferences import (
    SIDES,
    Answers,
    begins_with,
    check_preference,
    own_texts_of,
    render_preference,
    texts_of_preference,
)
from job.data.prompt_messages import has_prompt_messages
from job.data.sharegpt import is_sharegpt

Schema = Literal["alpaca", "prompt_completion", "messages", "text", "preference", "unpaired_preference"]
SCHEMAS: tuple[Schema, ...] = get_args(Schema)
SFT_SCHEMAS = tuple(schema for schema in SCHEMAS if schema not in SIDES)
"""Schemas for supervised fine-tuning: the loss is over the tokens of a row."""

# The last field is the target: it is in the loss, and must not be empty.
REQUIRED: dict[Schema, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "unpaired_preference": ("prompt", "completion", "label"),
}
_OPTIONAL: dict[Schema, tuple[str, ...]] = {
    "alpaca": ("input", "system", "history"),
    "prompt_completion": (),
    "messages": ("tools",),
    "text": (),
    "preference": ("prompt",),
    "unpaired_preference": (),
}
FIELDS: dict[str, tuple[str, ...]] = {
    **{schema: (*REQUIRED[schema], *_OPTIONAL[schema]) for schema in SCHEMAS},
    "messages": ("messages", "conversations", "prompt", "completion", "tools", "system"),
}
"""Schema -> all fields that it has a use for."""
_NEAR = 0.75
"""Similarity of two names (difflib's ratio) from which one may be the other misspelled: promt and prompt have 0.91."""
_OF_IMAGES = "the job trains on text alone; remove the field if the text means something without it"
_OF_PAIRS = "set JOB_TRAIN__METHOD=dpo or orpo to learn from pairs, or give the good one as the completion"
_MEANING: dict[str, str] = {
    **dict.fromkeys(("chosen", "rejected"), _OF_PAIRS),
    **dict.fromkeys(("system", "system_prompt"), "put it into the first message, or in front of the prompt"),
    "history": "put the earlier turns into messages, or in front of the prompt",
    "tools": "tools are given to a chat template with rows of the schema messages",
    "functions": "give them as `tools` with rows of the schema messages",
    "documents": "write them into the messages",
    "chat_template_kwargs": "remove the field; JOB_DATA__CHAT_TEMPLATE_ARGUMENTS gives arguments for all rows",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _OF_IMAGES),
}
"""Fields that change what a row means, with the advice for schemas that do not have them. In `text` none is refused."""
_RATINGS = ("label", "kto_tag")
"""Fields that rate the answer of a row, in TRL's and LLaMA-Factory's formats."""

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
    """How to prompt a model trained on rows of a schema: a description, and the text around an instruction, if any."""

    about: str
    template: str | None = None


PROMPTS: dict[Schema, Prompt] = {
    "alpaca": Prompt("It was trained on prompts of this form:", _ALPACA_WITHOUT_INPUT),
    "prompt_completion": Prompt("It was trained on the prompts of the data as they are, without a template."),
    "messages": Prompt("It was trained on conversations in the tokenizer's chat template."),
    "text": Prompt("It was trained on plain text: it continues the text that it is given."),
    "preference": Prompt("It was trained on pairs of answers to the prompts of the data as they are."),
    "unpaired_preference": Prompt("It was trained on rated answers to the prompts of the data as they are."),
}


def detect_schema(fields: dict[str, Any], among: Collection[str] = SFT_SCHEMAS) -> Schema | None:
    """The first schema whose required fields a row has, else the first of which it has any; None if there is none.

    The order matters: Alpaca's own rows also have a `text`. A row with only some of a schema's fields counts, so that
    the missing field is reported. `among` are the schemas that the training method can learn from.
    """
    known = [schema for schema in SCHEMAS if schema in among]
    if is_sharegpt(fields):
        fields = {**fields, "messages": None}
    whole = (schema for schema in known if has_required(fields, schema))
    half = (schema for schema in known if any(field in fields for field in REQUIRED[schema]))
    return next(whole, None) or next(half, None)


def has_required(fields: Mapping[str, Any], schema: Schema) -> bool:
    """Whether a row has all required fields of a schema. Lists of messages as prompt and completion are messages."""
    if has_prompt_messages(fields) and schema in {"prompt_completion", "messages"}:
        return schema == "messages"
    return all(field in fields for field in REQUIRED[schema])


def check_row(row: Row, schema: Schema) -> list[RowError]:
    """Everything that is wrong with a row's fields, except its length in tokens; empty if the row is valid."""
    if broken := [
        one for field, value in row.fields.items() for one in find_invalid_utf8(value, f"{row.where} {field}")
    ]:
        return [RowError("broken_utf8", where, what) for where, what in broken]
    if schema not in {*SIDES, "text"} and not any(is_empty(row.fields.get(field)) for field in SIDES["preference"]):
        what = f"and rejected are a pair of answers, which is not used in the schema {schema}: {_OF_PAIRS}"
        return [RowError("field_without_use", f"{row.where} chosen", what)]
    faults = _check_meaning(row, schema)
    if schema in SIDES:
        return faults + check_preference(row, schema)
    if schema == "messages":
        return faults + check_messages(row)
    *others, target = REQUIRED[schema]
    present = [field for field in _OPTIONAL[schema] if row.fields.get(field) is not None and field != "history"]
    faults += [fault for field in (*others, *present) for fault in check_text(row.fields, field, row.where)]
    if schema == "alpaca":
        faults += _check_history(row)
    return faults + check_target(row.fields, target, row.where)


def with_near_names(faults: Sequence[RowError], row: Row, schema: Schema, names: Mapping[str, str]) -> list[RowError]:
    """The faults of a row, with the row's own field that a missing one is likely found under.

    It may be misspelled, or have a name that is usual in public data sets; then the setting that reads all such rows is
    named, with the `names` that are set already. A misspelled field is not reported separately.
    """
    near: dict[str, str] = {}
    usual: dict[str, str] = {}
    for fault in faults:
        field = fault.where.removeprefix(f"{row.where} ")
        if fault.kind == "missing_field" and field.isidentifier() and field not in row.fields:
            if (nearest := nearest_field(field, row.fields)) is not None:
                near[fault.where] = nearest
            elif (name := usual_name(field, row.fields)) is not None:
                usual[field] = name
    read_under_no_name = {f"{row.where} {field}" for field in near.values()}
    advice = {where: f"if it is {name!a}, rename it, or map it with JOB_DATA__FIELDS" for where, name in near.items()}
    # An optional field that is not mapped would be left out: Dolly's context.
    optional = ((field, usual_name(field, row.fields)) for field in _OPTIONAL[schema] if field not in row.fields)
    mapping = {**names, **usual, **{field: name for field, name in optional if name not in {None, *usual.values()}}}
    setting = ",".join(f"{field}={name}" for field, name in mapping.items())
    advice |= {
        f"{row.where} {field}": f"if all rows have it as {name!a}, set {FIELDS_SETTING}{setting}"
        for field, name in usual.items()
    }
    return [
        replace(fault, what=f"{fault.what}; {advice[fault.where]}") if fault.where in advice else fault
        for fault in faults
        if fault.where not in read_under_no_name
    ]


_USUAL_NAMES = {
    "prompt": ("question", "query", "problem", "instruction", "input"),
    "completion": ("answer", "response", "output", "solution", "target"),
    "instruction": ("question", "query", "problem", "input"),
    "input": ("context",),
    "output": ("response", "answer", "completion", "solution", "target"),
}
"""Names that public data sets give to a field of ours, the most frequent first."""


def usual_name(field: str, fields: Iterable[str]) -> str | None:
    """The field of a row that is likely meant for a field of ours; None if there is none."""
    by_name = {name.lower(): name for name in fields}
    return next((by_name[name] for name in _USUAL_NAMES.get(field, ()) if name in by_name), None)


def naming_other_schema(faults: Sequence[RowError], row: Row, schema: Schema) -> list[RowError]:
    """The faults of a row; for a row of another schema, one that says so in place of one for each missing field."""
    if any(fault.kind != "missing_field" for fault in faults) or any(field in row.fields for field in REQUIRED[schema]):
        return list(faults)
    alike = [
        one
        for one in SCHEMAS
        if (one in SIDES) == (schema in SIDES) and one != schema and has_required(row.fields, one)
    ]
    if not alike:
        return list(faults)
    what = f"has the fields of the schema {alike[0]}, not of {schema}"
    one = "all rows must have one schema, that of JOB_DATA__FORMAT or else of the first row"
    return [RowError("missing_field", row.where, f"{what}; {one}")]


def nearest_field(field: str, fields: Iterable[str]) -> str | None:
    """Of the fields that a row has, the one that may be a misspelled `field`; None if there is none."""
    plain = {name.strip().lower(): name for name in fields}
    near = get_close_matches(field, plain, n=1, cutoff=_NEAR)
    return plain[near[0]] if near else None


def texts_of(row: Row, schema: Schema) -> list[str]:
    """The texts of a valid row that become part of an example."""
    if schema in SIDES:
        return texts_of_preference(row, schema)
    if schema == "messages":
        return texts_of_messages(row.fields["messages"])
    earlier = [text for pair in row.fields.get("history") or () for text in pair] if schema == "alpaca" else []
    fields = (row.fields.get(field) for field in (*_OPTIONAL[schema], *REQUIRED[schema]))
    return [*earlier, *(text for text in fields if isinstance(text, str))]


def own_texts(row: Row, schema: Schema) -> tuple[str, ...]:
    """What identifies a valid row: its texts without the system prompt, which many rows share."""
    if schema in SIDES:
        return own_texts_of(row, schema)
    if schema == "messages":
        without_system = (
            message for message in row.fields["messages"] if message.get("role") not in {"system", "developer"}
        )
        return tuple(texts_of_messages(without_system))
    system = row.fields.get("system") if schema == "alpaca" else None
    return tuple(text for text in texts_of(row, schema) if text is not system)


def audited_texts(row: Row, schema: Schema) -> Sequence[str]:
    """What the audit reads of a good row: all texts but the system prompt, and of preferences the answers, too."""
    return texts_of(row, schema) if schema in SIDES else own_texts(row, schema)


def repeats_prompt(row: Row, schema: Schema) -> str | None:
    """The field of a good row that begins with the prompt it comes after; pairs where both do are refused before."""
    fields = ("completion",) if schema == "prompt_completion" else SIDES.get(schema, ())
    return next((name for name in fields if begins_with(row.fields[name], row.fields.get("prompt"))), None)


def render(
    row: Row, schema: Schema, template: Template | None, *, turns: Turns | None, prompt_messages: int = 0
) -> Rendered | Answers | RowError:
    """The text of a row that `check_row` found valid, or for a row of preferences its texts.

    Args:
        row: The row.
        schema: Its schema.
        template: Renders messages; rows of texts do not use it.
        turns: Which turns of a conversation are its completions; None for the whole conversation.
        prompt_messages: As of `render_messages`.

    Returns:
        The rendered row; a fault where the chat template refuses the conversation.

    Raises:
        DataError: The chat template is broken, or exceeds its time or memory limit.
    """
    if schema in SIDES:
        return render_preference(row, schema, template)
    if schema == "messages":
        if template is None:
            raise ValueError("messages need a chat template")
        return render_messages(row, template, turns=turns, prompt_messages=prompt_messages)
    fields = row.fields
    if schema == "alpaca":
        prompt, completion = alpaca_prompt(fields), fields["output"]
    elif schema == "prompt_completion":
        prompt, completion = fields["prompt"], fields["completion"]
    else:
        prompt, completion = "", fields["text"]
    text = prompt + completion
    used = (*REQUIRED[schema], *_OPTIONAL[schema])
    longest = max(used, key=lambda field: len(str(fields.get(field) or "")))
    return Rendered(f"{row.where} {longest}", text, ((len(prompt), len(text)),), unused=left_out(row, used))


def alpaca_prompt(fields: dict[str, Any]) -> str:
    """Everything before the output, as tatsu-lab wrote it; with a system prompt and earlier turns where there are."""
    context, system = fields.get("input") or "", fields.get("system") or ""
    begin = system or (_PREAMBLE_WITH_INPUT if context else _PREAMBLE) + _REQUEST
    turns = [_TURN.format(instruction=instruction) + answer for instruction, answer in fields.get("history") or ()]
    turn = _TURN_WITH_INPUT if context else _TURN
    return begin + "".join(turns) + turn.format(instruction=fields["instruction"], input=context)


def _check_meaning(row: Row, schema: Schema) -> list[RowError]:
    """Fields that say what the row means, and have no place in its schema: without them it is another row."""
    faults = []
    if schema != "text":
        used_fields = {*REQUIRED[schema], *_OPTIONAL[schema]}
        outside = [field for field in _MEANING if field not in used_fields and not is_empty(row.fields.get(field))]
        faults = [
            RowError(
                "field_without_use", f"{row.where} {field}", f"is not used in the schema {schema}: {_MEANING[field]}"
            )
            for field in outside
        ]
        faults += _check_spelling(row, used_fields)
    if is_zero(row.fields.get("weight")):
        message = "is 0, and weights of rows are not used; set JOB_DATA__ROW_WEIGHTS=true, or remove the row"
        faults.append(RowError("field_without_use", f"{row.where} weight", message))
    if schema not in {*SIDES, "text"}:
        message = "is false: a bad answer would be trained on; remove the row, or set JOB_TRAIN__METHOD=kto"
        bad = [name for name in _RATINGS if _is_no(row.fields.get(name))]
        faults += [RowError("field_without_use", f"{row.where} {name}", message) for name in bad]
    return faults


def _is_no(label: Any) -> bool:
    """Whether a label rates the answer as a bad one. A number may be any class, and is none."""
    return label is False or (isinstance(label, str) and label.strip().lower() == "false")


def _check_spelling(row: Row, used_fields: Collection[str]) -> list[RowError]:
    """Fields that would be used if their names were spelled in the way of the schema."""
    faults = []
    for field, value in row.fields.items():
        plain = field.strip().lower()
        if plain != field and plain in used_fields and is_empty(row.fields.get(plain)) and not is_empty(value):
            what = f"is not known by this name; rename it to {plain!r}"
            faults.append(RowError("field_without_use", f"{row.where} {field}", what))
    return faults


def _check_history(row: Row) -> list[RowError]:
    history, where = row.fields.get("history"), f"{row.where} history"
    if history is None:
        return []
    pairs = isinstance(history, list | tuple) and all(
        isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str] for pair in history
    )
    return [] if pairs else [RowError("wrong_type", where, "must be a list of pairs, [instruction, output]")]
