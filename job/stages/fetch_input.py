"""Copies an input of the run from its store to this attempt's work folder; an error names the setting it is from."""

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
}
"""Folder for what is fetched -> the setting that names it."""
LATER = "later/"
"""Stands before the folder of what a later stage reads."""


def fetch_input(attempt: Attempt, place: str, kind: str, storage: StorageOptions) -> str:
    """The path of an input on this machine; a path or a hub id stays as it is.

    Args:
        attempt: Its watchdog is told that the job works; below its work folder the copy goes.
        place: Where the input is, as its setting says.
        kind: The folder of the copy; it begins with `LATER` or not, then with a key of `_SETTING_OF`.
        storage: How to reach stores.

    Raises:
        DataError, SettingsError: There is nothing at the place.
        Unreachable, AccessDenied: The store cannot be used.
        Preempted: The job was asked to stop.
    """
    attempt.alive()
    with named_by(_SETTING_OF[kind.removeprefix(LATER).partition("/")[0]], ": "):
        return fetch(place, attempt.work / kind, storage)
