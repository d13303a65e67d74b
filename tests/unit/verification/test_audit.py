"""What a manifest says about the audit is checked against the published findings."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", ["secret"]),
        ("where", 3),
        ("row", [2]),
        ("row", "2"),
        ("task", {"quiz": 1}),
        ("question", "7"),
        ("exact", "yes"),
        ("score", "0.5"),
        ("more", 1),
    ],
)
def test_a_line_with_a_value_of_another_type(tmp_path: Path, name: str, value: object) -> None:
    """It is no finding; that is a difference, and no error."""
    path = tmp_path / "findings.jsonl"
    path.write_text("".join(json.dumps({**json.loads(one.line()), name: value}) + "\n" for one in FOUND))
    (found,) = check_audit(manifest(), {FINDINGS: path})
    (difference,) = found.differences
    assert (difference.where, difference.claimed) == (FINDINGS, "one finding on each line")
    assert difference.found.startswith("line 1: ")


AUDIT = "results.json dataset.audit"


@pytest.mark.parametrize(
    ("place", "value", "where"),
    [
        ("findings", 3, f"{AUDIT}.findings"),
        ("left_out", 2, f"{AUDIT}.left_out"),
        ("overlap", {"quiz": [7, 8]}, f"{AUDIT}.overlap.quiz"),
        ("checks/overlap/rows", 2, f"{AUDIT}.checks.overlap.rows"),
        ("checks/overlap/places", [], f"{AUDIT}.checks.overlap.places"),
        ("checks/overlap/action", "skip", f"{AUDIT}.checks.overlap.action"),
        ("checks/secret/action", "record", f"{AUDIT}.checks.secret.action"),
        ("checks/email/rows", 1, f"{AUDIT}.checks.email.rows"),
        ("checks/phone/rows", 0, f"{AUDIT}.checks.phone.rows"),  # it was not looked for
        ("rows", 21, f"{AUDIT}.languages"),
        ("lengths/tokens", {"min": 0, "max": 19}, f"{AUDIT}.lengths.tokens"),
        ("safety", {"threshold": 0.5}, f"{AUDIT}.safety"),
    ],
)
def test_a_manifest_that_says_something_else(tmp_path: Path, place: str, value: object, where: str) -> None:
    """Each figure, place and action is compared; a row with two findings is left out once."""
    path = tmp_path / "findings.jsonl"
    path.write_bytes(DATA + Finding("secret", "rows.jsonl:3", 2).line().encode())
    record = manifest()
    audit = record["dataset"]["audit"]
    none = {"action": "record", "checked_by": "", "not_checked": "", "rows": 0, "places": []}
    audit["checks"] |= {"email": none, "phone": {**none, "not_checked": "not installed", "rows": None}}
    audit["findings"] = 4
    (found,) = check_audit(record, {FINDINGS: path})
    assert (found.what, found.extent, found.differences) == ("audit", "4 findings", ())
    *names, last = place.split("/")
    for name in names:
        audit = audit[name]
    audit[last] = value
    (found,) = check_audit(record, {FINDINGS: path})
    assert [difference.where for difference in found.differences][:1] == [where]


def test_actions_that_are_none(tmp_path: Path) -> None:
    """The setting of a manifest is not trusted to have actions by kind; without it, every finding is recorded."""
    path = tmp_path / "findings.jsonl"
    path.write_bytes(DATA)
    record = manifest()
    for value in ("skip", ["secret"], 5):
        record["settings"]["data.on_finding"]["value"] = value
        (found,) = check_audit(record, {FINDINGS: path})
        assert [difference.where for difference in found.differences] == ["results.json settings, JOB_DATA__ON_FINDING"]
    record["dataset"]["audit"]["left_out"] = 0
    record["dataset"]["audit"]["checks"]["secret"]["action"] = "record"
    for settings in ({}, {"data.on_finding": {"value": None}}):
        (found,) = check_audit({**record, "settings": settings}, {FINDINGS: path})
        assert found.differences == ()


def test_kinds_that_the_manifest_does_not_have(tmp_path: Path) -> None:
    """A finding of a kind that was not checked, and the kind unsafe without a classifier."""
    path = tmp_path / "findings.jsonl"
    path.write_bytes(DATA + Finding("email", "rows.jsonl:5", 4).line().encode())
    record = manifest()
    record["dataset"]["audit"]["findings"] = 4
    (found,) = check_audit(record, {FINDINGS: path})
    assert [(one.where, one.claimed, one.found) for one in found.differences] == [
        (FINDINGS, "findings of the manifest's kinds", "email")
    ]
    path.write_bytes(DATA)
    record = manifest()
    record["dataset"]["audit"]["checks"]["unsafe"] = asdict(CheckRecord("record", "", "", 0, []))
    (found,) = check_audit(record, {FINDINGS: path})
    assert [one.where for one in found.differences] == [f"{AUDIT}.checks"]


@pytest.mark.parametrize(
    ("labels", "holds"),
    [
        (["worse", "bad", "worse"], True),
        (["bad"], False),
        (["bad", "worse", "worst"], False),
        ("bad", False),
        (5, False),
    ],
)
def test_labels_are_compared_as_a_set(tmp_path: Path, labels: object, holds: bool) -> None:  # noqa: FBT001
    """In whichever order, and however often, the setting names them; what is no list of labels is a difference."""
    path = tmp_path / "findings.jsonl"
    path.write_bytes(b"")
    safety = SafetyRecord("models/x", None, "0" * 64, ["worse", "bad"], 0.5)
    checks = {"unsafe": CheckRecord("record", "", "", 0, [])}
    record = AuditRecord(20, 0, checks, {}, 0, 0, "0" * 64, 20, safety=safety)
    values = {"safety_model": "models/x", "unsafe_threshold": 0.5, "unsafe_labels": labels}
    settings = {f"data.{name}": {"value": value} for name, value in values.items()}
    (found,) = check_audit({"dataset": {"audit": asdict(record)}, "settings": settings}, {FINDINGS: path})
    assert (found.differences == ()) == holds


@pytest.mark.parametrize(
    ("finding", "holds"),
    [
        (Finding("unsafe", "rows.jsonl:4", 3, score=0.5), True),  # the threshold itself
        (Finding("unsafe", "rows.jsonl:4", 3, score=1.0), True),
        (Finding("unsafe", "rows.jsonl:4", 3, score=0.4999), False),
        (Finding("unsafe", "rows.jsonl:4", 3, score=1.0001), False),
        (Finding("unsafe", "rows.jsonl:4", 3), False),
        (Finding("secret", "rows.jsonl:4", 3), True),
        (Finding("secret", "rows.jsonl:4", 3, score=0.75), False),
    ],
)
def test_scores_of_findings(tmp_path: Path, finding: Finding, holds: bool) -> None:  # noqa: FBT001
    """Of unsafe rows alone, from the threshold, 0.5, to 1."""
    path = tmp_path / "findings.jsonl"
    path.write_text(finding.line())
    safety = SafetyRecord("models/x", None, "0" * 64, ["bad"], 0.5)
    checks = {
        kind: CheckRecord("record", "", "", *counts([finding]).get(kind, (0, []))) for kind in ("secret", "unsafe")
    }
    record = AuditRecord(20, 0, checks, {}, 1, path.stat().st_size, "0" * 64, 20, safety=safety)
    settings = {"data.safety_model": {"value": "models/x"}, "data.unsafe_threshold": {"value": 0.5}}
    (checked,) = check_audit({"dataset": {"audit": asdict(record)}, "settings": settings}, {FINDINGS: path})
    assert [difference.where for difference in checked.differences] == ([] if holds else [FINDINGS])


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
