"""The settings that a run began with, kept in its store: a run is one experiment."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from job.errors import Problem, SettingsError
from job.storage.open import Conflict, ObjectStore

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
