"""The settings of a run: kept by its first attempt, the same in all attempts and in all processes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from job.distributed.processes import Processes
from job.errors import Problem, SettingsError
from job.runs.layout import SETTINGS
from job.storage.open import Conflict, ObjectStore


def agree_on_settings(processes: Processes, mine: Mapping[str, Any]) -> None:
    """Refuses a process whose settings differ from those of process 0: machines are started one by one.

    Raises:
        SettingsError: With every setting that is different here.
    """
    first, own = (json.loads(json.dumps(given)) for given in (processes.share("settings", lambda: mine), mine))
    if different := [name for name in own if own[name] != first.get(name)]:
        rank = processes.place.rank
        what = "is {!r} in process {} and {!r} in process 0; give all machines the same"
        raise SettingsError([Problem(name, what.format(own[name], rank, first.get(name))) for name in different])


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
