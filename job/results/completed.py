"""Whether a run is complete: its manifest is undamaged, and all files that it lists are what was published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from job import log
from job.common.hashing import unsealed
from job.errors import GateError
from job.records import Artifact
from job.runs.attempt import missing
from job.runs.layout import EXPORT, RESULTS, SIGNATURE
from job.runs.work_folder import folder_for
from job.storage.base import delete_in_turn, read_record
from job.storage.open import ObjectStore
from job.storage.verified_download import altered

_MAX_SHOWN = 200
"""Characters of an error's text that are shown."""


def read_complete(store: ObjectStore, cache: str | None = None) -> dict[str, Any] | None:
    """The manifest of a run that is complete; None for any other run. `cache` is where copies of its files are made."""
    results, damaged_files = _read(store, cache)
    return None if damaged_files else results


def withdraw_incomplete(store: ObjectStore, cache: str | None = None) -> None:
    """Removes a manifest that is damaged, or lists files that are missing or damaged; `cache` as in `read_complete`.

    A platform may have copied the folder while the run ended.

    Raises:
        Replaced: Another attempt owns the run.
    """
    if damaged_files := _read(store, cache)[1]:
        log.get_logger().warning(
            "the manifest lists files that are missing or damaged: the run continues", gone=damaged_files
        )
        delete_in_turn(store, RESULTS)


def _read(store: ObjectStore, cache: str | None = None) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest, if there is one, and what is damaged in it, or listed in it but missing or damaged.

    Of exported models, which are many gigabytes, only the sizes are compared.
    """
    stored = read_record(store, RESULTS)
    if stored is None:
        return None, []
    try:
        unsealed(stored.data)
        results: dict[str, Any] = json.loads(stored.data)
        artifacts = [Artifact(**entry) for entry in results["artifacts"]]
    except (ValueError, KeyError, TypeError) as error:
        return None, [f"{RESULTS}: {str(error)[:_MAX_SHOWN]}"]
    if results.get("signing") and store.tag(SIGNATURE) is None:
        return results, [SIGNATURE]
    if missing_files := missing(store, artifacts):
        return results, missing_files
    with folder_for(f"completion of {store.uri}", cache) as folder:
        small = [artifact for artifact in artifacts if not artifact.path.startswith(EXPORT)]
        return results, altered(store, small, folder)


def require_gate(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results, if they pass the quality gate.

    Raises:
        GateError: They do not.
    """
    if results["gate"]["passed"] is False:
        raise GateError("; ".join(results["gate"]["reasons"]))
    return dict(results)
