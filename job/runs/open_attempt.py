"""How an attempt begins and ends: it takes the run's lease, and its end is written into the run log."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from job import log
from job.common.resources import main_memory
from job.distributed.processes import ALONE, Processes
from job.errors import JobError, NoProgress, Preempted, Replaced, Stalled
from job.preemption.stop_flag import StopFlag
from job.runs.attempt import Attempt
from job.runs.fault_injection import Faults
from job.runs.killed_for_memory import FIX, why_killed
from job.runs.layout import SETTINGS
from job.runs.lease import check_same_store, fenced, take
from job.runs.run_log import IdleLimit, LoggedAttempt, idle_attempts, read_exported_run, read_logged, read_run_log
from job.runs.run_settings import compare_settings
from job.runs.work_folder import work_folder
from job.storage.open import ObjectStore

OUTCOMES: Mapping[type[BaseException], str] = {Preempted: "preempted", Stalled: "stalled", JobError: "failed"}


@dataclass(frozen=True)
class TakeOver:
    """A finished run whose stages a run takes over, to export it; see `job/results/exported_run.py`.

    Attributes:
        settings: Value by dotted name of the settings that name the run that takes over.
        attempts: Number of the finished run's last attempt.
        copy: Copies the stages. Called with the store (fenced), a folder for temporary copies, the number of the
            `attempt` that does it, and `check_stop`, which is called before each file.
    """

    settings: Mapping[str, Any]
    attempts: int
    copy: Callable[..., None]


@contextmanager
def open_attempt(
    store: ObjectStore,
    settings: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any] | None = None,
    cache: str | None,
    stop: StopFlag,
    report_progress: Callable[[], None],
    faults: Faults,
    processes: Processes = ALONE,
    usd_per_hour: float | None = None,
    idle: IdleLimit | None = None,
    stall_seconds: float | None = None,
    take_over: TakeOver | None = None,
) -> Iterator[Attempt]:
    """Takes the run's lease and begins its next attempt; writes the attempt's end into the run log.

    Args:
        store: The run's store.
        settings: Value by dotted name of the settings that decide the result; an earlier attempt's must be the same.
        defaults: Their defaults, which count for what an earlier version did not have as a setting.
        cache: Folder for temporary files; None for the system's.
        stop: The flag.
        report_progress: Tells the watchdog that there is progress.
        faults: Faults to inject.
        processes: Those that make this attempt; process 0 holds the lease for all.
        usd_per_hour: Price of this machine; None where it is not known.
        idle: Decides, from the attempts before, with which error a stopped attempt ends; None for no limit.
        stall_seconds: Limit of the watchdog, for `qlora-job status`; None if unknown.
        take_over: In process 0 of a run that exports a finished one: how to take over its stages. None if an attempt
            before this one has begun with them, and for any other run.

    Raises:
        NoProgress: The attempt was stopped, as were too many before it, and none of them got any further.
        Replaced: Another attempt took the run over.
        SettingsError: The run began with other settings, or the machines of the run do not have the same store.
    """
    check_stop = partial(_check_stop, processes, stop, report_progress)
    of_run = processes.broadcast(
        "settings of the run",
        lambda: compare_settings(store, settings, defaults) if take_over is None else dict(take_over.settings),
    )
    lease = None
    if processes.leads:
        lease = take(store, platform.node() or "unknown", 0 if take_over is None else take_over.attempts)
    number = processes.broadcast("attempt", lambda: lease.epoch if lease else 0)
    holder = processes.broadcast("holder of the lease", lambda: lease.holder if lease else "")
    log.bind(attempt=number)
    if not processes.leads and processes.place.local_rank == 0:
        check_same_store(store, holder, check_stop)
    with work_folder(cache, store.uri, number, cleans=processes.place.local_rank == 0) as work:
        attempt = Attempt(
            fenced(store, lease),
            work,
            number,
            stop,
            report_progress,
            faults,
            earlier=[],
            processes=processes,
            usd_per_hour=usd_per_hour,
            settings=of_run,
            stall_seconds=stall_seconds,
        )
        try:
            if processes.leads:
                _read_attempts_before(attempt, store, idle)
            if take_over is not None:
                _take_over(attempt, store, take_over)
            attempt.begins_export = processes.broadcast("whether a run is taken over", lambda: take_over is not None)
            attempt.note("running")
            yield attempt
        except Replaced:
            raise  # the run log belongs to the attempt that took over
        except BaseException as error:
            if (ended := _note_failure(attempt, error, idle)) is not error:
                raise ended from error
            raise
        attempt.note("complete")


def _take_over(attempt: Attempt, store: ObjectStore, take_over: TakeOver) -> None:
    """Copies the stages of the finished run, as far as attempts before this one have not, and its attempts."""
    attempt.note("running")  # it is paid for while it copies, and may end
    if store.tag(SETTINGS) is not None:  # another attempt began since `take_over` was made
        compare_settings(store, take_over.settings)

    def next_file() -> None:
        attempt.check_stop()
        attempt.questions += 1

    take_over.copy(attempt.store, attempt.work, attempt=attempt.number, check_stop=next_file)
    attempt.earlier = read_run_log(store, attempt.number)


def _read_attempts_before(attempt: Attempt, store: ObjectStore, idle: IdleLimit | None) -> None:
    """Tells the attempt, and `idle`, of those before it."""
    logged = read_logged(store, attempt.number)
    attempt.earlier = [logged_attempt.record for logged_attempt in logged]
    exported = read_exported_run(store)
    taken_over = 0 if exported is None else exported.attempts
    own = [one for one in logged if one.record.number > taken_over]  # what others reached is no progress here
    attempt.idle_before, attempt.killed_before = idle_attempts(own), _why_killed(own)
    if idle is not None:  # its exit code takes precedence over those of the others
        furthest = max((logged_attempt.reached for logged_attempt in own), default=(0, 0))
        idle.before, idle.progressed = attempt.idle_before, lambda: attempt.reached() > furthest
        idle.record_stall = lambda message: _note_failure(attempt, Stalled(message), idle)


def _check_stop(processes: Processes, stop: StopFlag, report_progress: Callable[[], None]) -> None:
    report_progress()
    processes.check()
    stop.check()


def _why_killed(logged: Sequence[LoggedAttempt]) -> str | None:
    """Why the newest of earlier attempts was likely killed (main memory was full); logs that it recorded no end."""
    if not logged or logged[-1].record.outcome != "killed":
        return None
    before = logged[-1].record.number
    if (why := why_killed(logged[-1], main_memory())) is not None:
        what = "the attempt before this one was killed without notice"
        log.get_logger().warning(what, attempt_before=before, why=why, fix=FIX)
    else:
        what = "the attempt before this one recorded no end: it was killed, or this attempt replaces it"
        log.get_logger().warning(what, attempt_before=before)
    return why


def _note_failure(attempt: Attempt, error: BaseException, idle: IdleLimit | None) -> BaseException:
    """Writes how the attempt ended; a failure to write must not hide the error that ended it.

    Returns:
        The error to end with: `NoProgress` if the attempt was stopped, as were too many before it.
    """
    outcome = next((word for kind, word in OUTCOMES.items() if isinstance(error, kind)), "crashed")
    ended = error
    if isinstance(error, Preempted) and idle is not None and idle.reached:
        ended = NoProgress(f"{error}; {idle.message}")
    try:
        attempt.note(outcome, ended)
    except JobError as failure:
        log.get_logger().warning("the end of the attempt cannot be recorded", why=str(failure))
    return ended
