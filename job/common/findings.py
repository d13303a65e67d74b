"""The kinds of findings of the audit, and what becomes of rows that have one: names that settings and report know.

How each kind is found is in `job/audit/kinds.py`, which says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Action = Literal["record", "skip", "error"]
ALL = "all"
"""In `JOB_DATA__ON_FINDING`, every kind that is not named."""

OVERLAP = "overlap"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"

KINDS: Mapping[str, str] = {
    OVERLAP: "training row with a scored question",
    DUPLICATE: "row with the same text as an earlier one",
    NEAR_DUPLICATE: "row with nearly the same text as an earlier one",
    "secret": "row with a key, token or password",
    "email": "row with an e-mail address",
    "phone": "row with a phone number",
    "iban": "row with a bank account (IBAN)",
    "card": "row with a payment card number",
}
"""Kind -> what a row with a finding of it is."""


def action_of(on_finding: Mapping[str, Action], kind: str) -> Action:
    """What becomes of rows with findings of a kind."""
    return on_finding.get(kind, on_finding.get(ALL, "record"))
