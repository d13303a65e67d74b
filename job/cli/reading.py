"""What the commands that read runs have in common: settings that say how to reach stores, and the log."""

from __future__ import annotations

from job import log
from job.cli.arguments import Arguments
from job.settings.load import Settings, load_reading, secrets
from job.storage.open import StorageOptions, storage_options


def reading(given: Arguments) -> tuple[StorageOptions, str | None]:
    """Configures the log; returns how to reach stores, and the folder for downloads."""
    settings: Settings = load_reading(given.settings)
    log.configure(settings.log.format, settings.log.level, secrets())
    return storage_options(settings.storage), settings.storage.cache
