"""The check of JOB_EXPORT__RUN: whether the finished run can be read, and whether this one may take it over.

The functions that read it are those of a run, in `stages.exported_run`. `stages` must not be imported here, so the
command line hands them over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from job.errors import JobError, named_by
from job.planning.preflight import Found, NotChecked
from job.results.adapter_facts import WEIGHTS
from job.results.reader import open_run, read_published
from job.settings.load import Settings
from job.storage.open import StorageOptions

SETTING = "JOB_EXPORT__RUN"
SettingsOfRun = Callable[[Settings, StorageOptions], Mapping[str, object]]
"""`stages.exported_run.settings_of_run`."""
TakeOver = Callable[[Settings, StorageOptions], Any]
"""`stages.exported_run.take_over`."""


@dataclass(frozen=True)
class ExportedRun:
    """What the plan needs of the finished run, besides its settings.

    Attributes:
        take_over: As in a run; None where the caller has none, then the run is not checked.
        unread: Why its settings could not be read. Those of the plan are then only those that were given.
    """

    take_over: TakeOver | None = None
    unread: JobError | None = None


NOT_COMPARED = ExportedRun()
"""Of a caller that has no `take_over`."""


def check_exported_run(settings: Settings, storage: StorageOptions, exported: ExportedRun) -> Found[None]:
    """Whether the run takes the finished one over, as it will find when it begins.

    Raises:
        SettingsError: There is no finished run, it is this run, or settings differ from those of that run.
        DataError: Its files are not what its manifest says.
    """
    where = str(settings.export.run)
    if exported.unread is not None:
        raise exported.unread
    with named_by(SETTING, ": "):
        run = read_published(open_run(where, storage))
    if exported.take_over is None:
        raise NotChecked(f"{where}: its settings are not compared with those of this run")
    begun = exported.take_over(settings, storage) is None
    paths = {one["path"]: one["sha256"] for one in run.results["artifacts"]}
    weights = next((sha256 for path, sha256 in paths.items() if path.endswith(f"/adapter/{WEIGHTS}")), None)
    adapter = "without an adapter" if weights is None else f"with the adapter {weights[:12]}"
    later = "; this run has begun already, and compares its settings when it goes on" if begun else ""
    return "ok", f"run {run.id} {adapter}{later}", None
