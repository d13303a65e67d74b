"""The models of a run besides its base: the adapter that training starts from, the safety classifier, the judge.

Each is fetched in the version that the first attempt recorded, and checked as far as that is possible without weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from job.common.threads import in_thread
from job.errors import DataError, Problem, naming
from job.model.start_adapter import FoundStart, check_start, find_start
from job.records import Evaluated, Pulled
from job.runs.attempt import Attempt
from job.runs.layout import Stage
from job.settings.field_types import is_server
from job.settings.schema import Data, Eval, Lora
from job.stages.fetch_input import fetch_input
from job.stages.principles import FoundJudge, check_judge, find_judge, judge_sha256
from job.stages.pull_in_background import wait_for
from job.stages.safety import SafetyModel, find_safety_model
from job.storage.open import StorageOptions, is_remote


def pull_start_adapter(
    attempt: Attempt,
    location: str | None,
    lora: Lora,
    storage: StorageOptions,
    added_tokens: Sequence[str] | None = None,
) -> FoundStart | None:
    """The adapter that training starts from; None without one.

    Args:
        attempt: The adapter, at the commit that the first attempt recorded, is copied into its work folder.
        location: Path, URI or hub id of the adapter, from `start_of`; None without one.
        lora: Settings that the adapter has to agree with.
        storage: How to reach stores.
        added_tokens: JOB_MODEL__ADD_TOKENS.

    Raises:
        DataError, SettingsError: It is not there, or is not an adapter of this kind.
        Unreachable, AccessDenied: The hub or the store cannot be used.
        Preempted: The job was asked to stop.
    """
    if location is None:
        return None
    attempt.check_stop()
    earlier = attempt.recorded(Stage.PULL, Pulled)
    recorded_revision = None if earlier is None else earlier.start_revision
    if is_remote(location):
        copy = fetch_input(attempt, f"{location.rstrip('/')}/", "start", storage)
        with naming(location, copy):
            start = find_start(copy, attempt.work, storage)
    else:
        start = find_start(location, attempt.work / "start", storage, recorded_revision)
    lora_settings = lora.model_dump(mode="json")
    check_start(start.folder, rank=lora.rank, alpha=lora.alpha, options=lora_settings, added_tokens=added_tokens)
    return start


def pull_safety_model(attempt: Attempt, data: Data, storage: StorageOptions) -> SafetyModel | None:
    """The classifier of JOB_DATA__SAFETY_MODEL; None without one.

    Raises:
        DataError, SettingsError: It is not there, is no classifier whose labels say what is unsafe, or has changed
            since the first attempt.
        Unreachable, AccessDenied: The hub or the store cannot be used.
        Preempted: The job was asked to stop.
    """
    location = data.safety_model
    if location is None:
        return None
    source = fetch_input(attempt, location, "safety", storage)
    earlier = attempt.recorded(Stage.PULL, Pulled)
    audit = None if earlier is None else earlier.dataset.audit
    if audit is not None and audit.safety is not None:
        # the commit of the first attempt: the branch or tag may have moved since
        data = data.model_copy(update={"safety_revision": audit.safety.revision or data.safety_revision})
    safety: SafetyModel = wait_for(
        attempt, in_thread(lambda: find_safety_model(data, source, location), "safety model")
    )
    if earlier is not None and earlier.safety_sha256 != safety.record.sha256:  # before it scores anything
        what = (
            "its content has changed since the first attempt of this run; restore it, or start a new run "
            "with another JOB_RUN__ID"
        )
        raise DataError([Problem("JOB_DATA__SAFETY_MODEL", what)])
    return safety


def pull_judge(attempt: Attempt, options: Eval, storage: StorageOptions) -> FoundJudge | None:
    """The judge of JOB_EVAL__PRINCIPLES; None without one, and in all processes but 0, which alone asks it.

    Raises:
        DataError, SettingsError: It or the rules cannot be used.
        Unreachable, AccessDenied: The hub, the store or the server cannot be used.
        Preempted: The job was asked to stop.
    """
    location = options.judge
    if location is None or options.principles is None or not attempt.processes.leads:
        return None
    earlier = attempt.recorded(Stage.PULL, Pulled)
    revision = (None if earlier is None else earlier.judge_revision) or options.judge_revision
    source = location if is_server(location) else fetch_input(attempt, location, "judge", storage)
    judge: FoundJudge = wait_for(attempt, in_thread(lambda: find_judge(options, source, revision), "judge"))
    if attempt.recorded(Stage.EVALUATE_ADAPTER, Evaluated) is None:
        check_judge(options, judge, attempt.check_stop)
    return judge


def recorded_judge_sha256(attempt: Attempt, judge: FoundJudge | None) -> str | None:
    """The judge's hash for the record; None without a judge, or if the version that began the run did not record it."""
    earlier = attempt.recorded(Stage.PULL, Pulled)
    if judge is None or (earlier is not None and earlier.judge_sha256 is None):
        return None
    return judge_sha256(judge.record)
