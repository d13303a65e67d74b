"""The state of a run, from the records in its store alone, for `qlora-job status`.

An attempt writes its record (`attempts/NNNN.json`) at most every 5 seconds while it makes progress, with its stage and
the figures of the last optimizer step (`runs.run_log.Noted`). So a run on S3 is seen as a local one is. Records of
earlier versions lack these figures; the step is then that of the last checkpoint, and `step_from` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Literal

from job.checkpoints import manager
from job.common.formatting import count, timestamp
from job.common.hashing import unsealed
from job.common.validation import first_error
from job.errors import Problem, SettingsError, exit_codes
from job.records import Artifact, TrainingProgress
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
from job.storage.open import ObjectStore, StorageOptions, open_store

State = Literal["running", "preempted", "stalled", "finished", "failed", "not-started", "damaged"]

STALLED_SECONDS = 600.0
"""A running attempt that wrote no record for so long is `stalled`, if its record does not tell its watchdog's limit."""
_WATCHDOG_SHARE = 1.2
"""The watchdog ends an attempt at up to 1.1 times its limit, and that is recorded within seconds."""
_READ_BACK = 20
"""Records of so many attempts are read, newest first, for the last end and the last step."""
_LOOKED_AT = 10_000
"""Objects that are looked at for runs below a folder that is none."""


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended. `qlora-job status --format json` has these fields.

    Attributes:
        attempt: Its number.
        outcome: `preempted`, `stalled`, `failed`, `crashed` (a bug), `complete`, or `killed`: it wrote no end.
        exit_code: Of its process; null if it was killed, completed the run, or is of a version that did not record it.
        meaning: What the exit code means.
        why: The error's text, without secrets; of a killed attempt what points to full main memory; null where there
            is neither.
        finished: When, RFC 3339 in UTC; null if it was killed.
    """

    attempt: int
    outcome: str
    exit_code: int | None
    meaning: str | None
    why: str | None
    finished: str | None


@dataclass(frozen=True)
class RunStatus:
    """How a run is. `qlora-job status --format json` has these fields; null is what is not known, or does not apply.

    Attributes:
        run: Path or URI of the run's folder.
        state: `running`; `preempted`: the platform is to start the next attempt; `stalled`: no sign of life, so the
            attempt was killed without notice, or hangs; `finished`; `failed`: the last attempt ended with an error;
            `not-started`; `damaged`: results.json, or a file that it lists, is not whole.
        first_stage: Whether all this is about the first stage of two, as in `JOB_TRAIN__METHOD=sft,dpo`.
        attempt: Number of the newest attempt.
        stage: The stage that goes on, or in which the newest attempt ended.
        stages_done: The stages with a record, in their order; later attempts do not repeat them.
        step: The last optimizer step.
        step_from: What `step` and the figures of the step are from: `attempt`, the newest one; `checkpoint`, from
            which the next attempt resumes, or this one did; `training`, which is done.
        total_steps: Number of steps; early stopping may end training before the last one.
        loss: Of the last step; once training is done, its mean.
        tokens_per_second: Target tokens per second of the last step; once training is done, over all steps.
        remaining_seconds: Estimate for the steps that are left, as of the last sign of life; not for later stages.
        questions: Items scored so far outside of training: questions, rows of the safety screen, judged prompts.
        last_sign_of_life: When the newest attempt wrote its record last, RFC 3339 in UTC.
        silent_seconds: Seconds since then, by this machine's clock.
        last_end: How the newest attempt that ended did so.
        likely: Of a `stalled` run, what points to full main memory as the cause; null where nothing does.
        checkpoints: Steps of the checkpoints with a valid commit marker, newest first. Their files are not read.
        gate: Of a finished run, whether its quality gate is met; null without a gate.
        problems: Records that are damaged; the exit code is then 4.
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
    problems: tuple[Problem, ...] = field(default_factory=tuple)


def read_status(
    where: str, storage: StorageOptions, *, now: datetime | None = None, stalled_after: float | None = None
) -> RunStatus:
    """The status of the run in a folder, given as a path or URI, which nothing is written to.

    Args:
        where: The folder of a run, or the `results.json` in it.
        storage: How to reach the store.
        now: The time; None for this machine's.
        stalled_after: After so many seconds without a sign of life a running attempt is `stalled`; None: once its own
            watchdog would have ended it (JOB_TRAIN__STALL_SECONDS), since a long evaluation may be silent.

    Raises:
        SettingsError: The folder holds runs, and is none itself; or it is no path or URI.
        AccessDenied, Unreachable: As the store says.
    """
    now = now or datetime.now(UTC)
    store = open_store(run_folder(where), storage)
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
    return status


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
    done = _stages_done(store)
    if stalled_after is None:
        watched = None if noted is None else noted.stall_seconds
        stalled_after = STALLED_SECONDS if watched is None else _WATCHDOG_SHARE * watched
    state, last_end = _state(newest, current, silent, results, stalled_after), _last_end(logged, newest)
    if state == "finished" and problems:
        state = "damaged"
    status = RunStatus(
        run=store.uri,
        state=state,
        attempt=newest or None,
        stage=None if noted is None or state == "finished" else noted.stage,
        stages_done=done,
        questions=current.questions or None if current and noted and state == "running" else None,
        last_sign_of_life=sign,
        silent_seconds=silent,
        last_end=last_end,
        likely=None if current is None or state != "stalled" else why_killed(current),
        checkpoints=checkpoints,
        gate=_gate(results),
        problems=tuple(problems),
    )
    return _with_step(status, store, logged, results)


