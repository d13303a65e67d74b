"""The state of a run for `qlora-job status`, from the records in its store only.

While it makes progress, an attempt writes its record (`attempts/NNNN.json`) at most every 5 seconds, with its stage and
the figures of the last optimizer step (`runs.run_log.Noted`). Runs on S3 and local runs are therefore read alike.
Records of earlier versions lack these figures; the step is then that of the last checkpoint, as `step_from` records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from job.checkpoints import manager
from job.checkpoints.commit_marker import parse_marker
from job.common.formatting import count, timestamp
from job.common.hashing import unsealed
from job.common.validation import first_error
from job.errors import Problem, SettingsError, exit_codes
from job.records import Artifact, TrainingProgress
from job.results.summary import Outcome, outcome, summary
from job.runs import lease
from job.runs.attempt import missing
from job.runs.killed_for_memory import why_killed
from job.runs.layout import (
    ARTIFACTS,
    FIRST_STAGE,
    LEASE,
    RESULTS,
    STAGES,
    Stage,
    attempt_key,
    attempt_number,
    marker_key,
    run_folder,
    stage_key,
)
from job.runs.run_log import LoggedAttempt, Noted, parse_logged
from job.storage.base import read_record
from job.storage.open import ObjectStore, StorageOptions, is_remote, open_store

T = TypeVar("T")
State = Literal["running", "preempted", "stalled", "finished", "failed", "not-started", "damaged"]

STALLED_SECONDS = 600.0
"""Seconds without a record after which a running attempt is `stalled`, if its record lacks the watchdog's limit."""
_WATCHDOG_SHARE = 1.2
"""An attempt is `stalled` after this multiple of its watchdog's limit. The watchdog ends it at up to 1.1 times the
limit, and the end is recorded within seconds."""
_READ_BACK = 20
"""Maximum number of attempts whose records are read, newest first, for the last end and the last step."""
_LOOKED_AT = 10_000
"""Maximum number of objects that are listed to find runs below a folder that is not a run."""


_BESIDE = 5
"""Maximum number of runs that are named beside a folder that is not a run."""


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended. `qlora-job status --format json` has these fields.

    Attributes:
        attempt: Number of the attempt.
        outcome: `preempted`, `stalled`, `failed`, `crashed` (a bug), `complete`, or `killed`: no end was recorded.
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
        state: `running`; `preempted`: waiting for the platform to start the next attempt; `stalled`: the attempt has
            written no record for too long, so it was killed without notice, or hangs; `finished`; `failed`: the last
            attempt ended with an error; `not-started`; `damaged`: results.json, or a file that it lists, is missing
            or damaged.
        first_stage: Whether the other fields are about the first of two stages (`JOB_TRAIN__METHOD=sft,dpo`).
        attempt: Number of the newest attempt.
        stage: The current stage, or the stage in which the newest attempt ended.
        stages_done: The stages with a record, in their order; later attempts do not repeat them.
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
        last_end: The end of the newest attempt that has ended.
        likely: For a `stalled` run, evidence that full main memory is the cause; null if there is none.
        checkpoints: Steps of the checkpoints with a valid commit marker, newest first. Their files are not read.
        gate: For a finished run, whether its quality gate is met; null without a gate.
        outcome: For a finished run, its outcome in words, as `run` prints it at its end: training, accuracies with
            their paired differences, exports, cost, the report and the verdict.
        result: For a finished run, the same as values, and where adapter, exports and report are.
        resume: For a run that is not finished, where its next attempt would go on.
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
    step: int | None = None
    step_from: Literal["attempt", "checkpoint", "training"] | None = None
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    remaining_seconds: float | None = None
    questions: int | None = None
    last_sign_of_life: str | None = None
    silent_seconds: float | None = None
    last_end: AttemptEnd | None = None
    likely: str | None = None
    checkpoints: tuple[int, ...] = ()
    gate: bool | None = None
    outcome: tuple[str, ...] = ()
    result: Outcome | None = None
    resume: Resume | None = None
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
    status = _read(store, now, stalled_after)
    if status.state != "not-started":
        return status
    first = _read(open_store(f"{store.uri}/{FIRST_STAGE}".rstrip("/"), storage), now, stalled_after)
    if first.state == "finished":  # and the second has not begun
        silent_seconds = first.silent_seconds or 0.0
        is_stalled = silent_seconds > (STALLED_SECONDS if stalled_after is None else stalled_after)
        return replace(first, run=store.uri, first_stage=True, state="stalled" if is_stalled else "running")
    if first.state != "not-started":
        return replace(first, run=store.uri, first_stage=True)
    _refuse_folder_of_runs(store)
    return replace(status, runs_beside=_runs_beside(store.uri))


