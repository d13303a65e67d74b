"""JOB_EXPORT__RUN: a run that exports a finished one takes over its stages, instead of training again.

The new run has the same settings, except those of exports, which affect nothing that is taken over. So its results are
those that the finished run would have had with these exports. Adapter, evaluations and their records are the same
bytes; only the fingerprint in the records (`runs.stage_records`) becomes that of the new run, which has other exports.

What is copied is compared with the hashes in the finished run's manifest. Checkpoints are not copied: nothing trains.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from job import log
from job.checkpoints.commit_marker import parse_marker
from job.common.hashing import sealed, unsealed
from job.common.validation import adapter_of
from job.errors import AccessDenied, DataError, Problem, SettingsError, VerificationError, environment_name
from job.records import Artifact, ExportedRun, Pulled, RecordedSettings
from job.results.inventory import artifacts_of, evidence_of, is_leftover, is_marker
from job.results.promotion import open_run_or_pointer
from job.results.reader import PublishedRun, read_published
from job.runs import stage_records
from job.runs.attempt import Attempt
from job.runs.layout import (
    ARTIFACTS,
    DERIVED_EXPORT,
    EXPORTED_RUN,
    FINDINGS,
    FIRST_STAGE,
    FIRST_TENSORS,
    LEASE,
    RESULTS,
    SETTINGS,
    STAGES,
    UPLOADED,
    Stage,
    attempt_key,
    stage_key,
)
from job.runs.lease import MAX_EPOCH
from job.runs.open_attempt import TakeOver
from job.runs.run_log import parse_logged, read_exported_run
from job.runs.run_settings import parse_settings
from job.storage.base import upload_in_turn, write_in_turn
from job.storage.open import ObjectStore, StorageOptions, TooLarge, download_listed, is_key, open_store
from job.storage.verified_download import altered, fetch_artifact

SETTING = "JOB_EXPORT__RUN"
_EXPORT = "export."
_NOT_COPIED = {stage_key(Stage.EXPORT), stage_key(UPLOADED), stage_key(EXPORTED_RUN)}


def recorded_settings(run: str, storage: StorageOptions) -> RecordedSettings:
    """The settings of the run in JOB_EXPORT__RUN.

    Args:
        run: Path or URI of it.
        storage: How to reach the store.

    Raises:
        SettingsError: There is no finished run.
        DataError: Its manifest is not what the job wrote, or missing.
    """
    published = read_exported(run, storage)
    values = {name: entry["value"] for name, entry in published.results["settings"].items()}
    beside = published.store.uri.rpartition("/")[0]
    if "part_of" in published.results["run"]:  # a first stage lies in the folder of its run, which admits no other
        beside = beside.rpartition("/")[0]
    return RecordedSettings(published.id, beside, values)


def read_exported(run: str, storage: StorageOptions) -> PublishedRun:
    """The run in JOB_EXPORT__RUN.

    Args:
        run: Path or URI of it, or of a pointer to it.
        storage: How to reach the store.

    Raises:
        SettingsError: There is no finished run.
        DataError: Its manifest is not what the job wrote, or missing.
    """
    with _naming_the_setting():
        return read_published(open_run_or_pointer(run, storage))


def take_over(
    published: PublishedRun,
    own_folder: str,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    storage: StorageOptions,
) -> TakeOver | None:
    """How this run takes over a finished one; None if it has done so already, and no settings can change any more.

    Args:
        published: The finished run, from `read_exported`.
        own_folder: Folder of this run.
        settings: Value by dotted name of the settings of this run that decide the result.
        defaults: Their defaults, which count for what an earlier version did not have as a setting.
        storage: How to reach the stores.

    Raises:
        SettingsError: Settings differ from those of that run, this run has begun with another one, or would lie in
            the folder of a run.
        DataError: Its files are not what its manifest says.
    """
    pull, own_store = stage_key(Stage.PULL), open_store(own_folder, storage)
    begun = any(own_store.tag(key) is not None for key in (SETTINGS, RESULTS))
    _check_same_run(own_store, published, begun=begun)
    if begun:
        return None
    _check_place(own_store, published, storage)
    with _naming_the_setting():
        before = parse_settings(_read_whole(published, SETTINGS))
        pulled, _ = stage_records.parse(pull, _read_whole(published, pull), adapter_of(Pulled))
    own, defaults = (json.loads(json.dumps(values)) for values in (settings, defaults))
    after = _with_own_exports(before, own, defaults, published.id)
    fingerprints = (stage_records.fingerprint(before, pulled), stage_records.fingerprint(after, pulled))
    last = max(attempt["number"] for attempt in published.results["run"]["attempts"])
    if last >= MAX_EPOCH - 1:
        raise DataError([Problem(SETTING, f"its manifest has an attempt {last}, after which there can be no other")])
    return TakeOver(after, last, partial(_copy, published, fingerprints))


def refuse_without(own_store: ObjectStore) -> None:
    """Refuses to train in a folder into which a finished run was being copied: its manifest would name that run.

    Args:
        own_store: The store of a run without JOB_EXPORT__RUN.

    Raises:
        SettingsError: An attempt began to take over a finished run, and did not get as far as to keep settings.
    """
    if own_store.tag(stage_key(EXPORTED_RUN)) is not None and own_store.tag(SETTINGS) is None:
        what = f"is not set, but the run in {own_store.uri} has begun to export a finished one; set it again, or give "
        raise SettingsError([Problem(SETTING, f"{what}this run another JOB_RUN__ID")])


def refuse_training(attempt: Attempt, run: str | None) -> None:
    """Refuses to train in a run that exports a finished one, and lacks the record of its training.

    Args:
        attempt: At the run.
        run: `JOB_EXPORT__RUN`.

    Raises:
        DataError: This run exports a finished one, now or in an attempt before, or the record of that is damaged.
    """
    if run is not None or read_exported_run(attempt.store) is not None:
        what = "its adapter was taken over, and is missing or damaged here; remove the folder "
        what += f"{attempt.store.uri}, and export again"
        raise DataError([Problem(SETTING, what)])


def _check_same_run(own: ObjectStore, run: PublishedRun, *, begun: bool) -> None:
    """Refuses a run that has begun with another one, or to train: both would give results that are not the run's.

    The settings do not say it: the same ones with other data, or on another machine, give another adapter.

    Raises:
        SettingsError: It has.
        DataError: Its record of the run that it exports is damaged.
    """
    other_id = "give this one another JOB_RUN__ID"
    record = read_exported_run(own)
    if record is None:
        if begun:
            what = f"is not exported by the run in {own.uri}, which trains, or has trained, by itself; {other_id}"
            raise SettingsError([Problem(SETTING, what)])
        return
    if record.results_sha256 != run.sha256:
        what = f"is another run than the one that {own.uri} exports, {record.id}: its results.json differs; {other_id}"
        raise SettingsError([Problem(SETTING, what)])


def _check_place(own: ObjectStore, run: PublishedRun, storage: StorageOptions) -> None:
    """Refuses a folder in that of a run, or around the finished one: with files of another, a run does not verify.

    Raises:
        SettingsError: It is such a folder.
    """
    mine, theirs = f"{own.uri}/", f"{run.store.uri}/"
    in_another = any(_has_run(folder, storage) for folder in _folders_around(own.uri))
    if in_another or mine.startswith(theirs) or theirs.startswith(mine):
        what = f"puts this run into {own.uri}, which is in the folder of another run, or has one in it, and a run with "
        what += "files of another one does not verify; give another folder"
        raise SettingsError([Problem("JOB_RUN__OUTPUT", what)])


def _folders_around(uri: str) -> Iterator[str]:
    """The folders in which a place is, the innermost first, up to the bucket, or to the one below the disk's root."""
    while (uri := uri.rpartition("/")[0]) and not uri.endswith("/"):
        yield uri


