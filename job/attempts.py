"""One attempt at a run: its store and work folder, the stages that earlier attempts finished, and the ledger.

A stage is finished when `stages/<name>.json` exists: it holds what the stage found out, and the hashes of what it
published. A later attempt reads it instead of doing the work again.
"""

from __future__ import annotations

import contextlib
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from job import log
from job.errors import DataError, JobError, Preempted, Problem, Replaced, SettingsError
from job.faults import Faults
from job.guard import guarded
from job.hashes import hash_file
from job.lease import take
from job.objects import Conflict, ObjectStore
from job.preemption import Stop
from job.records import Artifact, AttemptRecord

T = TypeVar("T")

OUTCOMES: Mapping[type[BaseException], str] = {Preempted: "preempted", JobError: "failed"}


NOTE_SECONDS = 5.0
BUILT_ON = {"train": "evaluate-adapter"}
"""Stage -> the stage that works with what it published."""
SETTINGS = "settings.json"


def now() -> str:
    """The time, RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class Attempt:
    """What every stage needs.

    `store` is guarded: it refuses to change once another attempt has taken the run over. `number` is the lease's epoch.
    """

    store: ObjectStore
    work: Path
    number: int
    stop: Stop
    beat: Callable[[], None]
    faults: Faults
    earlier: list[AttemptRecord]
    started: str = field(default_factory=now)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    repeated_steps: int = 0
    last_step: int = 0
    _began: float = field(default_factory=time.monotonic)
    _noted: float = field(default_factory=time.monotonic)

    def alive(self) -> None:
        """Called wherever a stage gets on and stopping is safe: ends the stage if the job has to end."""
        self.beat()
        self.stop.check()
        if time.monotonic() - self._noted > NOTE_SECONDS:
            self.note("running")

    def step_done(self, step: int) -> None:
        """Counts an optimizer step, and now and then notes in the store how far the attempt is."""
        self.beat()
        self.steps += 1
        self.repeated_steps += step <= max((record.last_step for record in self.earlier), default=0)
        self.last_step = step
        if time.monotonic() - self._noted > NOTE_SECONDS:
            self.note("running")
        self.faults.at("step", step)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Log lines within carry the stage's name, and its seconds are counted."""
        with log.stage(name):
            self.faults.at("stage", name)
            self.alive()
            began = time.monotonic()
            try:
                yield
            finally:
                self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + time.monotonic() - began

    def stage(self, name: str, kind: type[T], work: Callable[[], T]) -> T:
        """What the stage found out: read from its record if an earlier attempt finished it, else worked out now.

        A record counts while everything is there that the stage published: a copy of the run may be without some of it.
        If a stage is done again, so is the one that builds on it.
        """
        key = f"stages/{name}.json"
        kept = self.store.read(key)
        if kept is not None:
            known = TypeAdapter(kind).validate_json(kept.data)
            gone = missing(self.store, getattr(known, "artifacts", ()))
            if not gone:
                log.get_logger().info("stage was finished by an earlier attempt", stage=name)
                return known
            log.get_logger().warning("stage is done again, not all that it published is there", stage=name, gone=gone)
            if name in BUILT_ON:
                self.store.delete(f"stages/{BUILT_ON[name]}.json")
        with self.timed(name):
            log.get_logger().info("stage begins")
            result = work()
            self.store.write(key, TypeAdapter(kind).dump_json(result))
        self.note("running")
        log.get_logger().info("stage is done", stage=name, seconds=round(self.stage_seconds[name], 2))
        return result

    def publish(self, path: Path, key: str, facts_sha256: str | None = None) -> Artifact:
        """Uploads a file, or every file of a folder is the caller's loop; returns its entry for the manifest."""
        self.store.upload(path, key)
        return Artifact(key, path.stat().st_size, hash_file(path), facts_sha256)

    def fetch(self, artifact: Artifact) -> Path:
        """Downloads what an earlier attempt published, verified."""
        path = self.work / artifact.path
        try:
            self.store.download(artifact.path, path, max_bytes=artifact.bytes)
        except FileNotFoundError:
            raise DataError([Problem(artifact.path, "was published by an earlier attempt and is gone")]) from None
        if hash_file(path) != artifact.sha256:
            raise DataError([Problem(artifact.path, "is not what an earlier attempt published: its SHA-256 differs")])
        return path

    def record(self, outcome: str) -> AttemptRecord:
        """This attempt's line in the ledger, as of now; `running` has no end."""
        return AttemptRecord(
            number=self.number,
            started=self.started,
            finished=None if outcome == "running" else now(),
            outcome=outcome,
            seconds=time.monotonic() - self._began,
            stage_seconds=dict(self.stage_seconds),
            steps=self.steps,
            repeated_steps=self.repeated_steps,
            last_step=self.last_step,
        )

    def note(self, outcome: str) -> None:
        """Puts the line into the store."""
        self._noted = time.monotonic()
        data = TypeAdapter(AttemptRecord).dump_json(self.record(outcome), indent=2)
        self.store.write(_ledger_key(self.number), data)