def _read(store: ObjectStore, now: datetime, stalled_after: float | None) -> RunStatus:
    problems: list[Problem] = []
    holder = _parsed(store, LEASE, _parse_lease, problems)
    numbers = lease.attempt_numbers(store)
    newest = max([*numbers, holder.epoch if holder else 0])
    results = _results(store, problems)
    if not newest and results is None and not problems:
        return RunStatus(store.uri, "not-started")
    logged = _logged(store, [number for number in reversed(numbers) if number <= newest][:_READ_BACK], problems)
    current = logged.get(newest)
    noted = None if current is None else _noted(current)
    sign = noted.at if noted else holder.started if holder and holder.epoch == newest else None
    silent = None if sign is None else max(0.0, (now - _time(sign)).total_seconds())
    checkpoints = _checkpoints(store, problems)
    stages_done = _stages_done(store)
    if stalled_after is None:
        watched = None if noted is None else noted.stall_seconds
        stalled_after = STALLED_SECONDS if watched is None else _WATCHDOG_SHARE * watched
    state, last_end = _state(newest, current, silent, results, stalled_after), _last_end(logged, newest)
    if state == "finished" and problems:
        state = "damaged"
    elif state == "damaged" and not problems:
        what = "is missing, although an attempt has completed the run; start the run again, which writes it"
        problems.append(Problem(f"{store.uri}/{RESULTS}", what))
    status = RunStatus(
        run=store.uri,
        state=state,
        attempt=newest or None,
        stage=None if noted is None or state == "finished" else noted.stage,
        stages_done=stages_done,
        questions=current.questions or None if current and noted and state == "running" else None,
        last_sign_of_life=sign,
        silent_seconds=silent,
        last_end=last_end,
        likely=None if current is None or state != "stalled" else why_killed(current),
        checkpoints=checkpoints,
        gate=_gate(results),
        outcome=() if results is None else tuple(_formed(summary, results, f"{store.uri}/{RESULTS}") or ()),
        result=None if results is None else _formed(outcome, results, store.uri),
        problems=tuple(problems),
    )
    status = _with_step(status, store, logged, results)
    return status if state in {"finished", "damaged"} else replace(status, resume=_resume(status))


def _state(
    newest: int,
    current: LoggedAttempt | None,
    silent: float | None,
    results: Mapping[str, Any] | None,
    stalled_after: float,
) -> State:
    """The state of the run.

    Args:
        newest: Number of the newest attempt; 0 if there is none.
        current: That attempt's record; None if it has written none yet, or a damaged one.
        silent: Seconds since its last record; None if there is none.
        results: The manifest; None if there is none.
        stalled_after: Seconds without a record after which the attempt is `stalled`.
    """
    if results is not None:
        return "finished"
    outcome = "running" if current is None else current.record.outcome
    if outcome == "complete" or not newest:
        return "damaged"
    if outcome in {"running", "killed"}:
        return "running" if outcome == "running" and silent is not None and silent <= stalled_after else "stalled"
    return "preempted" if outcome == "preempted" and _exit_code(current) in {None, 75} else "failed"