def _has_run(folder: str, storage: StorageOptions) -> bool:
    """Whether a run has begun in a folder; not where access is denied, which may be limited to this run's own one."""
    try:
        return open_store(folder, storage).tag(LEASE) is not None
    except AccessDenied:
        return False


def _with_own_exports(
    before: Mapping[str, Any], own: Mapping[str, Any], defaults: Mapping[str, Any], run: str
) -> dict[str, Any]:
    """The settings of the finished run (`before`), with those of exports from the new run (`own`).

    Raises:
        SettingsError: Another setting differs, so that what the run finished is not what this one would.
    """
    expected = {
        name: before.get(name, defaults.get(name)) for name in {**own, **before} if not name.startswith(_EXPORT)
    }
    if changed := sorted(name for name in expected if expected[name] != own.get(name)):
        what = "is {!r}, but {!r} in the run that is exported; remove it, then it is taken from there"
        problems = [Problem(environment_name(name), what.format(own.get(name), expected[name])) for name in changed]
        advice = f"only exports, the gate and what concerns the machine may differ from {run}; relative paths begin at "
        advice += "the folder in which the command is run, so run it where that run was started"
        raise SettingsError(problems, advice=advice)
    kept = {name: value for name, value in before.items() if not name.startswith(_EXPORT)}
    return kept | {name: value for name, value in own.items() if name.startswith(_EXPORT)}


