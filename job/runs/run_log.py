"""The run log: a sealed record of each attempt, updated while it runs; and what the records say of progress.

An attempt makes progress if it gets further than all before it: into a later stage, to a later optimizer step, or to
more scored questions of an evaluation. An attempt that only repeats lost work makes none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from job.common.hashing import sealed, unsealed
from job.common.process_identity import ProcessIdentity
from job.common.resources import MainMemory
from job.common.validation import adapter_of, first_error
from job.errors import DataError, Problem
from job.log import get_logger
from job.records import AttemptRecord, ExportedRun, TrainingProgress
from job.runs import stage_records
from job.runs.layout import CHECKPOINTS, EXPORTED_RUN, Stage, attempt_key, checkpoint_part, stage_key
from job.runs.lease import attempt_numbers
from job.runs.stage_records import RUN
from job.storage.base import read_record, write_in_turn
from job.storage.open import ObjectStore

QUESTIONS = "questions"
"""A field of the file that is not in the manifest."""
NOTED = "noted"
"""A field of the file that is not in the manifest either: see `Noted`."""
_GAPS = 20
"""Number of attempts before the publishing one that are looked for; older ones have ended long ago."""


@dataclass(frozen=True)
class Noted:
    """How an attempt was when it wrote its record, for `qlora-job status`.

    Attributes:
        at: When it was written, RFC 3339 in UTC, by the clock of the attempt's machine.
        stage: The current stage, or the one that an error ended; None between two, such as while the model is loaded.
        training: The last optimizer step of this attempt; None before its first one.
        exit_code: With which it ended; None while it runs, or if it completed the run.
        why: The error it ended with, in at most `LONGEST_WHY` characters and without secrets.
        stall_seconds: Limit of the attempt's watchdog; None in records of earlier versions.
        memory: The main memory where process 0 runs; None in records of earlier versions.
        loading: Whether the model was being loaded.
        before: Why the attempt before this one was likely killed; None where it was not, or nothing is known.
        process: Process 0; None where the system does not name it, and in records of earlier versions.
    """

    at: str
    stage: str | None = None
    training: TrainingProgress | None = None
    exit_code: int | None = None
    why: str | None = None
    stall_seconds: float | None = None
    memory: MainMemory | None = None
    before: str | None = None
    loading: bool = False
    process: ProcessIdentity | None = None


LONGEST_WHY = 500


@dataclass(frozen=True)
class LoggedAttempt:
    """An attempt's record, and how many questions of its last evaluation were scored, by it or before it.

    `run` is the fingerprint of the run that it was an attempt at; None where it had not pulled anything, and in records
    of earlier versions. `noted` is None in records of earlier versions, and where another attempt closed the record.
    """

    record: AttemptRecord
    questions: int = 0
    run: str | None = None
    noted: Noted | None = None

    @property
    def reached(self) -> tuple[int, int]:
        """How far the attempt got; see `how_far`."""
        return how_far(self.record.stage_seconds, self.record.last_step, self.questions)


@dataclass
class IdleLimit:
    """Whether an attempt that is stopped is one of too many in a row that made no progress.

    The creator of the attempt sets the number of attempts before it (`before`), and the function that returns whether
    this one got further (`progressed`); until then it counts as one that did, since it has no record yet.
    `record_stall` writes the end of an attempt that stalls into the run log, with the message.
    """

    limit: int
    before: int = 0
    progressed: Callable[[], bool] = lambda: True
    record_stall: Callable[[str], object] = lambda _message: None

    @property
    def reached(self) -> bool:
        """Whether this attempt, if stopped, ends with `NoProgress` instead of `Preempted`."""
        return not self.progressed() and self.before + 1 >= self.limit

    @property
    def message(self) -> str:
        """The message of `NoProgress`."""
        return (
            f"attempts in a row without progress: {self.before + 1}; progress is to get further than all before: "
            "into a later stage than pull, to a later optimizer step, or to more scored questions or copied files; "
            "the next start goes on where the run is; give it more time before it is stopped, or allow more such "
            f"attempts (JOB_RUN__MAX_IDLE_ATTEMPTS={self.limit}; 1000000 is as good as no limit)"
        )


def idle_pause(idle: int) -> float:
    """Seconds to wait before an attempt, by the number of consecutive attempts without progress before it."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(idle - 1, _DOUBLINGS)) if idle > 0 else 0.0


_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 60.0
# Beyond the longest pause; without a limit of idle attempts the power would overflow one day.
_DOUBLINGS = 10
_BEFORE_STEPS = 1 << 40
"""More rows than a reference is computed for."""


def how_far(stages: Iterable[str], last_step: int, questions: int) -> tuple[int, int]:
    """(number of the last stage, progress within it): an optimizer step, or the number of scored questions.

    Up to the first evaluation, it is the number of files that were copied of a finished run that is exported. Only to
    be compared with others.
    """
    order = [stage.value for stage in Stage]
    last = max((order.index(name) for name in stages if name in order), default=0)
    if order[last] == Stage.TRAIN:
        # Before the first step the reference of preferences is computed, row by row, which is progress as well.
        return last, last_step or questions - _BEFORE_STEPS
    return last, 0 if order[last] == Stage.PUBLISH else questions


