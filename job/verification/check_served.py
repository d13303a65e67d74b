"""Checks the records of `serve-check --record`: each is sealed, and has the run's own answers unchanged.

The server's answers are not checked: `verify` reads only the run's folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from job.common.formatting import count
from job.evaluation import samples
from job.records import ServeCheck, margin
from job.results.after_run import parse_serve_check
from job.runs.layout import SERVED, answers_key, export_side, served_key
from job.storage.open import ObjectStore
from job.verification.differences import CheckResult, Copies, Difference, find_differences, show
from job.verification.sealed_records import read_sealed


def check_served(
    results: Mapping[str, Any], store: ObjectStore, listed: Mapping[str, int], copies: Copies
) -> CheckResult | None:
    """Checks every record below `served/`; None if there is none.

    Args:
        results: The manifest.
        store: The run's store.
        listed: Path -> bytes of every file in the store.
        copies: Local copies by path.
    """
    keys = sorted(key for key in listed if key.startswith(SERVED))
    if not keys:
        return None
    differences, notes = list[Difference](), []
    for key, found in read_sealed(store, keys, parse_serve_check, "the record of a serve check", differences):
        if key != served_key(found.format, found.server):
            differences.append(Difference(key, "the record of this format and server", show(found.format)))
            continue
        differences += _differences(key, found, results, copies)
        says = "holds" if found.holds else "differs"
        notes.append(
            f"{found.format} by {found.server}: {says}, {found.alike} of {len(found.compared)} predictions as recorded"
        )
    return CheckResult("served", count(len(keys), "record"), tuple(differences), tuple(notes))


def _differences(key: str, found: ServeCheck, results: Mapping[str, Any], copies: Copies) -> Iterator[Difference]:
    """Where a record differs from the run's own answers."""
    candidates = {export["format"]: export["candidate"] for export in results.get("exports", ())}
    if found.format != "adapter" and found.format not in candidates:
        yield Difference(f"{key} format", show(found.format), "no such format in this run")
        return
    side = "adapter" if found.format == "adapter" else export_side(found.format, candidates[found.format])
    by_task: dict[str, dict[str, samples.Sample]] = {}
    for one in found.asked:
        path = answers_key(one.task, side)
        if one.task not in by_task:
            try:
                read = samples.parse(copies[path].read_bytes()) if path in copies else []
            except ValueError:  # `check_evaluation` reports it
                read = []
            by_task[one.task] = {sample.id: sample for sample in read}
        sample = by_task[one.task].get(one.id)
        if sample is None:
            yield Difference(f"{key} {one.task} {show(one.id)}", "a question of the run", f"not in {path}")
            continue
        yield from find_differences(f"{key} {one.task} {one.id} recorded", one.recorded, sample.prediction)
        yield from find_differences(f"{key} {one.task} {one.id} margin", one.margin, margin(sample.log_likelihoods))
