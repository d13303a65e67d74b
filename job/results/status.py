"""Decides the state of a run for `qlora-job status`, from the records that `run_records.py` reads from its store.

The last step is that of finished training, else of the newest attempt. If that attempt has recorded none, as those of
earlier versions, it is that of the last checkpoint; `step_from` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from job.common.process_identity import has_ended
from job.errors import Problem, SettingsError, exit_codes
from job.results.outcome import OutcomeValues, outcome_values, read_outcome
from job.results.run_records import (
    Place,
    RunRecords,
    gate_passed,
    last_note,
    parse_time,
    place_without_run,
    read_run_records,
    runs_beside,
)
from job.results.summary import outcome_lines
from job.runs.killed_for_memory import why_killed
from job.runs.layout import FIRST_STAGE, RESULTS, Stage, run_folder
from job.runs.run_log import LoggedAttempt
from job.storage.open import ObjectStore, StorageOptions, is_remote, open_store

State = Literal["running", "preempted", "killed", "stalled", "finished", "failed", "not-started", "damaged"]

STALLED_SECONDS = 600.0
"""Seconds without a record after which a running attempt is `stalled`, if its record lacks the watchdog's limit."""
_WATCHDOG_SHARE = 1.2
"""An attempt is `stalled` after this multiple of its watchdog's limit. The watchdog ends it at up to 1.1 times the
limit, and the end is recorded within seconds."""


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended. `qlora-job status --format json` has these fields.

    Attributes:
        attempt: Number of the attempt.
        outcome: `preempted`, `stalled`, `failed`, `crashed` (a bug), `complete`, or `killed`: no end was recorded. An
            attempt that was stopped, and ended with code 71 because too many in a row were, has `failed`.
        exit_code: Null if the attempt was killed, completed the run, or is of a version that did not record the code.
        meaning: Meaning of the exit code.
        why: The error's text, without secrets; for a killed attempt the evidence of full main memory; else null.
        finished: Time of the end, RFC 3339 in UTC; null if the attempt was killed.
    """

    attempt: int
    outcome: str
    exit_code: int | None
    meaning: str | None
    why: str | None
    finished: str | None


@dataclass(frozen=True)
class Resume:
    """Where the next attempt of a run would go on. `qlora-job status --format json` has these fields.

    Attributes:
        after_stage: The last finished stage, which is not repeated; null if none is finished.
        step: The checkpoint from which training would go on, if its files are whole; null if training is finished, or
            begins at its first step.
        repeated_steps: Steps after that checkpoint that the newest attempt had done by its last record, so a lower
            bound; null: not known.
    """

    after_stage: str | None
    step: int | None
    repeated_steps: int | None


@dataclass(frozen=True)
class RunStatus:
    """The state of a run. `qlora-job status --format json` has these fields; null: not known, or not applicable.

    Attributes:
        run: Path or URI of the run's folder.
        state: `running`; `preempted`: waiting for the platform to start the next attempt; `killed`: the attempt's
            process is gone and has recorded no end, which is only seen on the machine on which it ran; `stalled`: the
            attempt has written no record for too long, so it was killed without notice, or hangs; `finished`;
            `failed`: the last attempt ended with an error; `not-started`; `damaged`: results.json, or a file that it
            lists, is missing or damaged.
        first_stage: Whether the other fields are about the first of two stages (`JOB_TRAIN__METHOD=sft,dpo`).
        attempt: Number of the newest attempt.
        stage: The current stage, or the stage in which the newest attempt ended.
        stages_done: The stages with a record, in their order; later attempts do not repeat them.
        exported_run: Id of the finished run that this one exports (JOB_EXPORT__RUN), whose stages and first attempts it
            copied; null if it exports none.
        step: The last optimizer step.
        step_from: Source of `step` and of the step's figures: `attempt`: the record of the newest attempt;
            `checkpoint`: the newest checkpoint; `training`: the record of finished training.
        total_steps: Number of planned steps; early stopping may end training earlier.
        loss: Loss of the last step; once training is done, the mean loss of training.
        tokens_per_second: Target tokens per second in the last step; once training is done, over all steps.
        remaining_seconds: Estimate for the remaining steps, as of `last_sign_of_life`; without later stages.
        questions: Items scored so far outside of training: questions, rows of the safety screen, judged prompts.
        last_sign_of_life: Time of the newest attempt's last record, RFC 3339 in UTC.
        silent_seconds: Seconds since `last_sign_of_life`, by this machine's clock.
        stalled_after: Value of `silent_seconds` above which a `running` attempt is called `stalled`; else null.
        last_end: The end of the newest attempt that has ended.
        likely: For a `stalled` run, evidence that full main memory is the cause; null if there is none.
        checkpoints: Steps of the checkpoints with a valid commit marker, newest first. Their files are not read.
        gate: For a finished run, whether its quality gate is met; null without a gate.
        outcome: For a finished run, its outcome in words, as `run` prints it at its end: training, accuracies with
            their paired differences, exports, cost, the report and the verdict.
        result: For a finished run, the same as values, and where adapter, exports and report are.
        resume: For a run that is not finished, where its next attempt would go on.
        place: For a `not-started` run, what is at its place: `missing`: no such folder, or no object below the URI;
            `empty`: an empty folder; `other-files`: files, but no record of a run.
        runs_beside: For a `not-started` run in a local folder, up to five runs beside it, the newest first: the name
            may be mistyped.
        problems: Damaged records; if there are any, the exit code is 4.
    """

    run: str
    state: State
    first_stage: bool = False
    attempt: int | None = None
    stage: str | None = None
    stages_done: tuple[str, ...] = ()
    exported_run: str | None = None
    step: int | None = None
    step_from: Literal["attempt", "checkpoint", "training"] | None = None
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    remaining_seconds: float | None = None
    questions: int | None = None
    last_sign_of_life: str | None = None
    silent_seconds: float | None = None
    stalled_after: float | None = None
    last_end: AttemptEnd | None = None
    likely: str | None = None
    checkpoints: tuple[int, ...] = ()
    gate: bool | None = None
    outcome: tuple[str, ...] = ()
    result: OutcomeValues | None = None
    resume: Resume | None = None
    place: Place | None = None
    runs_beside: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = field(default_factory=tuple)


def read_status(
    where: str, storage: StorageOptions, *, now: datetime | None = None, stalled_after: float | None = None
) -> RunStatus:
    """Reads the status of a run; writes nothing.

    Args:
        where: Path or URI of the run's folder, or of the `results.json` in it.
        storage: How to reach the store.
        now: Current time; None for this machine's clock.
        stalled_after: Seconds without a record after which a running attempt is `stalled`. None: the time after which
            its own watchdog would have ended it (JOB_TRAIN__STALL_SECONDS), since long evaluations write no records.

    Raises:
        SettingsError: The folder contains runs, but is not a run; or `where` is a file, or not a path or URI.
        AccessDenied: The store denies access.
        Unreachable: The store cannot be reached.
    """
    now = now or datetime.now(UTC)
    folder = run_folder(where)
    if not is_remote(where) and Path(folder).is_file():
        raise SettingsError([Problem(where, f"is a file; give the folder of a run, or the {RESULTS} in it")])
    store = open_store(folder, storage)
    status = _status_of(*_records_and_life(store), now, stalled_after)
    if status.state != "not-started":
        return status
    first_store = open_store(f"{store.uri}/{FIRST_STAGE}".rstrip("/"), storage)
    first = _status_of(*_records_and_life(first_store), now, stalled_after)
    if first.state == "finished":  # and the second has not begun
        silent_seconds = first.silent_seconds or 0.0
        is_stalled = silent_seconds > (STALLED_SECONDS if stalled_after is None else stalled_after)
        return replace(first, run=store.uri, first_stage=True, state="stalled" if is_stalled else "running")
    if first.state != "not-started":
        return replace(first, run=store.uri, first_stage=True)
    return replace(status, place=place_without_run(store), runs_beside=runs_beside(store.uri))


def _records_and_life(store: ObjectStore) -> tuple[RunRecords, bool]:
    """The records of a run, and whether the process of its newest attempt is gone though it recorded no end."""
    records = read_run_records(store)
    if _process_is_gone(records):
        records = read_run_records(store)  # it may have recorded its end in between; now it writes no more
        return records, _process_is_gone(records)
    return records, False


def _process_is_gone(records: RunRecords) -> bool:
    newest = records.attempts.get(records.newest)
    if newest is None or newest.record.outcome != "running" or newest.noted is None or newest.noted.process is None:
        return False
    return has_ended(newest.noted.process)


def _status_of(records: RunRecords, gone: bool, now: datetime, stalled_after: float | None) -> RunStatus:  # noqa: FBT001
    """The status that the records of a run tell.

    Args:
        records: The run's records.
        gone: Whether the process of the newest attempt is gone though it recorded no end.
        now: As for `read_status`.
        stalled_after: As for `read_status`.
    """
    if records.empty:
        return RunStatus(records.uri, "not-started")
    newest, manifest, problems = records.newest, records.manifest, records.problems
    current = records.attempts.get(newest)
    note = None if current is None else last_note(current)
    holder = records.lease
    last_sign = note.at if note else holder.started if holder and holder.epoch == newest else None
    silent = None if last_sign is None else max(0.0, (now - parse_time(last_sign)).total_seconds())
    if stalled_after is None:
        watchdog_seconds = None if note is None else note.stall_seconds
        stalled_after = STALLED_SECONDS if watchdog_seconds is None else _WATCHDOG_SHARE * watchdog_seconds
    state = _state(records, silent, stalled_after)
    if gone and state in {"running", "stalled"}:
        state = "killed"
    if state == "finished" and problems:
        state = "damaged"
    elif state == "damaged" and not problems:
        what = "is missing, although an attempt has completed the run; start the run again, which writes it"
        problems = (Problem(f"{records.uri}/{RESULTS}", what),)
    # In a run that exports a finished one, what is counted before the exports are the files that are copied.
    scores = note is not None and (records.exported_run is None or note.stage not in {None, Stage.PULL})
    outcome, values = _outcome(records)
    status = RunStatus(
        run=records.uri,
        state=state,
        attempt=newest or None,
        stage=None if note is None or state == "finished" else note.stage,
        stages_done=records.stages_done,
        exported_run=records.exported_run,
        questions=current.questions or None if current and scores and state == "running" else None,
        last_sign_of_life=last_sign,
        silent_seconds=silent,
        stalled_after=stalled_after if state == "running" else None,
        last_end=_last_end(records, gone=gone),
        likely=None if current is None or state != "stalled" else why_killed(current),
        checkpoints=records.checkpoints,
        gate=None if manifest is None else gate_passed(manifest),
        outcome=outcome,
        result=values,
        problems=problems,
    )
    status = _with_step(status, records)
    return status if state in {"finished", "damaged"} else replace(status, resume=_resume(status))


def _state(records: RunRecords, silent: float | None, stalled_after: float) -> State:
    """The state of the run.

    Args:
        records: The run's records.
        silent: Seconds since the newest attempt's last record; None if there is none.
        stalled_after: Seconds without a record after which the attempt is `stalled`.
    """
    if records.manifest is not None:
        return "finished"
    current = records.attempts.get(records.newest)  # None if it has written none yet, or a damaged one
    outcome = "running" if current is None else current.record.outcome
    if outcome == "complete" or not records.newest:
        return "damaged"
    if outcome in {"running", "killed"}:
        return "running" if outcome == "running" and silent is not None and silent <= stalled_after else "stalled"
    return "preempted" if outcome == "preempted" and _exit_code(current) in {None, 75} else "failed"


def _with_step(status: RunStatus, records: RunRecords) -> RunStatus:
    """Adds the last step: from finished training, else from the newest attempt, else from the newest checkpoint."""
    if (trained := records.training) is not None:
        steps = trained.get("steps")
        figures: dict[str, Any] = {name: trained.get(name) for name in ("loss", "tokens_per_second")}
        return replace(status, step_from="training", step=steps, total_steps=steps, **figures)
    progress = {
        number: logged.noted.training
        for number, logged in records.attempts.items()
        if logged.noted is not None and logged.noted.training is not None
    }
    if records.newest in progress:
        return replace(status, step_from="attempt", **asdict(progress[records.newest]))
    total = next((training.total_steps for training in progress.values()), None)
    if status.checkpoints:
        return replace(status, step_from="checkpoint", step=status.checkpoints[0], total_steps=total)
    return replace(status, total_steps=total)


def _resume(status: RunStatus) -> Resume:
    after = status.stages_done[-1] if status.stages_done else None
    if Stage.TRAIN in status.stages_done:
        return Resume(after, None, 0)
    saved = status.checkpoints[0] if status.checkpoints else 0
    recorded_step = status.step if status.step_from == "attempt" and status.step is not None else None
    return Resume(after, saved or None, None if recorded_step is None else max(0, recorded_step - saved))


def _exit_code(logged: LoggedAttempt | None) -> int | None:
    return None if logged is None or logged.noted is None else logged.noted.exit_code


def _last_end(records: RunRecords, *, gone: bool) -> AttemptEnd | None:
    """The end of the newest attempt that has ended; every attempt before the newest has, and it if it is `gone`."""
    for number, logged in records.attempts.items():
        outcome = logged.record.outcome
        if outcome == "running" and number == records.newest and not gone:
            continue
        code = _exit_code(logged)
        meaning = exit_codes().get(code, (None, None))[0] if code is not None else None
        why = None if logged.noted is None else logged.noted.why
        if outcome in {"running", "killed"}:
            outcome, why = "killed", _why_killed(records.attempts, number)
        elif outcome == "preempted" and code not in {None, 75}:
            outcome = "failed"  # as in the state of the run
        return AttemptEnd(number, outcome, code, meaning, why, logged.record.finished)
    return None


def _why_killed(attempts: Mapping[int, LoggedAttempt], number: int) -> str | None:
    """Evidence of full main memory: from the next attempt, which compared the kernel's counts, else from the record."""
    next_attempt = attempts.get(number + 1)
    reason = None if next_attempt is None or next_attempt.noted is None else next_attempt.noted.before
    return reason or why_killed(attempts[number])


def _outcome(records: RunRecords) -> tuple[tuple[str, ...], OutcomeValues | None]:
    """The outcome in words and as values; nothing where the manifest lacks what they need, as of another version."""
    lines: tuple[str, ...] = ()
    values = None
    if records.manifest is not None:
        with suppress(AttributeError, KeyError, TypeError, ValueError):
            outcome = read_outcome(records.manifest, records.uri)
            values = outcome_values(outcome)
            lines = tuple(outcome_lines(outcome))
    return lines, values


def as_json(status: RunStatus) -> dict[str, Any]:
    """The status as JSON, with the fields of `RunStatus`."""
    return asdict(status) | {"problems": [str(problem) for problem in status.problems]}
