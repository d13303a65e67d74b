"""The run log: a sealed record of each attempt, noted while it goes on, and the settings that the run began with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter

from job.common.hashing import unsealed
from job.errors import DataError, Problem, SettingsError
from job.records import AttemptRecord
from job.runs.layout import SETTINGS, attempt_key
from job.storage.open import Conflict, ObjectStore


def parse_record(data: bytes) -> AttemptRecord:
    """An attempt's record.

    Raises:
        ValueError: It is none, or it was altered.
    """
    return TypeAdapter(AttemptRecord).validate_python(unsealed(data))


def read_run_log(store: ObjectStore, epoch: int) -> list[AttemptRecord]:
    """What is known of the attempts before `epoch`; one that is still noted as running was killed.

    Raises:
        DataError: A record is damaged.
    """
    records = []
    for number in range(1, epoch):
        key = attempt_key(number)
        if (stored := store.read(key)) is None:
            continue
        try:
            record = parse_record(stored.data)
        except ValueError as error:
            what = f"{str(error).splitlines()[0]}; remove it to go on without it"
            raise DataError([Problem(f"{store.uri}/{key}", what)]) from None
        records.append(replace(record, outcome="killed") if record.outcome == "running" else record)
    return records


def keep_settings(store: ObjectStore, settings: Mapping[str, Any]) -> None:
    """Writes the settings that the run begins with: what they name is there by now, so they are not a typing error.

    Raises:
        SettingsError: Another attempt began the run meanwhile, with other settings.
    """
    if store.read(SETTINGS) is None:
        with contextlib.suppress(Conflict):
            store.write(SETTINGS, json.dumps(settings, indent=2).encode(), if_absent=True)
    compare_settings(store, settings)


def compare_settings(store: ObjectStore, settings: Mapping[str, Any]) -> None:
    """A run is one experiment: refuses an attempt whose settings would give another result.

    Raises:
        SettingsError: With every setting that is another than in the first attempt.
    """
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
