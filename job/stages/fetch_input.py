"""Copies an input of the run from its store to this attempt's work folder; an error names the input's setting."""

from __future__ import annotations

from job.errors import named_by
from job.runs.attempt import Attempt
from job.storage.open import StorageOptions, fetch

_SETTING_OF = {
    "data": "JOB_DATA__SOURCE",
    "validation": "JOB_DATA__VALIDATION",
    "questions": "JOB_EVAL__DATA",
    "prompts": "JOB_EVAL__PROMPTS",
    "safety": "JOB_DATA__SAFETY_MODEL",
    "judge": "JOB_EVAL__JUDGE",
    "start": "JOB_LORA__START",
}
"""First part of an input's folder -> the setting that names the input."""
LATER = "later/"
"""Prefix of the folders for the inputs of a later training stage."""


def fetch_input(attempt: Attempt, location: str, kind: str, storage: StorageOptions) -> str:
    """The path of an input on this machine; a path or a hub id is returned unchanged.

    Args:
        attempt: Its work folder gets the copy; its watchdog is reset.
        location: Path, URI or hub id of the input, as in its setting.
        kind: The folder of the copy in the work folder: optionally `LATER`, then a key of `_SETTING_OF`.
        storage: How to reach stores.

    Raises:
        DataError, SettingsError: There is nothing at the location.
        Unreachable, AccessDenied: The store cannot be used.
        Preempted: The job was asked to stop.
    """
    attempt.check_stop()
    with named_by(_SETTING_OF[kind.removeprefix(LATER).partition("/")[0]], ": "):
        return fetch(location, attempt.work / kind, storage)