def _with_step(
    status: RunStatus, store: ObjectStore, logged: Mapping[int, LoggedAttempt], results: Mapping[str, Any] | None
) -> RunStatus:
    """Adds the last step: from finished training, else from the newest attempt, else from the newest checkpoint."""
    current = logged.get(status.attempt or 0)
    progress = next((n.training for one in logged.values() if (n := _noted(one)) and n.training), None)
    total = None if progress is None else progress.total_steps
    if (trained := _trained(store, results)) is not None:
        return replace(status, step_from="training", **trained)
    training = None if current is None else _training(current)
    if training is not None:
        return replace(status, step_from="attempt", **asdict(training))
    if status.checkpoints:
        return replace(status, step_from="checkpoint", step=status.checkpoints[0], total_steps=total)
    return replace(status, total_steps=total)


def _resume(status: RunStatus) -> Resume:
    after = status.stages_done[-1] if status.stages_done else None
    if Stage.TRAIN in status.stages_done:
        return Resume(after, None, 0)
    saved = status.checkpoints[0] if status.checkpoints else 0
    done = status.step if status.step_from == "attempt" and status.step is not None else None
    return Resume(after, saved or None, None if done is None else max(0, done - saved))


def _training(logged: LoggedAttempt) -> TrainingProgress | None:
    """The last step of an attempt."""
    return None if logged.noted is None else logged.noted.training


