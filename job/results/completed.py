"""Whether a run is complete: its manifest exists, and so do all files that it lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from job import log
from job.errors import GateError
from job.records import Artifact
from job.runs.attempt import missing
from job.runs.layout import RESULTS
from job.storage.open import ObjectStore


def read_complete(store: ObjectStore) -> dict[str, Any] | None:
    """The manifest of a run that is complete; None for any other run."""
    results, gone = _read(store)
    return None if gone else results


def withdraw_incomplete(store: ObjectStore) -> None:
    """Removes a manifest that lists missing files: the platform copied the run's folder while the run ended.

    Raises:
        Replaced: Another attempt owns the run.
    """
    if gone := _read(store)[1]:
        log.get_logger().warning("the manifest is there, but not all that it lists: the run goes on", gone=gone)
        store.delete(RESULTS)


def _read(store: ObjectStore) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest, if there is one, and the files that it lists but that do not exist."""
    found = store.read(RESULTS)
    results: dict[str, Any] | None = None if found is None else json.loads(found.data)
    return results, missing(store, [Artifact(**entry) for entry in results["artifacts"]]) if results else []


def require_gate(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results, if they pass the quality gate.

    Raises:
        GateError: They do not.
    """
    if results["gate"]["passed"] is False:
        raise GateError("; ".join(results["gate"]["reasons"]))
    return dict(results)