def _copy(
    run: PublishedRun,
    fingerprints: tuple[str, str],
    store: ObjectStore,
    work: Path,
    *,
    attempt: int,
    check_stop: Callable[[], None],
) -> None:
    """Copies what a finished run has finished into the store of this run, each file verified. May be repeated.

    Args:
        run: The finished run.
        fingerprints: Its, and that of this run.
        store: This run's store, fenced.
        work: Folder for temporary copies.
        attempt: Number of the attempt that copies.
        check_stop: Called before each file.

    Raises:
        DataError: A file is missing, or not what the manifest says.
    """
    results, folder = run.results, work / "exported-run"
    log.get_logger().info("copying the stages of the finished run that is exported", finished_run=run.store.uri)
    records, key = dict[str, bytes](), stage_key(EXPORTED_RUN)
    last = max(attempt["number"] for attempt in results["run"]["attempts"])
    before = results["run"].get("exported_run")
    earlier = [] if before is None else adapter_of(ExportedRun).validate_python(before).last_attempts
    exported = json.dumps(asdict(ExportedRun(run.id, run.sha256, last, earlier)))
    # first: so that an attempt after a kill copies no other run into what is there
    write_in_turn(store, key, stage_records.render(key, exported, fingerprints[1], attempt), store.tag(key))
    with _naming_the_setting():
        for file in filter(_is_of_stage, evidence_of(results)):
            check_stop()
            if file.path.endswith(".json"):
                records[file.path] = _fetch(run, file, folder).read_bytes()
            else:
                _copy_file(run, store, file, folder)
        published = {path for record in records.values() for path in _artifacts_in(record)} | {FINDINGS}
        for file in artifacts_of(results):
            if file.path in published:
                check_stop()
                _copy_file(run, store, file, folder)
        _copy_first_stage(run, store, folder, check_stop)
        for path, record in [*records.items(), *_attempts(run)]:
            check_stop()
            write_in_turn(store, path, _with_fingerprint(record, *fingerprints), store.tag(path))
    shutil.rmtree(folder, ignore_errors=True)


def _copy_first_stage(run: PublishedRun, store: ObjectStore, folder: Path, check_stop: Callable[[], None]) -> None:
    """Copies the folder of a first stage, a whole run; what its records have the hashes of is verified.

    Raises:
        DataError: A file is missing, or not what the records say.
    """
    first = run.results["training"].get("first_stage")
    if first is None:
        return
    manifest = _read_whole(run, f"{FIRST_STAGE}{RESULTS}", first["results_sha256"])
    results = json.loads(manifest)
    hashed = {file.path: file for file in (*evidence_of(results), *artifacts_of(results))}
    for path in [path for path in hashed if is_marker(path)]:
        marker = parse_marker(_read_whole(run, f"{FIRST_STAGE}{path}", hashed[path].sha256))
        hashed |= {
            name: Artifact(name, file.bytes, file.sha256)
            for name, file in ((marker.folder + name, file) for name, file in marker.files.items())
        }
    files = [replace(artifact, path=f"{FIRST_STAGE}{path}") for path, artifact in hashed.items()]
    for file in files:
        check_stop()
        _copy_file(run, store, file, folder)
    # The others carry seals of their own, or are signatures.
    there, hashed_paths = list(run.store.list(FIRST_STAGE)), {file.path for file in files}
    for info in there:
        if not is_key(info.key) or info.key in hashed_paths or is_leftover(_below(info.key)):
            continue
        check_stop()
        download_listed(run.store, info, folder / info.key)
        upload_in_turn(store, folder / info.key, info.key)
        (folder / info.key).unlink()