def missing(store: ObjectStore, artifacts: Iterable[Artifact]) -> list[str]:
    """Those of the artefacts, by path, that the store does not have, or not in their size."""
    sizes = {artifact.path: artifact.bytes for artifact in artifacts}
    found = {info.key: info.bytes for info in store.list("artifacts/")} if sizes else {}
    return [path for path, size in sizes.items() if found.get(path) != size]


@contextmanager
def open_attempt(
    store: ObjectStore,
    settings: Mapping[str, Any],
    *,
    cache: str | None,
    stop: Stop,
    beat: Callable[[], None],
    faults: Faults,
) -> Iterator[Attempt]:
    """Takes the run's lease and begins its next attempt; writes the attempt's end into the ledger.

    Args:
        store: The run's own.
        settings: Value by dotted name of the settings that decide the result; an earlier attempt's must be the same.
        cache: Folder for temporary files; None for the system's.
        stop: The flag.
        beat: Tells the watchdog that the attempt gets on.
        faults: What to rehearse.

    Raises:
        Replaced: Another attempt took the run over.
        SettingsError: The run began with other settings.
    """
    compare_settings(store, settings)
    lease = take(store, platform.node() or "unknown")
    guarded_store = guarded(store, lease)
    log.bind(attempt=lease.epoch)
    if cache is not None:
        Path(cache).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qlora-job-", dir=cache, ignore_cleanup_errors=True) as work:
        attempt = Attempt(guarded_store, Path(work), lease.epoch, stop, beat, faults, _ledger(store, lease.epoch))
        attempt.note("running")
        try:
            yield attempt
        except Replaced:
            raise  # whoever took over keeps the books
        except BaseException as error:
            _note_failure(attempt, error)
            raise
        attempt.note("complete")


def _note_failure(attempt: Attempt, error: BaseException) -> None:
    """Writes how the attempt ended; a store that does not take it must not hide why."""
    outcome = next((word for kind, word in OUTCOMES.items() if isinstance(error, kind)), "crashed")
    try:
        attempt.note(outcome)
    except JobError as failure:
        log.get_logger().warning("the end of the attempt cannot be noted", why=str(failure))


def _ledger_key(number: int) -> str:
    return f"attempts/{number:04d}.json"


def _ledger(store: ObjectStore, epoch: int) -> list[AttemptRecord]:
    """What is known of the attempts before this one; one that is still noted as running was killed."""
    adapter = TypeAdapter(AttemptRecord)
    kept = [stored for number in range(1, epoch) if (stored := store.read(_ledger_key(number))) is not None]
    records = [adapter.validate_json(stored.data) for stored in kept]
    return [replace(record, outcome="killed") if record.outcome == "running" else record for record in records]


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
