"""What a run claims about preferences is checked against its settings and its reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.runs.layout import LOG_PROBS
from job.verification.check_preferences import check_preferences

SETTINGS = {"train.method": {"value": "dpo"}, "train.beta": {"value": 0.1}, "lora.start": {"value": None}}
TRAINING = {"method": "dpo", "beta": 0.1, "reference": "base"}
ROWS = [[-1.5, -2.5], [-3.0, 0.0]]


def manifest(settings: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    """The part of a manifest that is looked at."""
    changed = {name: {"value": value} for name, value in (settings or {}).items()}
    return {"settings": SETTINGS | changed, "training": TRAINING | training, "dataset": {"rows": 2}}


def copies(folder: Path, *rows: Any) -> dict[str, Path]:
    """The reference's file with these rows."""
    path = folder / "reference.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {LOG_PROBS: path}


def test_what_holds(tmp_path: Path) -> None:
    """A run by its settings, with two log-probabilities a row, has no difference; plain fine-tuning is left out."""
    found = check_preferences(manifest(), copies(tmp_path, *ROWS))
    assert found is not None
    assert found.differences == ()
    plain = {"settings": {}, "training": {}, "dataset": {"rows": 2}}  # as an earlier version wrote it
    assert check_preferences(plain, {}) is None


@pytest.mark.parametrize(
    ("settings", "training", "where"),
    [
        ({"train.method": "sft"}, {}, "method"),
        ({}, {"method": "sft"}, "method"),
        ({}, {"beta": 0.2}, "beta"),
        ({"lora.start": "adapter"}, {}, "reference"),
        ({}, {"reference": None}, "reference"),
        ({"train.method": "orpo"}, {"method": "orpo", "reference": None}, LOG_PROBS),
    ],
)
def test_a_claim_beside_the_settings(
    tmp_path: Path, settings: dict[str, Any], training: dict[str, Any], where: str
) -> None:
    """Another method, strength or reference than the settings', and a reference without use, are differences."""
    found = check_preferences(manifest(settings, **training), copies(tmp_path, *ROWS))
    assert found is not None
    assert any(where in difference.where for difference in found.differences)


@pytest.mark.parametrize("rows", [[ROWS[0]], [ROWS[0], [0.5, -1.0]], [ROWS[0], [-1.0]], [ROWS[0], ["a", "b"]]])
def test_a_reference_with_other_rows(tmp_path: Path, rows: list[Any]) -> None:
    """A missing row, and what is no pair of log-probabilities, are differences."""
    found = check_preferences(manifest(), copies(tmp_path, *rows))
    assert found is not None
    assert LOG_PROBS in found.differences[0].where


def test_a_missing_reference() -> None:
    """Without the file nothing shows what was compared with."""
    found = check_preferences(manifest(), {})
    assert found is not None
    assert found.differences[0].where == LOG_PROBS
