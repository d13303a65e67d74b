"""One attempt at a run: its store and work folder, the stages that earlier attempts finished, and its run log.

A stage is finished when `stages/<name>.json` exists: it holds the stage's result, and the hashes of the files that it
published. A later attempt reads it instead of doing the work again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from pydantic import TypeAdapter

from job import log
from job.common.formatting import timestamp
from job.common.hashing import hash_file, sealed
from job.common.process_identity import this_process
from job.common.resources import main_memory
from job.common.validation import adapter_of
from job.distributed.processes import ALONE, Processes
from job.errors import DataError, JobError
from job.preemption.stop_flag import StopFlag
from job.records import (
    Artifact,
    AttemptRecord,
    FirstValues,
    Pulled,
    Referenced,
    RunFigures,
    StepMetrics,
    TrainingProgress,
    ValidationMetrics,
)
from job.runs import stage_records
from job.runs.fault_injection import Faults
from job.runs.layout import ARTIFACTS, BUILT_ON, Stage, attempt_key, stage_key
from job.runs.run_log import (
    LONGEST_WHY,
    NOTED,
    QUESTIONS,
    Noted,
    how_far,
    idle_pause,
)
from job.runs.stage_records import fingerprint
from job.storage.base import delete_in_turn, read_record, upload_in_turn, write_in_turn
from job.storage.open import ObjectStore
from job.storage.verified_download import altered, fetch_artifact

T = TypeVar("T")

NOTE_SHARE = 0.01
"""Share of an attempt's time that notes in the run log may take; what happened since the last one is lost by a kill."""
NOTE_SECONDS = (0.2, 5.0)
"""Bounds of the time between two notes."""
_STOP_CHECK_SECONDS = 0.2


