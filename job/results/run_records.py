"""Reads the records of a run from its store: lease, attempts, checkpoints, finished stages, manifest.

While it makes progress, an attempt writes its record (`attempts/NNNN.json`) at most every 5 seconds, with its stage and
the figures of the last optimizer step (`runs.run_log.Noted`). Runs on S3 and local runs are therefore read alike.
Records of earlier versions lack these figures. Nothing is written. What the records mean is decided in `status.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from job.checkpoints import checkpoint_store
from job.checkpoints.commit_marker import parse_marker
from job.common.formatting import count, timestamp
from job.common.hashing import unsealed
from job.common.validation import first_error
from job.errors import Problem, SettingsError
from job.records import Artifact
from job.runs import lease
from job.runs.attempt import missing
from job.runs.layout import (
    ARTIFACTS,
    EXPORTED_RUN,
    LEASE,
    RESULTS,
    SETTINGS,
    STAGES,
    Stage,
    attempt_key,
    attempt_number,
    marker_key,
    stage_key,
)
from job.runs.run_log import LoggedAttempt, Noted, parse_exported_run, parse_logged
from job.runs.run_settings import parse_settings
from job.storage.base import read_record
from job.storage.open import ObjectStore, is_remote

_READ_BACK = 20
"""Maximum number of attempts whose records are read, newest first, for the last end and the last step."""
_LOOKED_AT = 10_000
"""Maximum number of objects that are listed to find runs below a folder that is not a run."""
_BESIDE = 5
"""Maximum number of runs that are named beside a folder that is not a run."""


@dataclass(frozen=True)
class RunRecords:
    """The records of a run; those that are damaged are left out.

    Attributes:
        uri: Path or URI of the run's folder.
        newest: Number of the newest attempt; 0 if there is none.
        lease: The lease; None if there is none.
        attempts: Records of attempts by number, newest first: at most 20, back to the first that is older than the
            newest and had a step.
        checkpoints: Steps of the checkpoints with a valid commit marker, newest first. Their files are not read.
        stages_done: The stages with a record, in their order.
        exported_run: Id of the finished run that this one exports; None if it exports none.
        manifest: The manifest; None if there is none.
        training: Figures of finished training, from the manifest or the stage's record; None if it is not finished.
        problems: The damaged records.
    """

    uri: str
    newest: int = 0
    lease: lease.LeaseRecord | None = None
    attempts: Mapping[int, LoggedAttempt] = field(default_factory=dict)
    checkpoints: tuple[int, ...] = ()
    stages_done: tuple[str, ...] = ()
    exported_run: str | None = None
    manifest: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing of a run, not even a damaged record."""
        return not self.newest and self.manifest is None and not self.problems


def read_run_records(store: ObjectStore) -> RunRecords:
    """Reads the records of the run in a store.

    Raises:
        AccessDenied: The store denies access.
        Unreachable: The store cannot be reached.
    """
    problems: list[Problem] = []
    holder = _parsed(store, LEASE, _parse_lease, problems)
    numbers = lease.attempt_numbers(store)
    newest = max([*numbers, holder.epoch if holder else 0])
    manifest = _read_manifest(store, problems)
    if not newest and manifest is None and not problems:
        return RunRecords(store.uri)
    exported = _parsed(store, stage_key(EXPORTED_RUN), parse_exported_run, problems)
    _parsed(store, SETTINGS, parse_settings, problems)  # read for its damage alone
    return RunRecords(
        uri=store.uri,
        newest=newest,
        lease=holder,
        attempts=_read_attempts(
            store, [number for number in reversed(numbers) if number <= newest][:_READ_BACK], problems
        ),
        checkpoints=_read_checkpoints(store, problems),
        stages_done=_read_stages_done(store),
        exported_run=None if exported is None else exported.id,
        manifest=manifest,
        training=_read_training(store, manifest),
        problems=tuple(problems),
    )


def last_note(logged: LoggedAttempt) -> Noted:
    """When an attempt wrote its record, and in which stage; estimated for records of earlier versions."""
    if logged.noted is not None:
        return logged.noted
    record = logged.record
    noted_at = parse_time(record.started) + timedelta(seconds=record.seconds)
    return Noted(record.finished or timestamp(noted_at), next(reversed(record.stage_seconds), None))


def parse_time(text: str) -> datetime:
    """A time of a record, in UTC.

    Raises:
        ValueError: It is not a time, or beyond the calendar.
    """
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except OverflowError as error:  # on the first or the last day of the calendar
        raise ValueError(str(error)) from None


def gate_passed(manifest: Mapping[str, Any]) -> bool | None:
    """Whether the quality gate is met; None without a gate.

    Raises:
        KeyError, TypeError: It is not a manifest of this job.
    """
    passed = manifest["gate"]["passed"]
    return passed if isinstance(passed, bool) else None


