"""One attempt at a run: its store and work folder, the stages that earlier attempts finished, and the ledger.

A stage is finished when `stages/<name>.json` exists: it holds what the stage found out, and the hashes of what it
published. A later attempt reads it instead of doing the work again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from job import log
from job.checkpoints import hash_file
from job.errors import DataError, JobError, Preempted, Problem, SettingsError
from job.objects import ObjectStore
from job.preemption import Stop
from job.records import Artifact, AttemptRecord

T = TypeVar("T")

OUTCOMES: Mapping[type[BaseException], str] = {Preempted: "preempted", JobError: "failed"}


def now() -> str:
    """The time, RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class Attempt:
    """What every stage needs. `steps` and `repeated_steps` are counted by the training stage."""

    store: ObjectStore
    work: Path
    number: int
    stop: Stop
    started: str
    stage_seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    last_step: int = 0
    repeated_steps: int = 0

    def alive(self) -> None:
        """Called wherever a stage gets on and stopping is safe: ends the stage if the job has to end."""
        self.stop.check()

    def step_done(self, step: int) -> None:
        """Counts an optimizer step."""
        self.steps += 1
        self.last_step = max(self.last_step, step)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Log lines within carry the stage's name, and its seconds are counted."""
        with log.stage(name):
            self.alive()
            began = time.monotonic()
            try:
                yield
            finally:
                self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + time.monotonic() - began

    def stage(self, name: str, kind: type[T], work: Callable[[], T]) -> T:
        """What the stage found out: read from its record if an earlier attempt finished it, else worked out now."""
        key = f"stages/{name}.json"
        kept = self.store.read(key)
        if kept is not None:
            log.get_logger().info("stage was finished by an earlier attempt", stage=name)
            return TypeAdapter(kind).validate_json(kept.data)
        with self.timed(name):
            log.get_logger().info("stage begins")
            result = work()
            self.store.write(key, TypeAdapter(kind).dump_json(result))
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

    def record(self, outcome: str, finished: str | None = None) -> AttemptRecord:
        """This attempt's line in the ledger."""
        return AttemptRecord(
            number=self.number,
            started=self.started,
            finished=finished,
            outcome=outcome,
            stage_seconds=dict(self.stage_seconds),
            steps=self.steps,
            repeated_steps=self.repeated_steps,
        )

    def write_record(self, outcome: str, finished: str | None = None) -> None:
        """Puts the line into the store."""
        data = TypeAdapter(AttemptRecord).dump_json(self.record(outcome, finished), indent=2)
        self.store.write(f"attempts/{self.number:04d}.json", data)

    def earlier(self) -> list[AttemptRecord]:
        """The ledger's lines of the attempts before this one."""
        keys = [f"attempts/{number:04d}.json" for number in range(1, self.number)]
        kept = [stored for key in keys if (stored := self.store.read(key)) is not None]
        return [TypeAdapter(AttemptRecord).validate_json(stored.data) for stored in kept]


@contextmanager
def open_attempt(
    store: ObjectStore, run_id: str, settings: Mapping[str, Any], stop: Stop, cache: str | None
) -> Iterator[Attempt]:
    """Begins the next attempt of a run and writes its end into the ledger.

    Args:
        store: The run's own.
        run_id: For the log.
        settings: Value by dotted name of the settings that decide the result; an earlier attempt's must be the same.
        stop: The flag.
        cache: Folder for temporary files; None for the system's.
    """
    _same_settings(store, run_id, settings)
    number = 1 + sum(1 for _ in store.list("attempts/"))
    with tempfile.TemporaryDirectory(prefix=f"qlora-job-{run_id}-", dir=cache, ignore_cleanup_errors=True) as work:
        attempt = Attempt(store, Path(work), number, stop, now())
        log.bind(attempt=number)
        attempt.write_record("running")
        try:
            yield attempt
        except BaseException as error:
            kind = next((name for name in OUTCOMES if isinstance(error, name)), None)
            attempt.write_record(OUTCOMES[kind] if kind else "crashed", now())
            raise
        attempt.write_record("complete", now())


def _same_settings(store: ObjectStore, run_id: str, settings: Mapping[str, Any]) -> None:
    """A run is one experiment: refuses an attempt whose settings would give another result."""
    kept = store.read("settings.json")
    if kept is None:
        store.write("settings.json", json.dumps(settings, indent=2).encode())
        return
    before = json.loads(kept.data)
    after = json.loads(json.dumps(settings))
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise SettingsError(
            [
                Problem(
                    name, f"run {run_id} began with {before.get(name)!r}, not {after.get(name)!r}; use another run.id"
                )
                for name in changed
            ]
        )