def _trained(store: ObjectStore, results: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Steps, loss and speed of finished training; None if training is not finished."""
    facts: Any = results
    if facts is None:
        stored = read_record(store, stage_key(Stage.TRAIN))
        try:
            facts = {} if stored is None else unsealed(stored.data)
        except ValueError:
            facts = {}  # a damaged record: the next attempt ignores it, too
    training = facts.get("training")
    if not isinstance(training, dict):
        return None
    steps = training.get("steps")
    return {
        "step": steps,
        "total_steps": steps,
        "loss": training.get("loss"),
        "tokens_per_second": training.get("tokens_per_second"),
    }


def _parsed(store: ObjectStore, key: str, parse: Any, problems: list[Problem]) -> Any:
    """The parsed file; None if it is missing, or damaged, which is added to `problems`."""
    if (stored := read_record(store, key)) is None:
        return None
    try:
        return parse(stored.data)
    except ValueError as error:
        problems.append(Problem(f"{store.uri}/{key}", first_error(error)))
        return None


def _logged(store: ObjectStore, numbers: list[int], problems: list[Problem]) -> dict[int, LoggedAttempt]:
    """Records of attempts by number, newest first, back to the first that is older than the newest and had a step."""
    records: dict[int, LoggedAttempt] = {}
    for number in numbers:
        logged = _parsed(store, attempt_key(number), _parse_logged, problems)
        if logged is not None:
            records[number] = logged
        if len(records) > 1 and any(_training(record) for record in records.values()):
            break
    return records


def _parse_logged(data: bytes) -> LoggedAttempt:
    """Parses an attempt's record, and checks that its times can be read.

    Raises:
        ValueError: The data is not a record of this kind, or was changed.
    """
    logged = parse_logged(data)
    try:
        _time(_noted(logged).at)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"has times that cannot be read: {error}") from None
    return logged


def _parse_lease(data: bytes) -> lease.LeaseRecord:
    """Parses a lease, and checks that its time can be read.

    Raises:
        ValueError: The data is not a lease, or was changed.
    """
    record = lease.parse(data)
    _time(record.started)
    return record


def _noted(logged: LoggedAttempt) -> Noted:
    """When an attempt wrote its record, and in which stage; estimated for records of earlier versions."""
    if logged.noted is not None:
        return logged.noted
    record = logged.record
    at = _time(record.started) + timedelta(seconds=record.seconds)
    return Noted(record.finished or timestamp(at), next(reversed(record.stage_seconds), None))


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except OverflowError as error:  # on the first or the last day of the calendar
        raise ValueError(str(error)) from None


def _exit_code(logged: LoggedAttempt | None) -> int | None:
    return None if logged is None or logged.noted is None else logged.noted.exit_code


def _last_end(logged: Mapping[int, LoggedAttempt], newest: int) -> AttemptEnd | None:
    """The end of the newest attempt that has ended; every attempt before the newest has."""
    for number, logged_attempt in logged.items():
        outcome = logged_attempt.record.outcome
        if outcome == "running" and number == newest:
            continue
        code = _exit_code(logged_attempt)
        meaning = exit_codes().get(code, (None, None))[0] if code is not None else None
        why = None if logged_attempt.noted is None else logged_attempt.noted.why
        if outcome in {"running", "killed"}:
            outcome, why = "killed", _why_killed(logged, number)
        return AttemptEnd(number, outcome, code, meaning, why, logged_attempt.record.finished)
    return None


def _why_killed(logged: Mapping[int, LoggedAttempt], number: int) -> str | None:
    """Evidence of full main memory: from the next attempt, which compared the kernel's counts, else from the record."""
    next_attempt = logged.get(number + 1)
    reason = None if next_attempt is None or next_attempt.noted is None else next_attempt.noted.before
    return reason or why_killed(logged[number])


def _results(store: ObjectStore, problems: list[Problem]) -> dict[str, Any] | None:
    """The manifest; None if it is missing or damaged. Only the sizes of the files that it lists are compared."""
    results: dict[str, Any] | None = _parsed(store, RESULTS, unsealed, problems)
    if results is None:
        return None
    try:
        artifacts = [Artifact(**entry) for entry in results["artifacts"]]
        _gate(results)
    except (KeyError, TypeError) as error:
        problems.append(Problem(f"{store.uri}/{RESULTS}", f"is not a manifest of this job: {error}"))
        return None
    if gone := missing(store, artifacts):
        what = f"{count(len(gone), 'published file')} missing, or of another size than in {RESULTS}, such as {gone[0]}"
        problems.append(Problem(f"{store.uri}/{ARTIFACTS}", what))
    return results


def _gate(results: Mapping[str, Any] | None) -> bool | None:
    passed = None if results is None else results["gate"]["passed"]
    return passed if isinstance(passed, bool) else None


def _formed(form: Callable[[Mapping[str, Any], str], T], results: Mapping[str, Any], where: str) -> T | None:
    """The outcome; None where the manifest lacks what it needs, as one of another version may."""
    try:
        return form(results, where)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _checkpoints(store: ObjectStore, problems: list[Problem]) -> tuple[int, ...]:
    steps = manager.steps(store)
    return tuple(step for step in steps if _parsed(store, marker_key(step), parse_marker, problems) is not None)


def _stages_done(store: ObjectStore) -> tuple[str, ...]:
    keys = {info.key for info in store.list(STAGES)}
    return tuple(stage.value for stage in Stage if stage_key(stage) in keys)


def _refuse_folder_of_runs(store: ObjectStore) -> None:
    """Raises SettingsError if the folder contains runs, whose path was given instead of the path of a run."""
    for info in islice(store.list(), _LOOKED_AT):
        folder, _, rest = info.key.partition("/")
        if rest in {RESULTS, LEASE} or attempt_number(rest) is not None:
            what = f"contains runs, but is not a run itself; give one of them, such as {store.uri}/{folder}"
            raise SettingsError([Problem(store.uri, what)])


def _runs_beside(folder: str) -> tuple[str, ...]:
    """Up to five runs in the folder above a local one, the newest first; none where they cannot be listed."""
    if is_remote(folder):
        return ()
    try:
        found = [path.parent for path in Path(folder).parent.glob(f"*/{LEASE}")]
        return tuple(str(path) for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[:_BESIDE])
    except OSError:
        return ()


def as_json(status: RunStatus) -> dict[str, Any]:
    """The status as JSON, with the fields of `RunStatus`."""
    return asdict(status) | {"problems": [str(problem) for problem in status.problems]}