def idle_attempts(attempts: Sequence[LoggedAttempt]) -> int:
    """How many attempts in a row, up to the newest, were stopped, stalled or were killed, and made no progress."""
    furthest, idle = (0, 0), 0
    for logged in attempts:
        stopped = logged.record.outcome in {"preempted", "stalled", "killed"}
        idle = idle + 1 if stopped and logged.reached <= furthest else 0
        furthest = max(furthest, logged.reached)
    return idle


def parse_logged(data: bytes) -> LoggedAttempt:
    """An attempt's file.

    Raises:
        ValueError: It is not a record, or it was altered.
    """
    facts = unsealed(data)
    record = adapter_of(AttemptRecord).validate_python(facts)
    noted = adapter_of(Noted).validate_python(facts[NOTED]) if facts.get(NOTED) else None
    return LoggedAttempt(record, int(facts.get(QUESTIONS, 0)), facts.get(RUN), noted)


def parse_record(data: bytes) -> AttemptRecord:
    """Like `parse_logged`, the record alone."""
    return parse_logged(data).record


def read_run_log(store: ObjectStore, epoch: int) -> list[AttemptRecord]:
    """The records of the attempts before `epoch`; `running` means killed, and damaged ones are left out."""
    return [logged.record for logged in read_logged(store, epoch)]


def read_exported_run(store: ObjectStore) -> ExportedRun | None:
    """The finished run that this one exports; None for any other run.

    Raises:
        DataError: The record of it is damaged: without it, the run would pass for one that trained by itself.
    """
    if (stored := read_record(store, stage_key(EXPORTED_RUN))) is None:
        return None
    try:
        return parse_exported_run(stored.data)
    except ValueError as error:
        what = f"{error}; remove the folder of this run, or give it another JOB_RUN__ID, and export again"
        raise DataError([Problem(f"{store.uri}/{stage_key(EXPORTED_RUN)}", what)]) from None


def parse_exported_run(data: bytes) -> ExportedRun:
    """The record of the finished run that a run exports.

    Raises:
        ValueError: It is not a record, or it was altered.
    """
    return stage_records.parse(stage_key(EXPORTED_RUN), data, adapter_of(ExportedRun))[0]


def read_logged(store: ObjectStore, epoch: int) -> list[LoggedAttempt]:
    """Like `read_run_log`, with the additional fields by which progress is judged."""
    numbers = [number for number in attempt_numbers(store) if number < epoch]
    found = (_read(store, number)[0] for number in numbers)
    return [replace(logged, record=_ended(logged.record)) for logged in found if logged is not None]


def close_run_log(store: ObjectStore, epoch: int, started: str, run: str | None = None) -> list[AttemptRecord]:
    """Like `read_run_log`, and ends all records before `epoch` permanently: a manifest will hold their hashes.

    An attempt that was replaced while it was suspended may be about to write its record. Every record that is noted as
    running is changed here, and a missing one is created, so the condition of that write fails and it ends as replaced.
    An attempt whose record was removed or is damaged gets one without times, too: checkpoints may name it. So does one
    with the record of another run or attempt. A record of a later attempt than this one is stale, and is removed.

    Args:
        store: The run's store, fenced.
        epoch: Number of the attempt that publishes.
        started: When that attempt began.
        run: Fingerprint of the run.

    Raises:
        Replaced: Another attempt owns the run.
    """
    there = attempt_numbers(store)
    for number in (number for number in there if number > epoch):
        store.delete(attempt_key(number))  # by now the fence would say if there were a later attempt
    known = {number for number in there if number < epoch}
    numbers = known | _named(store, epoch) | set(range(max(1, epoch - _GAPS), epoch))
    records: list[AttemptRecord] = []
    for number in sorted(numbers, reverse=True):  # newest first: one without a record began before the next one
        logged, tag = _read(store, number)
        foreign = logged is not None and (logged.run not in {None, run} or logged.record.number != number)
        record = None if logged is None or foreign else logged.record
        began = records[-1].started if records else started
        closed = _ended(record or _unknown(number, began))
        if record is None or record.outcome != closed.outcome:
            write_in_turn(store, attempt_key(number), sealed({**asdict(closed), RUN: run}), tag)
        records.append(closed)
    return records[::-1]


def _read(store: ObjectStore, number: int) -> tuple[LoggedAttempt | None, str | None]:
    """An attempt's record, None if it is missing or damaged, and the tag of its object."""
    key = attempt_key(number)
    if (stored := read_record(store, key)) is None:
        return None, None
    try:
        return parse_logged(stored.data), stored.tag
    except ValueError as error:
        what = "record of an attempt is damaged and ignored: its seconds are not part of the run's cost"
        get_logger().warning(what, file=f"{store.uri}/{key}", why=first_error(error))
        return None, stored.tag


def _ended(record: AttemptRecord) -> AttemptRecord:
    return replace(record, outcome="killed") if record.outcome == "running" else record


def _named(store: ObjectStore, epoch: int) -> set[int]:
    """The attempts before `epoch` that wrote a checkpoint which is there."""
    parts = (checkpoint_part(info.key) for info in store.list(CHECKPOINTS))
    folders = {part[1].partition("/")[0] for part in parts if part}
    return {int(name) for name in folders if name.isascii() and name.isdecimal() and 0 < int(name) < epoch}


def _unknown(number: int, started: str) -> AttemptRecord:
    """The record of an attempt of which only its existence is known."""
    return AttemptRecord(
        number=number,
        started=started,
        finished=None,
        outcome="killed",
        seconds=0.0,
        stage_seconds={},
        steps=0,
        repeated_steps=0,
        last_step=0,
    )
