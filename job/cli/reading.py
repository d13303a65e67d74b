"""What the commands that read runs have in common: settings that say how to reach stores, and the log."""

from __future__ import annotations

from dataclasses import replace

from job import log
from job.cli.arguments import Arguments
from job.settings.load import Settings, load_reading, secrets
from job.storage.open import StorageOptions, storage_options

_QUICK_TRIES = 4


def reading(parsed: Arguments, *, quick: bool = False) -> tuple[StorageOptions, str | None]:
    """Configures the log; returns how to reach stores, and the folder for downloads.

    Args:
        parsed: With the settings on the command line.
        quick: Whether a store that does not answer is reported after about 5 s of pauses, since a person waits.
    """
    settings: Settings = load_reading(parsed.settings)
    log.configure(settings.log.format, settings.log.level, secrets())
    storage = storage_options(settings.storage)
    if quick:
        storage = replace(storage, retries=min(storage.retries, _QUICK_TRIES))
    return storage, settings.storage.cache