Place = Literal["missing", "empty", "other-files"]
"""What is at a place without a run: no folder, or no object below a URI; an empty folder; files of something else."""


def place_without_run(store: ObjectStore) -> Place:
    """What is at a place that has no records of a run.

    Raises:
        SettingsError: The folder contains runs: its path was given instead of the path of a run.
    """
    place: Place = "empty" if not is_remote(store.uri) and Path(store.uri).is_dir() else "missing"
    for info in islice(store.list(), _LOOKED_AT):
        place = "other-files"
        folder, _, key_in_folder = info.key.partition("/")
        if key_in_folder in {RESULTS, LEASE} or attempt_number(key_in_folder) is not None:
            what = f"contains runs, but is not a run itself; give one of them, such as {store.uri}/{folder}"
            raise SettingsError([Problem(store.uri, what)])
    return place


def runs_beside(folder: str) -> tuple[str, ...]:
    """Up to five runs in the folder above a local one, the newest first; none where they cannot be listed."""
    if is_remote(folder):
        return ()
    try:
        runs = [path.parent for path in Path(folder).parent.glob(f"*/{LEASE}")]
        return tuple(str(path) for path in sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True)[:_BESIDE])
    except OSError:
        return ()


def _parsed(store: ObjectStore, key: str, parse: Any, problems: list[Problem]) -> Any:
    """The parsed file; None if it is missing, or damaged, which is added to `problems`."""
    if (stored := read_record(store, key)) is None:
        return None
    try:
        return parse(stored.data)
    except ValueError as error:
        problems.append(Problem(f"{store.uri}/{key}", first_error(error)))
        return None


def _read_attempts(store: ObjectStore, numbers: list[int], problems: list[Problem]) -> dict[int, LoggedAttempt]:
    """Records of attempts by number, newest first, back to the first that is older than the newest and had a step."""
    records: dict[int, LoggedAttempt] = {}
    for number in numbers:
        logged = _parsed(store, attempt_key(number), _parse_logged, problems)
        if logged is not None:
            records[number] = logged
        if len(records) > 1 and any(record.noted and record.noted.training for record in records.values()):
            break
    return records


def _parse_logged(data: bytes) -> LoggedAttempt:
    """Parses an attempt's record, and checks that its times can be read.

    Raises:
        ValueError: The data is not a record of this kind, or was changed.
    """
    logged = parse_logged(data)
    try:
        parse_time(last_note(logged).at)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"has times that cannot be read: {error}") from None
    return logged


def _parse_lease(data: bytes) -> lease.LeaseRecord:
    """Parses a lease, and checks that its time can be read.

    Raises:
        ValueError: The data is not a lease, or was changed.
    """
    record = lease.parse(data)
    parse_time(record.started)
    return record


def _read_manifest(store: ObjectStore, problems: list[Problem]) -> dict[str, Any] | None:
    """The manifest; None if it is missing or damaged. Only the sizes of the files that it lists are compared."""
    manifest: dict[str, Any] | None = _parsed(store, RESULTS, unsealed, problems)
    if manifest is None:
        return None
    try:
        artifacts = [Artifact(**entry) for entry in manifest["artifacts"]]
        gate_passed(manifest)
    except (KeyError, TypeError) as error:
        problems.append(Problem(f"{store.uri}/{RESULTS}", f"is not a manifest of this job: {error}"))
        return None
    if missing_files := missing(store, artifacts):
        what = (
            f"{count(len(missing_files), 'published file')} missing, or of another size than in {RESULTS}, "
            f"such as {missing_files[0]}"
        )
        problems.append(Problem(f"{store.uri}/{ARTIFACTS}", what))
    return manifest


def _read_training(store: ObjectStore, manifest: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The figures of finished training; None if training is not finished."""
    facts: Any = manifest
    if facts is None:
        stored = read_record(store, stage_key(Stage.TRAIN))
        try:
            facts = {} if stored is None else unsealed(stored.data)
        except ValueError:
            facts = {}  # a damaged record: the next attempt ignores it, too
    training = facts.get("training")
    return training if isinstance(training, dict) else None


def _read_checkpoints(store: ObjectStore, problems: list[Problem]) -> tuple[int, ...]:
    steps = checkpoint_store.steps(store)
    return tuple(step for step in steps if _parsed(store, marker_key(step), parse_marker, problems) is not None)


def _read_stages_done(store: ObjectStore) -> tuple[str, ...]:
    keys = {info.key for info in store.list(STAGES)}
    return tuple(stage.value for stage in Stage if stage_key(stage) in keys)
