"""Languages and lengths of rows: repeatable, and no language if it cannot be determined."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from job.audit import statistics as audit_statistics
from job.audit.rows import AuditedRow, RowAudit, set_up
from job.audit.statistics import QUANTILES, language_checker, language_finder, quantiles
from job.common.findings import UNKNOWN_LANGUAGE, statistics
from tests.unit.audit.test_audit import audit_of, plain, read

found_out = pytest.mark.skipif(language_checker() is None, reason="pycld2 is not installed")
TEXTS = {
    "en": "The quick brown fox jumps over the lazy dog and runs away into the forest.",
    "de": "Der schnelle braune Fuchs springt über den faulen Hund und läuft in den Wald.",
    "fr": "Le renard brun saute par-dessus le chien paresseux et court dans la forêt.",
    "ja": "素早い茶色の狐はのろまな犬を飛び越えて森の中へ走っていきます。",
    UNKNOWN_LANGUAGE: "x = 14.285 * (y + 7)",
}


@found_out
@pytest.mark.parametrize(("language", "text"), TEXTS.items())
def test_the_language_of_a_text(language: str, text: str) -> None:
    """A sentence is in its language, a formula in none, also with characters that no text has."""
    find = language_finder()
    assert find(text) == language
    assert find(f"{text} \x00\x07\x9f\ud800\ufffe") == language
    assert find(f"<p>{text}</p>") == language


@found_out
def test_languages_are_counted(tmp_path: Path) -> None:
    """The record has the rows of each language, the commonest first, and what found them out."""
    rows = [{"instruction": text, "output": text} for text in (TEXTS["de"], TEXTS["fr"], TEXTS["en"], TEXTS["fr"] * 2)]
    record = audit_of(read(tmp_path, rows))
    assert list(record.languages.items()) == [("fr", 2), ("de", 1), ("en", 1)]
    assert record.languages_by.startswith("pycld2 ")
    assert f"Languages of the rows, by {record.languages_by}: fr 2, de 1, en 1." in statistics(asdict(record), {})


@found_out
def test_a_language_survives_the_way_to_another_process() -> None:
    """As bytes and back."""
    found = AuditedRow.from_bytes(RowAudit(set_up(None, {}))([TEXTS["ja"]]))
    assert found.language == "ja"
    assert AuditedRow.from_bytes(found.to_bytes()) == found


def test_without_the_package_languages_are_said_to_be_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No language is counted, and record and report name the package."""
    monkeypatch.setattr(audit_statistics, "find_spec", lambda _: None)
    record = audit_of(read(tmp_path, [plain(1), plain(2)]))
    assert record.languages == {}
    assert record.languages_not_checked == "the package pycld2 is not installed"
    assert "Languages were not detected: the package pycld2 is not installed." in statistics(asdict(record), {})


def test_lengths_are_those_of_the_examples(tmp_path: Path) -> None:
    """Quantiles of tokens and target tokens, over all rows, also those that are held out or left out."""
    rows = [plain(n) | {"output": "word " * (n + 1)} for n in range(40)]
    every = read(tmp_path, rows)
    record = audit_of(every)
    lengths = sorted(every.examples.lengths)
    assert record.lengths["tokens"] == {
        "min": lengths[0],
        "p5": lengths[1],
        "p25": lengths[9],
        "median": lengths[19],
        "p75": lengths[29],
        "p95": lengths[37],
        "p99": lengths[39],
        "max": lengths[39],
    }
    assert record.lengths["target_tokens"] == quantiles(every.examples.target_counts)
    held = audit_of(read(tmp_path, rows, validation=10))
    assert held.lengths == record.lengths


@pytest.mark.parametrize("values", [[], [3], [5, 1]])
def test_quantiles_are_values(values: list[int]) -> None:
    """Of no values there are none; the smallest and the largest are the ends."""
    found = quantiles(values)
    assert list(found) == (list(QUANTILES) if values else [])
    assert not values or (found["min"], found["max"]) == (min(values), max(values))


def test_what_was_cut_is_said() -> None:
    """Rows that were cut or split are in the sentences, and records of before have none."""
    cut: dict[str, Any] = {"truncated": 3, "tokens_cut": 1200}
    assert statistics({}, cut) == ["3 rows cut off, by 1,200 tokens in all."]
    assert statistics({}, {"split": 1, "pieces": 4}) == ["1 long row split into 4 pieces."]
    assert statistics(json.loads("{}"), {}) == []
