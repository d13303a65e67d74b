"""The settings of a run: stored by its first attempt, and the same in all attempts and processes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from job import log
from job.common.hashing import sealed, unsealed
from job.common.validation import adapter_of, first_error
from job.distributed.processes import Processes
from job.errors import Problem, SettingsError, environment_name
from job.records import Pulled
from job.runs import stage_records
from job.runs.layout import SETTINGS, Stage, stage_key
from job.storage.base import Stored, read_record
from job.storage.open import Conflict, ObjectStore


def agree_on_settings(processes: Processes, settings: Mapping[str, Any]) -> None:
    """Refuses a process whose settings differ from those of process 0: machines are started one by one.

    Raises:
        SettingsError: With every setting that is different here.
    """
    first, own_values = (
        json.loads(json.dumps(given)) for given in (processes.broadcast("settings", lambda: settings), settings)
    )
    if different := [name for name in own_values if own_values[name] != first.get(name)]:
        rank = processes.place.rank
        what = "is {!r} in process {} and {!r} in process 0; set the same value on all machines"
        raise SettingsError(
            [
                Problem(environment_name(name), what.format(own_values[name], rank, first.get(name)))
                for name in different
            ]
        )


def write_settings(store: ObjectStore, settings: Mapping[str, Any]) -> None:
    """Stores the settings that the run begins with, once the model and data that they name were found.

    Args:
        store: The run's store.
        settings: What `compare_settings` returned when the attempt began.

    Raises:
        SettingsError: Another attempt began the run meanwhile, with other settings.
    """
    stored = read_record(store, SETTINGS)
    if _settings_in(store, stored) is None:
        with contextlib.suppress(Conflict):
            store.write(SETTINGS, sealed(settings), if_absent=stored is None, if_tag=stored.tag if stored else None)
    compare_settings(store, settings)


def compare_settings(
    store: ObjectStore, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A run is one experiment: refuses an attempt whose settings would give another result.

    A run that an earlier version began does not know the settings that have been added since. It worked as their
    defaults say, so with the defaults it continues, under the name (`stage_records.fingerprint`) that it always had.
    Where `settings.json` is gone or damaged, the record of the pull says whether the settings are the run's.

    Args:
        store: The run's store.
        settings: Value by dotted name of the settings that decide the result.
        defaults: Their defaults.

    Returns:
        The settings without those that the run does not know: what names the run.

    Raises:
        SettingsError: With every setting that is another than in the first attempt.
    """
    before = _settings_in(store, read_record(store, SETTINGS))
    after: dict[str, Any] = json.loads(json.dumps(settings))
    if before is None:
        _compare_with_pull(store, after)
        return after
    added = {name: value for name, value in json.loads(json.dumps(defaults or {})).items() if name not in before}
    expected = before | {name: added.get(name) for name in after if name not in before}
    changed = sorted(name for name in expected if expected[name] != after.get(name))
    if changed:
        problems = [_changed(name, expected[name], after.get(name)) for name in changed]
        advice = "use the values with which the run began, or another JOB_RUN__ID for a new run"
        if all(name.startswith("export.") for name in changed):
            advice += "; `qlora-job export RUN FORMATS` exports a finished run without training again"
        raise SettingsError(problems, advice=advice)
    return {name: value for name, value in after.items() if name in before}


def parse_settings(data: bytes) -> dict[str, Any]:
    """What `settings.json` says; those of earlier versions carry no seal.

    Raises:
        ValueError: It was cut or altered.
    """
    facts = from_json(data)
    if not isinstance(facts, dict):
        raise ValueError("holds no settings")  # noqa: TRY004 - it is what a file holds, not what a caller gave
    # One damaged byte cannot turn the field's name into that of a setting, which has a dot in it.
    return facts if all("." in name for name in facts) else unsealed(data)


def _settings_in(store: ObjectStore, stored: Stored | None) -> dict[str, Any] | None:
    """The settings that the run began with; None if they are missing or damaged."""
    if stored is None:
        return None
    try:
        return parse_settings(stored.data)
    except ValueError as error:
        what = (
            "the run's settings are damaged; they are written again if the record of the pull stage was "
            "made with the same ones"
        )
        log.get_logger().warning(what, file=f"{store.uri}/{SETTINGS}", why=first_error(error))
        return None


def _compare_with_pull(store: ObjectStore, settings: Mapping[str, Any]) -> None:
    stored = read_record(store, stage_key(Stage.PULL))
    if stored is None:
        return
    try:
        pulled, run = stage_records.parse(stage_key(Stage.PULL), stored.data, adapter_of(Pulled))
    except ValueError:
        return  # it is done again, and so is every stage whose record names another run
    if run is not None and run != stage_records.fingerprint(settings, pulled):
        what = "is missing or damaged, and the run's stages were done with other settings, or by a version of "
        what += "the job that had others; use the settings and the version with which it began, or another JOB_RUN__ID"
        raise SettingsError([Problem(f"{store.uri}/{SETTINGS}", what)])


def _changed(name: str, before: Any, after: Any) -> Problem:
    what = f"this run began with {before!r}, not {after!r}"
    return Problem(environment_name(name), what)