def _below(path: str) -> str:
    return path.removeprefix(FIRST_STAGE)


def _attempts(run: PublishedRun) -> Iterator[tuple[str, bytes]]:
    """(key, content) of the records of the attempts."""
    for attempt in run.results["run"]["attempts"]:
        key = attempt_key(attempt["number"])
        record = _read_whole(run, key)
        logged = parse_logged(record)
        if logged.record.number != attempt["number"]:
            raise DataError([Problem(f"{run.store.uri}/{key}", "is the record of another attempt")])
        if logged.record.outcome == "running":  # killed after it had published: the manifest says that it was complete
            record = sealed({**attempt, stage_records.RUN: logged.run})
        yield key, record


def _with_fingerprint(record: bytes, before: str, own: str) -> bytes:
    """A record with this run's fingerprint in place of the finished run's; records of earlier versions have none."""
    if dict(json.loads(record)).get(stage_records.RUN) != before:
        return record
    return sealed({**unsealed(record), stage_records.RUN: own})


def _is_of_stage(file: Artifact) -> bool:
    """Whether a file is the record of a stage that is taken over, or belongs to one."""
    path = file.path
    return path.startswith(STAGES) and path not in _NOT_COPIED and not path.startswith(f"{STAGES}{DERIVED_EXPORT}")


def _artifacts_in(record: bytes) -> list[str]:
    """What a stage published; the adapter's first values are evidence.

    Raises:
        ValueError: It names another place, such as the lease.
    """
    paths = [str(artifact["path"]) for artifact in dict(json.loads(record)).get("artifacts", ())]
    if wrong := [path for path in paths if not path.startswith(ARTIFACTS) and path != FIRST_TENSORS]:
        raise ValueError(f"one lists {wrong[0][:200]!r}, which no stage publishes")
    return paths


def _fetch(run: PublishedRun, file: Artifact, folder: Path) -> Path:
    """A verified copy of a file in the manifest."""
    if not is_key(file.path):
        raise DataError([Problem(run.store.uri, f"lists {file.path[:200]!r}, which is no path in a run")])
    return fetch_artifact(run.store, file, folder)


def _copy_file(run: PublishedRun, store: ObjectStore, file: Artifact, folder: Path) -> None:
    """Copies a file of the manifest, unless an attempt before this one has done so."""
    if is_key(file.path) and not altered(store, [file], folder):
        return
    copy = _fetch(run, file, folder)
    upload_in_turn(store, copy, file.path)
    copy.unlink()  # the disk need not hold the run twice


def _read_whole(run: PublishedRun, key: str, sha256: str | None = None) -> bytes:
    """A small file, compared with its hash: the one that is given, or else the manifest's if it has one."""
    expected = sha256 or {file.path: file.sha256 for file in evidence_of(run.results)}.get(key)
    stored = run.store.read(key)
    if stored is None:
        raise DataError([Problem(f"{run.store.uri}/{key}", "is missing")])
    if expected is not None and hashlib.sha256(stored.data).hexdigest() != expected:
        raise DataError([Problem(f"{run.store.uri}/{key}", "is damaged: its SHA-256 is not that of the manifest")])
    return stored.data


@contextmanager
def _naming_the_setting() -> Iterator[None]:
    """Context manager: errors about the finished run begin with the setting; damaged files are a DataError."""
    try:
        yield
    except (SettingsError, VerificationError, DataError) as error:
        kind = SettingsError if isinstance(error, SettingsError) else DataError
        raise kind([Problem(SETTING, str(problem)) for problem in error.problems]) from None
    except (ValueError, KeyError, TypeError, TooLarge) as error:
        raise DataError([Problem(SETTING, f"its records cannot be read: {str(error)[:200]}")]) from None
