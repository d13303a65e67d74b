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
    for key, serve_check in read_sealed(store, keys, parse_serve_check, "the record of a serve check", differences):
        if key != served_key(serve_check.format, serve_check.server):
            differences.append(Difference(key, "the record of this format and server", show(serve_check.format)))
            continue
        differences += _differences(key, serve_check, results, copies)
        outcome = "holds" if serve_check.holds else "differs"
        notes.append(
            f"{serve_check.format} by {serve_check.server}: {outcome}, {serve_check.alike} of "
            f"{len(serve_check.compared)} predictions as recorded"
        )
    return CheckResult("served", count(len(keys), "record"), tuple(differences), tuple(notes))


def _differences(key: str, serve_check: ServeCheck, results: Mapping[str, Any], copies: Copies) -> Iterator[Difference]:
    """Where a record differs from the run's own answers."""
    candidates = {export["format"]: export["candidate"] for export in results.get("exports", ())}
    if serve_check.format != "adapter" and serve_check.format not in candidates:
        yield Difference(f"{key} format", show(serve_check.format), "no such format in this run")
        return
    side = (
        "adapter"
        if serve_check.format == "adapter"
        else export_side(serve_check.format, candidates[serve_check.format])
    )
    by_task: dict[str, dict[str, samples.Sample]] = {}
    for question in serve_check.asked:
        path = answers_key(question.task, side)
        if question.task not in by_task:
            try:
                task_samples = samples.parse(copies[path].read_bytes()) if path in copies else []
            except ValueError:  # `check_evaluation` reports it
                task_samples = []
            by_task[question.task] = {sample.id: sample for sample in task_samples}
        sample = by_task[question.task].get(question.id)
        if sample is None:
            yield Difference(f"{key} {question.task} {show(question.id)}", "a question of the run", f"not in {path}")
            continue
        yield from find_differences(
            f"{key} {question.task} {question.id} recorded", question.recorded, sample.prediction
        )
        yield from find_differences(
            f"{key} {question.task} {question.id} margin", question.margin, margin(sample.log_likelihoods)
        )
