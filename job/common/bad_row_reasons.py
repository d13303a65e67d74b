"""Why rows are left out, in words: log, plan, manifest and report name the kinds of bad rows by this table.

A kind (`RowError.kind` in `job/data/formats.py`) is also in the record of the pull, which names the run, and there it
stays as it is. To add one: an entry here, since a test holds that every kind has its words.
"""

from __future__ import annotations

from collections.abc import Mapping

REASONS: Mapping[str, str] = {
    "bad_conversation": "conversation that the chat template refuses, or that cannot be split into turns",
    "broken_utf8": "text that is not valid UTF-8",
    "empty_target": "nothing to learn: the text or the answer is empty",
    "field_without_use": "field with content that would be ignored",
    "invalid_csv": "line that does not fit the header of the CSV file",
    "invalid_json": "line that is not valid JSON",
    "missing_field": "required field is missing or null",
    "not_an_object": "row is not an object with named fields",
    "prompt": "invalid prompt",
    "repeated_key": "key is given twice in one object",
    "repeated_prompt": "both answers repeat the prompt",
    "same_answers": "chosen and rejected answer are the same",
    "too_long": "row is too long",
    "turn_without_end": "learned turn without a token that ends it",
    "unknown_token": "token that the model has no embedding for",
    "unreadable": "file cannot be read",
    "unreadable_value": "value that cannot be read from the Arrow or Parquet file",
    "wrong_type": "field has a value of the wrong type or an unknown value",
}
"""Kind -> words that follow a number of rows."""


def reason(kind: str) -> str:
    """The words for a kind; words stay as they are, since manifests of earlier versions have kinds in their place."""
    return REASONS.get(kind, kind.replace("_", " "))


def by_reason(skipped: Mapping[str, int]) -> dict[str, int]:
    """Number of rows by kind, or by reason already -> number by reason, sorted."""
    counts: dict[str, int] = {}
    for kind, number in skipped.items():
        counts[reason(kind)] = counts.get(reason(kind), 0) + number
    return dict(sorted(counts.items()))


def with_reasons(rows: Mapping[str, object]) -> dict[str, object]:
    """`dataset` of a manifest of any version, or of a record of the pull, with reasons in place of kinds."""
    changed = {
        name: by_reason(value) if name == "skipped" else with_reasons(value)
        for name in ("skipped", "validation")
        if isinstance(value := rows.get(name), Mapping)
    }
    return {**rows, **changed}