@dataclass
class Attempt:
    """One start of a run: its store, stop flag and counters, and its record in the run log.

    `store` is fenced: it refuses to change once another attempt has taken the run over, and in any process but the
    first. `number` is the lease's epoch. `settings` are those that decide the result and that the run knows.
    `joules` returns the energy of the GPUs since the attempt began; `on_metrics` is called with every step,
    `on_validation` with every validation, and `on_results` with the published manifest.
    """

    store: ObjectStore
    work: Path
    number: int
    stop: StopFlag
    report_progress: Callable[[], None]
    faults: Faults
    earlier: list[AttemptRecord]
    processes: Processes = ALONE
    usd_per_hour: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    joules: Callable[[], float | None] = lambda: None
    on_metrics: Callable[[StepMetrics], None] = lambda _metrics: None
    on_validation: Callable[[ValidationMetrics], None] = lambda _metrics: None
    on_results: Callable[[Mapping[str, Any]], None] = lambda _results: None
    started: str = field(default_factory=timestamp)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    repeated_steps: int = 0
    repeated_seconds: float = 0.0
    step_seconds: float = 0.0
    """Seconds in optimizer steps, those that were repeated included."""
    last_step: int = 0
    training: TrainingProgress | None = None
    """The last step for the run log; the caller sets it before `step_done`."""
    questions: int = 0
    """Questions of the current evaluation that this attempt or an earlier one has scored; before the evaluations, files
    of the exported run that either has copied."""
    run: str | None = None
    """Fingerprint of the run, which its records and checkpoints carry; None until something was pulled."""
    stall_seconds: float | None = None
    """Limit of the watchdog in seconds: an attempt without progress for this long ends."""
    idle_before: int = 0
    """Attempts before this one, in a row, without progress; 0 in all processes but the first."""
    killed_before: str | None = None
    """Why the attempt before this one was likely killed, if it recorded no end."""
    loading: bool = False
    """Whether the model is being loaded."""
    begins_export: bool = False
    """Whether this run exports a finished one, and no attempt before this one has checked its settings."""
    settled: bool = False
    """Whether the run's settings are recorded. Until then the attempt's record has no fingerprint, and
    an attempt that ends for a mistake in its settings counts as one at this run."""
    _stage: tuple[str, float] | None = None
    _failed_in: str | None = None
    """The stage that an exception ended, which ends the attempt too."""
    _noted: str | None = None
    """Tag of this attempt's record as it wrote it last."""
    _over: bool = False
    """Whether the attempt's end is recorded: what is noted later, such as by a thread, must not overwrite it."""
    _intact: set[Artifact] = field(default_factory=set)
    """What of finished stages this attempt has found to be there byte for byte."""
    _noting: Lock = field(default_factory=Lock)
    _began: float = field(default_factory=time.monotonic)
    _next_note: float = field(default_factory=time.monotonic)

    def check_stop(self, *, progress: bool = True) -> None:
        """Reports progress, and ends the stage if the job has to end; called wherever stopping is safe.

        Without `progress` the stage waits for something else, which the watchdog must not take for progress.
        """
        if progress:
            self.report_progress()
        self.stop.check()
        self.processes.check()
        self._note_if_due()

    def pause_after_idle(self) -> None:
        """Waits if attempts before this one made no progress, in process 0; the other processes wait for it.

        Several machines are started again by JobSet, which does not wait between two attempts: without this, they would
        follow each other as fast as pods can start.

        Raises:
            Preempted: The job has to end.
        """
        self.processes.broadcast("pause", self._pause)

    def _pause(self) -> None:
        if seconds := idle_pause(self.idle_before):
            what = "the previous attempts made no progress: waiting before this one begins"
            log.get_logger().info(what, seconds=seconds)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check_stop()
            time.sleep(min(_STOP_CHECK_SECONDS, left))

    def check_stop_in_thread(self) -> None:
        """Like `check_stop`, for another thread than the stage's: it writes nothing into the run log."""
        self.report_progress()
        self.stop.check()

    def step_done(self, step: int, seconds: float) -> None:
        """Counts an optimizer step, and periodically notes in the store how far the attempt is."""
        self.report_progress()
        self.steps += 1
        self.step_seconds += seconds
        if step <= max((record.last_step for record in self.earlier), default=0):
            self.repeated_steps += 1
            self.repeated_seconds += seconds
        self.last_step = step
        self._note_if_due()
        self.faults.at("step", step)

    def validated(self, metrics: ValidationMetrics) -> None:
        """Reports that a validation was made; a checkpoint of it would be written afterwards."""
        self.report_progress()
        self.on_validation(metrics)
        self._note_if_due()
        self.faults.at("validation", metrics.step)

    def figures(self) -> RunFigures:
        """The current figures of the run; called by monitoring threads."""
        stage, elapsed = self._stage, time.monotonic() - self._began
        new_seconds = self.step_seconds - self.repeated_seconds
        return RunFigures(
            self.number,
            tuple(one.value for one in Stage),
            None if stage is None else stage[0],
            min(1.0, max(0.0, new_seconds) / elapsed) if elapsed else 0.0,
            self.training,
        )

    def reached(self) -> tuple[int, int]:
        """How far this attempt has got; see `how_far`."""
        return how_far(self._stages_so_far(), self.last_step, self.questions)

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Log lines within carry the stage's name, and its seconds are counted; lines say when it begins and is done.

        Raises:
            Preempted: The job has to end.
        """
        name = stage.value
        again = name in self.stage_seconds  # what `stage` keeps of the pull, which is done by then
        with log.stage(name):
            if not again:
                log.get_logger().info("stage begins")
            self.faults.at("stage", name)
            self.check_stop()
            self._stage = (name, time.monotonic())
            if stage is not Stage.PULL:
                self.questions = 0
            try:
                if stage is Stage.TRAIN:  # so that a record without it is of an attempt that did no step
                    self.note("running")
                yield
            except BaseException:
                self._failed_in = name
                raise
            finally:
                seconds, self._stage = self._stages_so_far(), None
                self.stage_seconds = seconds
        if not again:
            log.get_logger().info("stage is done", stage=name, seconds=round(seconds[name], 2))

    def _stages_so_far(self) -> dict[str, float]:
        """Seconds by stage, including the current one: a killed attempt is known by its last note."""
        stage = self._stage  # notes are written by the uploader's thread too
        if stage is None:
            return dict(self.stage_seconds)
        name, began = stage
        return self.stage_seconds | {name: self.stage_seconds.get(name, 0.0) + time.monotonic() - began}

    def stage(
        self, stage: Stage, kind: type[T], compute: Callable[[], T | None], objection: Callable[[T], str] = lambda _: ""
    ) -> T:
        """The stage's result: read from its record if an earlier attempt finished it, else computed now.

        A record is valid while all files that the stage published exist unchanged (a copy of the run may lack some),
        and if process 0 gets no `objection` to it (a text).
        If a stage is done again, so are those that build on it.

        All processes compute; process 0's result is shared with all of them. The others may return None.
        """
        name, adapter = stage.value, adapter_of(kind)
        kept = self.processes.broadcast(f"record of {name}", lambda: self._valid_record(name, adapter, objection))
        if kept is not None:
            if name not in self.stage_seconds:
                log.get_logger().info("stage was finished by an earlier attempt", stage=name)
            return adapter.validate_json(kept)
        with self.timed(stage):
            result = compute()
            record = "" if result is None else adapter.dump_json(result).decode()
            if self.processes.leads:
                self.write_record(name, record)
        record = self.processes.broadcast(f"result of {name}", lambda: record)
        self.note("running")
        return adapter.validate_json(record)

    def identify(self, pulled: Pulled) -> None:
        """Sets the run's fingerprint from what was pulled: from here on, records of other runs are ignored."""
        self.run = fingerprint(self.settings, pulled)

    def recorded(self, name: str, kind: type[T]) -> T | None:
        """The record of a stage that an earlier attempt finished, or a further record, such as `layout.BASE`.

        None if there is no valid one: missing, damaged, or of another run.
        """
        found = self._read_record(name, adapter_of(kind))
        if isinstance(found, Pulled):
            self.identify(found)
        return found

    def is_done(self, stage: Stage, kind: type[Any]) -> bool:
        """Whether an earlier attempt finished the stage, and all that it published is there unchanged."""
        record = self.recorded(stage, kind)
        return record is not None and not self._gone(record)

    def _gone(self, record: Any) -> list[str]:
        """What a stage published, by path, that is missing or damaged. What was intact is not downloaded again."""
        artifacts = getattr(record, "artifacts", ())
        gone = missing(self.store, artifacts) or self.damaged(one for one in artifacts if one not in self._intact)
        if not gone:
            self._intact.update(artifacts)
        return gone

    def write_record(self, name: str, record: str) -> None:
        """Writes a record (a JSON object) that `recorded` and `stage` read in later attempts."""
        key = stage_key(name)
        tag = self.store.tag(key)
        write_in_turn(self.store, key, stage_records.render(key, record, self.run or "", self.number), tag)

    def _read_record(self, name: str, adapter: TypeAdapter[T]) -> T | None:
        key = stage_key(name)
        stored = read_record(self.store, key)
        if stored is None:
            return None
        try:
            record, run = stage_records.parse(key, stored.data, adapter)
        except ValueError as error:
            log.get_logger().warning("record is damaged and ignored", stage=name, why=str(error))
            return None
        own = fingerprint(self.settings, record) if isinstance(record, Pulled) else self.run
        if run not in {None, "", own} and own is not None:
            log.get_logger().warning("record is ignored: it belongs to a run with other settings or data", stage=name)
            return None
        return record

    def _valid_record(self, name: str, adapter: TypeAdapter[Any], objection: Callable[[Any], str]) -> str | None:
        """The record of a stage, if there is a valid one."""
        record = self._read_record(name, adapter)
        if record is not None and (why := objection(record)):
            log.get_logger().warning("stage is done again", stage=name, why=why)
        elif record is not None:
            if not (gone := self._gone(record)):
                return adapter.dump_json(record).decode()
            what = "stage is done again: files that it published are missing"
            log.get_logger().warning(what, stage=name, gone=gone)
        for later in BUILT_ON.get(name, ()):
            delete_in_turn(self.store, stage_key(later))
        return None

    def publish(self, path: Path, key: str, facts_sha256: str | None = None) -> Artifact:
        """Uploads a file; returns its entry for the manifest.

        Raises:
            Replaced: Another attempt took the run over.
            Unreachable, AccessDenied: As the store says.
        """
        upload_in_turn(self.store, path, key)
        return Artifact(key, path.stat().st_size, hash_file(path), facts_sha256)

    def damaged(self, artifacts: Iterable[Artifact]) -> list[str]:
        """Those of the artifacts, by path, that the store does not have byte for byte. All are downloaded for that."""
        return altered(self.store, artifacts, self.work, self.check_stop)

    def fetch(self, artifact: Artifact) -> Path:
        """Downloads what was published, verified; for its errors see `fetch_artifact`."""
        return fetch_artifact(self.store, artifact, self.work)

    def record(self, outcome: str) -> AttemptRecord:
        """This attempt's record for the run log, as of now; `running` has no end."""
        return AttemptRecord(
            number=self.number,
            started=self.started,
            finished=None if outcome == "running" else timestamp(),
            outcome=outcome,
            seconds=time.monotonic() - self._began,
            stage_seconds=self._stages_so_far(),
            steps=self.steps,
            repeated_steps=self.repeated_steps,
            last_step=self.last_step,
            world_size=self.processes.place.world_size,
            repeated_seconds=self.repeated_seconds,
            usd_per_hour=self.usd_per_hour,
            energy_joules=self.joules(),
        )

    def note(self, outcome: str, error: BaseException | None = None) -> None:
        """Writes the record into the run log, with the error that ended the attempt; process 0 does it for all.

        Every outcome but `running` is the attempt's end, after which nothing is written any more.
        """
        if not self.processes.leads:
            self._next_note = math.inf
            return
        began = time.monotonic()
        with self._noting:  # the uploading thread notes checkpoints, and the watchdog's a stall
            if self._over:
                return
            self._over = outcome != "running"
            run = self.run if self.settled else None
            more = {QUESTIONS: self.questions, NOTED: asdict(self._now(error)), stage_records.RUN: run}
            record = sealed({**asdict(self.record(outcome)), **more})
            self._noted = write_in_turn(self.store, attempt_key(self.number), record, self._noted)
        ended = time.monotonic()
        shortest, longest = NOTE_SECONDS
        self._next_note = ended + min(longest, max(shortest, (ended - began) / NOTE_SHARE))

    def _now(self, error: BaseException | None) -> Noted:
        current = self._stage  # read once: the stage may end while another thread notes it
        stage = self._failed_in if current is None else current[0]
        code = why = None
        if error is not None:
            code = error.exit_code if isinstance(error, JobError) else JobError.exit_code
            words = str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}"
            why = " ".join(log.without_secrets(words).split())[:LONGEST_WHY]
        return Noted(
            at=timestamp(),
            stage=stage,
            training=self.training,
            exit_code=code,
            why=why,
            stall_seconds=self.stall_seconds,
            memory=main_memory(),
            before=self.killed_before,
            loading=self.loading,
            process=this_process(),
        )

    def _note_if_due(self) -> None:
        if time.monotonic() > self._next_note:
            self.note("running")


def published_once(attempt: Attempt, name: str, kind: type[FirstValues | Referenced], name_in_log: str) -> str:
    """The file that a run computes once, as JSON of its `Artifact`; empty if no attempt published it completely.

    Args:
        attempt: This one.
        name: Name of the record, such as `layout.REFERENCE`.
        kind: The record's class.
        name_in_log: What the file holds, in the plural, for the log.
    """
    record = attempt.recorded(name, kind)
    if record is None:
        return ""
    try:
        attempt.fetch(record.artifacts[0])
    except DataError as error:
        log.get_logger().warning(f"{name_in_log} are computed again", why=str(error))
        return ""
    log.get_logger().info(f"{name_in_log} of an earlier attempt are used again")
    return json.dumps(asdict(record.artifacts[0]))


def missing(store: ObjectStore, artifacts: Iterable[Artifact]) -> list[str]:
    """Those of the artifacts, by path, that the store does not have, or not in their size."""
    sizes = {artifact.path: artifact.bytes for artifact in artifacts}
    found = {info.key: info.bytes for info in store.list(ARTIFACTS)} if sizes else {}
    return [path for path, size in sizes.items() if found.get(path) != size]
