"""What `plan` takes from the settings: how it reaches stores, what it calls the run, and the adapter's options."""

from __future__ import annotations

from dataclasses import replace

from job.model.adapter_options import MANY_STEPS, AdapterOptions, make_options
from job.settings.load import Settings
from job.storage.open import StorageOptions, storage_options

QUICK_TRIES = 2
"""How often `plan` tries a request at most."""


def quick_storage(settings: Settings) -> StorageOptions:
    """How to reach stores, with few tries. That one answers is checked first: see `first_answer`."""
    storage = storage_options(settings.storage)
    return replace(storage, retries=min(storage.retries, QUICK_TRIES))


def place_of_run(settings: Settings) -> str:
    """Where the run will be, in words: an id that was generated for this command is not the one that it will have."""
    output = settings.run.output.rstrip("/")
    return f"a new run in {output}" if settings.sources.get("run.id") == "generated" else f"{output}/{settings.run.id}"


def adapter_options(settings: Settings) -> AdapterOptions:
    """As in a run, but without the number of steps, which is unknown until the rows are counted."""
    return make_options(dict(settings.lora), settings.train.max_steps or MANY_STEPS, settings.model.add_tokens)
