"""Fields of a row: checks of one field, and `Rendered`, the form in which every schema gives a row as text."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from job.data.formats import Row, RowError, is_valid_text, type_name, what_is_invalid

MAX_CHARACTERS = 4 << 20
"""Of one text in a row: more would take minutes to tokenize, and no model reads that many."""
MAX_WEIGHT = 1_000_000


@dataclass(frozen=True)
class Rendered:
    """A row as one text.

    Attributes:
        where: The location of the row, and its longest field, which is named if the row is too long.
        text: What is tokenised.
        completions: The spans (start, end), in characters, that the model is trained to produce.
        ignored: The spans that are never in the loss, for every JOB_TRAIN__LOSS_ON.
        unused: The fields that were left out.
        must_end: Whether it is a fault if a completion does not end with a special token that is learned.
        weight: What the loss of its target tokens is multiplied by.
        own_texts: The row's texts without what a schema or template puts around them, where they were requested.
    """

    where: str
    text: str
    completions: tuple[tuple[int, int], ...]
    ignored: tuple[tuple[int, int], ...] = ()
    unused: tuple[str, ...] = ()
    must_end: bool = False
    own_texts: tuple[str, ...] = ()
    weight: float = 1.0


def check_text(fields: dict[str, Any], field: str, where: str) -> list[RowError]:
    """What is wrong with a field that must be text of a bounded length."""
    field_where = f"{where} {field}"
    value = fields.get(field)
    if value is None:
        return [RowError("missing_field", field_where, "is null" if field in fields else "is missing")]
    if not isinstance(value, str):
        return [RowError("wrong_type", field_where, f"must be text, is {type_name(value)}")]
    if len(value) > MAX_CHARACTERS:
        return [
            RowError("too_long", field_where, f"has {len(value):,} characters; at most {MAX_CHARACTERS:,} are allowed")
        ]
    return []


def check_target(fields: dict[str, Any], field: str, where: str) -> list[RowError]:
    """What is wrong with a target field, which must not be empty."""
    faults = check_text(fields, field, where)
    if not faults and not fields[field].strip():
        return [RowError("empty_target", f"{where} {field}", "is empty: there is nothing to learn")]
    return faults


def is_empty(value: Any) -> bool:
    """Whether a field is null or empty: tables fill the rows that lack a field like this."""
    return value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip())


def is_zero(value: Any) -> bool:
    """Whether a weight is 0 or a flag is false; an absent one is not. CSV writes them as text."""
    if isinstance(value, str):
        return value.strip().lower() in {"0", "0.0", "false"}
    return isinstance(value, int | float) and value == 0


def find_invalid_utf8(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """(where, what is wrong) of each text in a value that is not UTF-8."""
    if isinstance(value, str):
        if not is_valid_text(value):
            yield where, what_is_invalid(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from find_invalid_utf8(item, f"{where} {key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from find_invalid_utf8(item, f"{where}[{index}]")


def left_out(row: Row, used_fields: Container[str]) -> tuple[str, ...]:
    """The fields of a row that hold something and are not among those that are used."""
    return tuple(field for field, value in row.fields.items() if field not in used_fields and not is_empty(value))


def weight_of(row: Row) -> float | RowError:
    """The number in a row's field `weight`: 1 where there is none; or what is wrong with it."""
    value: Any = row.fields.get("weight")
    if is_empty(value):
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight <= MAX_WEIGHT:
        what = f"must be a number from 0 to {MAX_WEIGHT:,}, by which the loss of the row is multiplied"
        return RowError("wrong_type", f"{row.where} weight", what)
    return weight
