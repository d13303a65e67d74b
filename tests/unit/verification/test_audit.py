"""What a manifest says of the audit is checked against the published findings."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from job.audit.audit import Finding, counts, overlapping
from job.audit.statistics import quantiles
from job.records import AuditRecord, CheckRecord, DatasetRecord, Pulled, SafetyRecord
from job.runs.layout import FINDINGS
from job.verification.check_audit import check_audit
from job.verification.check_history import _as_pulled

FOUND = [
    Finding("overlap", "rows.jsonl:3", 2, "quiz", 7, exact=True),
    Finding("secret", "rows.jsonl:3", 2),
    Finding("duplicate", "rows.jsonl:9", 8, repeats="rows.jsonl:1"),
]
DATA = "".join(one.line() for one in FOUND).encode()


def manifest() -> dict[str, Any]:
    """The part of a manifest that is looked at."""
    checks = {
        kind: CheckRecord("skip" if kind == "secret" else "record", "this project", "", *counts(FOUND)[kind])
        for kind in ("overlap", "secret", "duplicate")
    }
    record = AuditRecord(20, 1, checks, overlapping(FOUND), len(FOUND), len(DATA), "0" * 64, 20)
    record = replace(record, languages={"en": 18, "de": 2}, lengths={"tokens": quantiles(range(20))})
    return {"dataset": {"audit": asdict(record)}, "settings": {"data.on_finding": {"value": {"secret": "skip"}}}}


def wrong(folder: Path, data: bytes | None) -> bool:
    """Whether the check finds a difference."""
    path = folder / "findings.jsonl"
    if data is not None:
        path.write_bytes(data)
    (found,) = check_audit(manifest(), {} if data is None else {FINDINGS: path})
    return bool(found.differences)


def test_what_holds(tmp_path: Path) -> None:
    """The findings as they were published hold, and a run of an older version has no such check."""
    assert not wrong(tmp_path, DATA)
    assert not list(check_audit({"dataset": {}}, {}))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"question": 7', b'"question": 8'),
        (b'"kind": "secret"', b'"kind": "email"'),
        (b'"kind": "secret"', b'"kind": "kettle"'),
        (b'"where": "rows.jsonl:9"', b'"where": "rows.jsonl:8"'),
        (b'{"kind": "secret"', b'["kind": "secret"'),
        (b'{"kind": "overlap"', b'\n{"kind": "overlap"'),
    ],
)
def test_a_changed_byte_is_noticed(tmp_path: Path, old: bytes, new: bytes) -> None:
    """Another question, kind or place, and a line that is no finding, differ from what the manifest says."""
    assert DATA.count(old)
    assert wrong(tmp_path, DATA.replace(old, new, 1))


def test_missing_findings_are_noticed(tmp_path: Path) -> None:
    """Without the file, and without one of its lines, the audit does not hold."""
    assert wrong(tmp_path, None)
    assert wrong(tmp_path, DATA[: DATA.rindex(b"{")])


@pytest.mark.parametrize(("figures", "name", "value"), [("languages", "en", 17), ("lengths/tokens", "p95", 3)])
def test_figures_that_contradict_each_other(tmp_path: Path, figures: str, name: str, value: int) -> None:
    """Languages of another number of rows, and quantiles that do not ascend, are found."""
    path = tmp_path / "findings.jsonl"
    path.write_bytes(DATA)
    changed = manifest()
    inner = changed["dataset"]["audit"]
    for part in figures.split("/"):
        inner = inner[part]
    inner[name] = value
    (found,) = check_audit(changed, {FINDINGS: path})
    (difference,) = found.differences
    assert figures.rsplit("/", maxsplit=1)[-1] in difference.where


def test_unsafe_rows_are_those_of_the_classifier(tmp_path: Path) -> None:
    """Scores below the threshold, and another classifier, labels or threshold than the settings have, are found."""
    found = [Finding("unsafe", "rows.jsonl:4", 3, score=0.75)]
    path = tmp_path / "findings.jsonl"
    path.write_text("".join(one.line() for one in found))
    safety = SafetyRecord("models/x", None, "0" * 64, ["bad"], 0.5)
    checks = {"unsafe": CheckRecord("record", "models/x", "", *counts(found)["unsafe"])}
    record = AuditRecord(20, 0, checks, {}, 1, path.stat().st_size, "0" * 64, 20, safety=safety)
    names = ("safety_model", "unsafe_threshold", "unsafe_labels")

    def wrong_with(*values: Any, record: AuditRecord = record) -> bool:
        settings = {f"data.{name}": {"value": value} for name, value in zip(names, values, strict=True)}
        results = {"dataset": {"audit": asdict(record)}, "settings": settings}
        (found,) = check_audit(results, {FINDINGS: path})
        return bool(found.differences)

    assert not wrong_with("models/x", 0.5, None)
    assert not wrong_with("models/x", 0.5, ["bad"])
    assert wrong_with("models/x", 0.5, ["bad", "worse"])
    results = {"dataset": {"audit": asdict(record)}, "settings": {}}
    (checked,) = check_audit(results, {FINDINGS: path})
    assert checked.differences
    assert wrong_with("models/y", 0.5, None)
    assert wrong_with("models/x", 0.6, None)
    assert wrong_with("models/x", 0.5, ["worse"])
    assert wrong_with(None, 0.5, None)
    assert wrong_with("models/x", 0.8, None, record=replace(record, safety=replace(safety, threshold=0.8)))
    assert wrong_with("models/x", 0.5, None, record=replace(record, safety=None))


def test_records_of_before_have_no_languages() -> None:
    """A run that an earlier version has pulled holds, whichever version has published it."""
    audit = AuditRecord(20, 0, {}, {}, 0, 0, "0" * 64, 20)
    dataset = DatasetRecord("rows.jsonl", None, None, "alpaca", 20, {}, "0" * 64, 90, 80, 20, audit=audit)
    later = replace(audit, languages={"en": 20}, languages_by="pycld2 0.42", lengths={"tokens": quantiles(range(20))})
    older = {name: value for name, value in asdict(audit).items() if not name.startswith(("languages", "lengths"))}
    for published in (older, asdict(audit), asdict(later)):
        assert _as_pulled({"audit": published}, Pulled(dataset, "0" * 64, None, {}))["audit"] == asdict(audit)
    pulled = Pulled(replace(dataset, audit=later), "0" * 64, None, {})
    assert _as_pulled({"audit": {**asdict(later), "languages": {}}}, pulled)["audit"] != asdict(later)
    assert _as_pulled({"audit": asdict(later)}, Pulled(replace(dataset, audit=None), "", None, {}))["audit"] is None
