"""The ledger of a run's attempts: one sealed line in the store for each, noted while it goes on."""

from __future__ import annotations

from dataclasses import replace

from pydantic import TypeAdapter

from job.errors import DataError, Problem
from job.common.hashing import unsealed
from job.storage.open import ObjectStore
from job.records import AttemptRecord
import contextlib
import json
from collections.abc import Mapping
from typing import Any
from job.errors import Problem, SettingsError
from job.storage.open import Conflict, ObjectStore


def record_key(number: int) -> str:
    """Where the line of an attempt lies."""
    return f"attempts/{number:04d}.json"


def parse_record(data: bytes) -> AttemptRecord:
    """An attempt's line in the ledger.

    Raises:
        ValueError: It is none, or it was altered.
    """
    return TypeAdapter(AttemptRecord).validate_python(unsealed(data))


def read_run_log(store: ObjectStore, epoch: int) -> list[AttemptRecord]:
    """What is known of the attempts before `epoch`; one that is still noted as running was killed.

    Raises:
        DataError: A line is none.
    """
    records = []
    for number in range(1, epoch):
        key = record_key(number)
        if (stored := store.read(key)) is None:
            continue
        try:
            record = parse_record(stored.data)
        except ValueError as error:
            what = f"{str(error).splitlines()[0]}; remove it to go on without it"
            raise DataError([Problem(f"{store.uri}/{key}", what)]) from None
        records.append(replace(record, outcome="killed") if record.outcome == "running" else record)
    return records



SETTINGS = "settings.json"


def keep_settings(store: ObjectStore, settings: Mapping[str, Any]) -> None:
    """Writes the settings that the run begins with: what they name is there by now, so they are not a typing error."""
    if store.read(SETTINGS) is None:
        with contextlib.suppress(Conflict):
            store.write(SETTINGS, json.dumps(settings, indent=2).encode(), if_absent=True)
    compare_settings(store, settings)


def compare_settings(store: ObjectStore, settings: Mapping[str, Any]) -> None:
    """A run is one experiment: refuses an attempt whose settings would give another result."""
    kept = store.read(SETTINGS)
    if kept is None:
        return
    before = json.loads(kept.data)
    after = json.loads(json.dumps(settings))
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise SettingsError([Problem(name, _changed(before.get(name), after.get(name))) for name in changed])


def _changed(before: Any, after: Any) -> str:
    return f"this run began with {before!r}, not {after!r}; use another run.id"
