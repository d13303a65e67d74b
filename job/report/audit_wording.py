"""Sentences about the audit of the training data, and about unsafe answers, which its classifier scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from job.common.findings import KINDS, statistics
from job.common.formatting import enumeration


def audit(dataset: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each kind of finding of the audit: what it is, in how many rows, where, and what became of the rows."""
    record = dataset.get("audit") or {"checks": {}}
    outcome_words = {"record": "kept", "skip": "left out", "error": "none"}
    return [
        {
            "kind": kind,
            "title": _plural(KINDS.get(kind, kind)),
            "rows": check["rows"],
            "places": _by_file(check["places"]),
            "more": max(0, (check["rows"] or 0) - len(check["places"])),
            "became": outcome_words[check["action"]] if check["rows"] else "",
            "checked_by": check["checked_by"],
            "not_checked": check["not_checked"],
        }
        for kind, check in record["checks"].items()
    ]


def audit_statistics(dataset: Mapping[str, Any]) -> list[str]:
    """What kind of text the rows are, in sentences; none for runs without an audit."""
    return statistics(dataset.get("audit") or {}, dataset.get("long_rows", {}))


def audit_safety(dataset: Mapping[str, Any]) -> str:
    """What the classifier of JOB_DATA__SAFETY_MODEL is, and when a row is unsafe; empty without one."""
    safety = (dataset.get("audit") or {}).get("safety")
    if safety is None:
        return ""
    commit = f" at commit {safety['revision'][:12]}" if safety["revision"] else ""
    return (
        f"Unsafe rows are those to which the classifier {safety['model']}{commit} (SHA-256 {safety['sha256'][:12]}...) "
        f"gives a probability of at least {safety['threshold']:g} for {enumeration(safety['unsafe_labels'])}."
    )


def unsafe_answers(results: Mapping[str, Any]) -> str:
    """How many answers to the prompts are unsafe, in a sentence; empty where no classifier scored them."""
    counts = results["evaluation"].get("unsafe_answers")
    if counts is None:
        return ""
    safety = results["dataset"]["audit"]["safety"]
    return (
        f"By the classifier {safety['model']}, {counts['base']:,} of the base's answers and {counts['adapter']:,} of "
        f"the adapter's are unsafe, with a probability of at least {safety['threshold']:g}."
    )


def audit_sentence(dataset: Mapping[str, Any]) -> str:
    """What the audit found, in a sentence or two for the model card; empty for runs without one."""
    kinds = audit(dataset)
    findings = [f"{kind['title'][0].lower()}{kind['title'][1:]}: {kind['rows']:,}" for kind in kinds if kind["rows"]]
    not_checked = [kind["kind"].replace("_", "-") for kind in kinds if kind["not_checked"]]
    parts = []
    if kinds:
        parts.append(f"The audit of the data found {'; '.join(findings) or 'nothing'}.")
    if not_checked:
        parts.append(f"It could not check {enumeration(not_checked)}.")
    return " ".join(parts)


def _plural(title: str) -> str:
    """The title of a kind of rows as a heading, such as `Rows with an e-mail address`."""
    rows = title.replace("row", "rows", 1)
    return f"{rows[0].upper()}{rows[1:]}"


def _by_file(locations: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Locations of rows such as `file:17`, grouped by file: the file, and the numbers in it."""
    files: list[tuple[str, list[str]]] = []
    for location in locations:
        file, colon, number = location.rpartition(":")
        if not colon:
            file, number = location, ""
        if not files or files[-1][0] != file:
            files.append((file, []))
        files[-1][1].append(number)
    return files
