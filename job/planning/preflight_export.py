"""The check of JOB_EXPORT__RUN: whether the finished run can be read, and whether this run may take over its stages."""

from __future__ import annotations

from job.errors import JobError
from job.planning.preflight import Found
from job.results.adapter_facts import WEIGHTS
from job.results.exported_run import read_exported, take_over
from job.settings.affects_result import decisive_settings, default_settings
from job.settings.load import Settings, plain_values
from job.settings.training_stages import folder_of
from job.storage.open import StorageOptions


def check_exported_run(settings: Settings, storage: StorageOptions, unread: JobError | None) -> Found[None]:
    """Whether this run can take over the finished one's stages, by the checks that it makes when it begins.

    Args:
        settings: The run's settings; if `unread` is None, including those that it has from the finished run.
        storage: How to reach the stores.
        unread: Why the finished run's settings could not be read, to be raised again; None if they were read.

    Raises:
        SettingsError: There is no finished run, or settings differ from those of that run.
        DataError: Its files are not what its manifest says.
    """
    if unread is not None:
        raise unread
    run, decisive = read_exported(str(settings.export.run), storage), decisive_settings(plain_values(settings))
    begun = take_over(run, folder_of(settings), decisive, default_settings(), storage) is None
    hashes = {artifact["path"]: artifact["sha256"] for artifact in run.results["artifacts"]}
    weights = next((sha256 for path, sha256 in hashes.items() if path.endswith(f"/adapter/{WEIGHTS}")), None)
    adapter = "without an adapter" if weights is None else f"whose {WEIGHTS} has the SHA-256 {weights[:12]}..."
    later = "; the export has begun already, and compares its settings when it goes on" if begun else ""
    return "ok", f"run {run.id}, {adapter}{later}", None
