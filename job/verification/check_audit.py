"""Checks what the manifest says of the audit, from the published findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from job.audit.audit import Finding, counts, overlapping, parse_findings
from job.audit.statistics import QUANTILES
from job.common.findings import UNSAFE, action_of
from job.common.formatting import count
from job.runs.layout import FINDINGS, RESULTS
from job.verification.differences import CheckResult, Copies, Difference, find_differences, show


def check_audit(results: Mapping[str, Any], copies: Copies) -> Iterator[CheckResult]:
    """Counts, places and overlap from the findings, actions from the settings; none for runs of older versions."""
    audit = results["dataset"].get("audit")
    if audit is None:
        return
    extent = count(audit["findings"], "finding")
    if FINDINGS not in copies:
        yield CheckResult("audit", extent, (Difference(FINDINGS, "the findings", "nothing that can be read"),))
        return
    try:
        findings = parse_findings(copies[FINDINGS].read_bytes())
    except ValueError as error:
        yield CheckResult("audit", extent, (Difference(FINDINGS, "one finding on each line", str(error)),))
        return
    on_finding = results["settings"].get("data.on_finding", {}).get("value") or {}
    if not isinstance(on_finding, Mapping):
        where = f"{RESULTS} settings data.on_finding"
        yield CheckResult("audit", extent, (Difference(where, show(on_finding), "no actions by kind"),))
        return
    actions = {kind: action_of(on_finding, kind) for kind in audit["checks"]}
    by_kind = counts(findings)
    computed = {
        "findings": len(findings),
        "left_out": len({finding.row for finding in findings if actions.get(finding.kind) == "skip"}),
        "overlap": overlapping(findings),
        "checks": {
            kind: {
                "action": actions[kind],
                "rows": None if check["not_checked"] else by_kind.get(kind, (0, []))[0],
                "places": by_kind.get(kind, (0, []))[1],
            }
            for kind, check in audit["checks"].items()
        },
    }
    checks = {
        kind: {name: check[name] for name in ("action", "rows", "places")} for kind, check in audit["checks"].items()
    }
    claimed = {**{name: audit[name] for name in ("findings", "left_out", "overlap")}, "checks": checks}
    differences = list(find_differences(f"{RESULTS} dataset.audit", claimed, computed))
    if unknown := sorted({finding.kind for finding in findings} - set(checks)):
        differences.append(Difference(FINDINGS, "findings of the manifest's kinds", ", ".join(unknown)))
    differences += _statistics_differ(audit)
    differences += _safety_differs(results, findings)
    yield CheckResult("audit", extent, tuple(differences))


def _safety_differs(results: Mapping[str, Any], findings: Sequence[Finding]) -> Iterator[Difference]:
    """Whether classifier and threshold are those of the settings, and the score of each unsafe row reaches it."""
    audit, where = results["dataset"]["audit"], f"{RESULTS} dataset.audit.safety"
    safety, settings = audit.get("safety"), results["settings"]
    classifier = settings.get("data.safety_model", {}).get("value")
    if (safety is None) != (classifier is None):
        yield Difference(where, f"JOB_DATA__SAFETY_MODEL {show(classifier)}", show(safety))
    elif safety is not None:
        expected = {"model": classifier, "threshold": settings.get("data.unsafe_threshold", {}).get("value")}
        labels = settings.get("data.unsafe_labels", {}).get("value")
        if labels is not None:
            expected["unsafe_labels"] = sorted(set(map(str, labels))) if isinstance(labels, list) else labels
        claimed = {**safety, "unsafe_labels": sorted(safety["unsafe_labels"])}
        yield from find_differences(where, {name: claimed[name] for name in expected}, expected)
    if (UNSAFE in audit["checks"]) != (safety is not None):
        yield Difference(f"{RESULTS} dataset.audit.checks", "the kind unsafe with a classifier only", show(safety))
    least = 0.0 if safety is None else safety["threshold"]
    for finding in findings:
        scored = isinstance(finding.score, float) and least <= finding.score <= 1
        if scored != (finding.kind == UNSAFE):
            yield Difference(
                FINDINGS, f"a score of {least:g} to 1 for each unsafe row", f"{show(finding.score)} {finding.kind}"
            )


def _statistics_differ(audit: Mapping[str, Any]) -> Iterator[Difference]:
    """Contradictions among figures about the rows, which are not published themselves."""
    languages = audit.get("languages") or {}
    if languages and sum(languages.values()) != audit["rows"]:
        yield Difference(f"{RESULTS} dataset.audit.languages", str(audit["rows"]), str(sum(languages.values())))
    for name, quantiles in (audit.get("lengths") or {}).items():
        if list(quantiles.values()) != sorted(quantiles.values()) or list(quantiles) != list(QUANTILES):
            yield Difference(f"{RESULTS} dataset.audit.lengths.{name}", "ascending quantiles", str(quantiles))