def _state(
    newest: int,
    current: LoggedAttempt | None,
    silent: float | None,
    results: Mapping[str, Any] | None,
    stalled_after: float,
) -> State:
    """The state, by the newest attempt's record; None where it has written none yet, or a damaged one."""
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
    """Adds the last step, from the best source there is."""
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


def _training(logged: LoggedAttempt) -> TrainingProgress | None:
    """The last step of an attempt."""
    return None if logged.noted is None else logged.noted.training


def _trained(store: ObjectStore, results: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Steps, loss and speed of training that is done; None if it is not."""
    facts: Any = results
    if facts is None:
        stored = read_record(store, stage_key(Stage.TRAIN))
        try:
            facts = {} if stored is None else unsealed(stored.data)
        except ValueError:
            facts = {}  # the next attempt ignores it, too
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
    """What a file says; None if it is missing or damaged, which is added to `problems`."""
    if (stored := read_record(store, key)) is None:
        return None
    try:
        return parse(stored.data)
    except ValueError as error:
        problems.append(Problem(f"{store.uri}/{key}", first_error(error)))
        return None


def _logged(store: ObjectStore, numbers: list[int], problems: list[Problem]) -> dict[int, LoggedAttempt]:
    """By number, newest first, the records of attempts, as far back as there is something to learn from them."""
    records: dict[int, LoggedAttempt] = {}
    for number in numbers:
        logged = _parsed(store, attempt_key(number), _parse_logged, problems)
        if logged is not None:
            records[number] = logged
        if len(records) > 1 and any(_training(record) for record in records.values()):
            break
    return records


def _parse_logged(data: bytes) -> LoggedAttempt:
    """An attempt's record, whose times can be read.

    Raises:
        ValueError: It is none, or it was altered.
    """
    logged = parse_logged(data)
    try:
        _time(_noted(logged).at)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"has times that cannot be read: {error}") from None
    return logged


def _parse_lease(data: bytes) -> lease.LeaseRecord:
    """A lease, whose time can be read.

    Raises:
        ValueError: It is none, or it was altered.
    """
    record = lease.parse(data)
    _time(record.started)
    return record


def _noted(logged: LoggedAttempt) -> Noted:
    """When an attempt wrote its record, and at which stage; worked out for records of earlier versions."""
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
    """The end of the newest attempt that ended; every attempt but the newest has."""
    for number, one in logged.items():
        outcome = one.record.outcome
        if outcome == "running" and number == newest:
            continue
        code = _exit_code(one)
        meaning = exit_codes().get(code, (None, None))[0] if code is not None else None
        why = None if one.noted is None else one.noted.why
        if outcome in {"running", "killed"}:
            outcome, why = "killed", _why_killed(logged, number)
        return AttemptEnd(number, outcome, code, meaning, why, one.record.finished)
    return None


def _why_killed(logged: Mapping[int, LoggedAttempt], number: int) -> str | None:
    """What the next attempt found out, which could compare the kernel's counts; else what the record itself says."""
    next_attempt = logged.get(number + 1)
    reason = None if next_attempt is None or next_attempt.noted is None else next_attempt.noted.before
    return reason or why_killed(logged[number])


def _results(store: ObjectStore, problems: list[Problem]) -> dict[str, Any] | None:
    """The manifest; None if there is none, or it is damaged. Of the files that it lists only the sizes are compared."""
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


def _checkpoints(store: ObjectStore, problems: list[Problem]) -> tuple[int, ...]:
    steps = manager.steps(store)
    return tuple(step for step in steps if _parsed(store, marker_key(step), manager.parse_marker, problems) is not None)


def _stages_done(store: ObjectStore) -> tuple[str, ...]:
    keys = {info.key for info in store.list(STAGES)}
    return tuple(stage.value for stage in Stage if stage_key(stage) in keys)


def _refuse_folder_of_runs(store: ObjectStore) -> None:
    """Raises SettingsError if the folder holds runs: its path was given instead of that of one of them."""
    for info in islice(store.list(), _LOOKED_AT):
        folder, _, rest = info.key.partition("/")
        if rest in {RESULTS, LEASE} or attempt_number(rest) is not None:
            what = f"contains runs, but is not a run itself; give one of them, such as {store.uri}/{folder}"
            raise SettingsError([Problem(store.uri, what)])


def as_json(status: RunStatus) -> dict[str, Any]:
    """The status as JSON, with the fields of `RunStatus`."""
    return asdict(status) | {"problems": [str(problem) for problem in status.problems]}
