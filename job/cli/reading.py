"""What the commands that read runs have in common: how to reach stores, the log, and `--key`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from job import log
from job.cli.arguments import Arguments
from job.errors import JobError, Problem, raise_problems
from job.results.signing import load_public_key
from job.runs.layout import LEASE, RESULTS
from job.settings.load import Settings, load_reading, output_folder, secrets
from job.storage.first_answer import ANSWER_SECONDS, require_answers
from job.storage.open import StorageOptions, open_store, storage_options

_QUICK_TRIES = 4


def reading(parsed: Arguments, *, quick: bool = False) -> tuple[StorageOptions, str | None]:
    """Configures the log; returns how to reach stores, and the folder for downloads.

    Args:
        parsed: With the settings on the command line.
        quick: Whether a store that does not answer is reported after about 5 s of pauses, or 30 s if it accepts
            connections, since a person waits.

    Raises:
        SettingsError: A setting is wrong, or a run is named by its id instead of its path.
        Unreachable: With `quick`, a store of the runs does not answer.
    """
    settings: Settings = load_reading(parsed.settings)
    log.configure(settings.log.format, settings.log.level, secrets())
    storage = storage_options(settings.storage)
    if quick:
        storage = replace(storage, retries=min(storage.retries, _QUICK_TRIES))
        require_answers(parsed.runs, storage)
    raise_problems(_named_by_id(parsed.runs, storage))
    return storage, settings.storage.cache


def signer(parsed: Arguments) -> str | None:
    """The public key in PEM that `--key` names; None without it. Raises SettingsError if the file holds none."""
    return load_public_key(parsed.options["--key"]) if "--key" in parsed.options else None


def _named_by_id(runs: Iterable[str], storage: StorageOptions) -> Iterator[Problem]:
    """Names that are no path, but the id of a run in the folder of JOB_RUN__OUTPUT."""
    for name in runs:
        if "/" in name.rstrip("/") or Path(name).exists():
            continue
        path = f"{output_folder().rstrip('/')}/{name.rstrip('/')}"
        with suppress(JobError):  # then the command itself says what is wrong with the name
            once = replace(storage, retries=1, timeout_seconds=min(storage.timeout_seconds, ANSWER_SECONDS))
            store = open_store(path, once)
            if store.tag(RESULTS) is not None or store.tag(LEASE) is not None:
                yield Problem(name, f"is no path, but the id of a run; give its path, {path}")
