"""The kinds of findings of the audit, and the actions on rows that have one: names in settings and report.

How each kind is found is in `job/audit/detectors.py`, which says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from job.common.formatting import count

Action = Literal["record", "skip", "error"]
UNKNOWN_LANGUAGE = "unknown"
"""The recorded language where it could not be detected."""
ALL = "all"
"""In `JOB_DATA__ON_FINDING`, every kind that is not named."""

OVERLAP = "overlap"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"
UNSAFE = "unsafe"
"""Looked for with JOB_DATA__SAFETY_MODEL only."""
_LANGUAGES = 5
"""How many languages a sentence names."""

KINDS: Mapping[str, str] = {
    OVERLAP: "training row with a scored question",
    DUPLICATE: "row with the same text as an earlier one",
    NEAR_DUPLICATE: "row with nearly the same text as an earlier one",
    "secret": "row with a key, token or password",
    "email": "row with an e-mail address",
    "phone": "row with a phone number",
    "iban": "row with a bank account (IBAN)",
    "card": "row with a payment card number",
    UNSAFE: "row that JOB_DATA__SAFETY_MODEL classifies as unsafe",
}
"""Kind -> what a row with a finding of it is."""


def action_of(on_finding: Mapping[str, Action], kind: str) -> Action:
    """What becomes of rows with findings of a kind."""
    return on_finding.get(kind, on_finding.get(ALL, "record"))


def statistics(audit: Mapping[str, Any], long_rows: Mapping[str, int]) -> list[str]:
    """What kind of text the rows are, in sentences: languages, lengths, and what was cut; none for older runs.

    Args:
        audit: `records.AuditRecord` as JSON.
        long_rows: `records.DatasetRecord.long_rows`.
    """
    sentences = []
    if languages := audit.get("languages"):
        known = [f"{name} {number:,}" for name, number in languages.items() if name != UNKNOWN_LANGUAGE]
        shown = [*known[:_LANGUAGES], *([f"{len(known) - _LANGUAGES} others"] if len(known) > _LANGUAGES else [])]
        unknown = languages.get(UNKNOWN_LANGUAGE)
        shown += [f"not told {unknown:,}"] if unknown else []
        sentences.append(f"Languages of the rows, by {audit['languages_by']}: {', '.join(shown)}.")
    elif why := audit.get("languages_not_checked"):
        sentences.append(f"Languages were not detected: {why}.")
    for name, what in (("tokens", "Tokens"), ("target_tokens", "Target tokens")):
        if of := audit.get("lengths", {}).get(name):
            sentences.append(
                f"{what} of an example: half have at most {of['median']:,}, 95 % at most {of['p95']:,}, "
                f"the longest {of['max']:,}."
            )
    if truncated := long_rows.get("truncated"):
        sentences.append(
            f"{count(truncated, 'row')} cut off, by {count(long_rows.get('tokens_cut', 0), 'token')} in all."
        )
    if split := long_rows.get("split"):
        sentences.append(f"{count(split, 'long row')} split into {count(long_rows.get('pieces', 0), 'piece')}.")
    return sentences
