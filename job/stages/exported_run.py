"""JOB_EXPORT__RUN: a run that exports a finished one takes over its stages, instead of training again.

The new run has the same settings, those of exports apart, which decide nothing of what is taken over. So its results
are those that the finished run would have had with these exports: adapter, evaluations and their records are the same
bytes; only the fingerprint in the records (`runs.stage_records`) becomes that of the new run, which has other exports.

What is copied is compared with the hashes in the finished run's manifest. Checkpoints are not copied: nothing trains.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from job import log
from job.common.hashing import sealed, unsealed
from job.common.validation import adapter_of
from job.errors import DataError, Problem, SettingsError, VerificationError, environment_name
from job.records import Artifact, ExportedRun, Pulled
from job.results.reader import PublishedRun, open_run, read_published
from job.runs import stage_records
from job.runs.layout import (
    DERIVED_EXPORT,
    EXPORTED_RUN,
    FINDINGS,
    FIRST_STAGE,
    SETTINGS,
    STAGES,
    UPLOADED,
    Stage,
    attempt_key,
    stage_key,
)
from job.runs.open_attempt import TakeOver
from job.runs.run_log import parse_logged
from job.runs.run_settings import parse_settings
from job.settings.affects_result import affects_result, decisive_settings, default_settings
from job.settings.load import Settings, describe, plain_values, preset_values
from job.settings.training_stages import folder_of
from job.storage.base import upload_in_turn, write_in_turn
from job.storage.open import ObjectStore, StorageOptions, is_key, open_store
from job.storage.verified_download import fetch_artifact

SETTING = "JOB_EXPORT__RUN"
_LONGEST_ID = 128
_EXPORT, _GATE = "export.", "gate."
_NOT_TAKEN = {stage_key(Stage.EXPORT), stage_key(UPLOADED), stage_key(EXPORTED_RUN)}


def settings_of_run(settings: Settings, storage: StorageOptions) -> dict[str, object]:
    """The settings of the run in JOB_EXPORT__RUN that hold for this one, where it is given no others, by dotted name.

    They are those that decide the result, and what the gate requires; not what is exported, nor how the job runs on its
    machine. Those that the preset gives in this version, too, come from it. `run.id` is a new one.

    Args:
        settings: Those that were given, with JOB_EXPORT__RUN among them.
        storage: How to reach the store.

    Raises:
        SettingsError: There is no finished run, or it is this one.
        DataError: Its manifest is not what the job wrote, or missing.
    """
    run = _read_run(settings, storage)
    if run.store.uri == open_store(folder_of(settings), storage).uri:
        raise SettingsError([Problem(SETTING, "is this run itself; give this one another JOB_RUN__ID")])
    values = {name: entry["value"] for name, entry in run.results["settings"].items()}
    preset = str(values.get("preset"))
    given = {name: value for name, value, _ in describe(Settings())} | preset_values(preset)
    taken = {name: value for name, value in values.items() if name in given and _is_taken_over(name)}
    own = {"preset": preset, "run.id": _id_of_export(run.id, settings.export.formats)}
    return own | {name: value for name, value in taken.items() if value != given[name]}


def _id_of_export(run: str, formats: Sequence[str]) -> str:
    """The new run's id, where none is given: the same at every start, so that the run resumes."""
    return "-".join([run, *formats]).replace(":", "-")[-_LONGEST_ID:].lstrip("._-")


def _is_taken_over(name: str) -> bool:
    if name.startswith(_EXPORT):
        return False
    return affects_result(name) or (name.startswith(_GATE) and name != "gate.on")


def _read_run(settings: Settings, storage: StorageOptions) -> PublishedRun:
    with _named():
        return read_published(open_run(str(settings.export.run), storage))


def take_over(settings: Settings, storage: StorageOptions) -> TakeOver | None:
    """How this run takes over the one in JOB_EXPORT__RUN; None if that is empty, or has been taken over already.

    Raises:
        SettingsError: There is no finished run, or settings differ from those of that run.
        DataError: Its files are not what its manifest says.
    """
    if settings.export.run is None:
        return None
    own = open_store(folder_of(settings), storage)
    if own.tag(SETTINGS) is not None:
        return None
    run = _read_run(settings, storage)
    pull = stage_key(Stage.PULL)
    with _named():
        before = parse_settings(_read_whole(run, SETTINGS))
        pulled, _ = stage_records.parse(pull, _read_whole(run, pull), adapter_of(Pulled))
    after = _with_own_exports(before, json.loads(json.dumps(decisive_settings(plain_values(settings)))), run.id)
    fingerprints = (stage_records.fingerprint(before, pulled), stage_records.fingerprint(after, pulled))
    return TakeOver(after, run.results["run"]["attempts"][-1]["number"], partial(_copy, run, fingerprints))


def _with_own_exports(before: Mapping[str, Any], own: Mapping[str, Any], run: str) -> dict[str, Any]:
    """The settings of the finished run with the exports of this one.

    Raises:
        SettingsError: Another setting differs, so that what the run finished is not what this one would.
    """
    defaults = json.loads(json.dumps(default_settings()))
    expected = {
        name: before.get(name, defaults.get(name)) for name in {**own, **before} if not name.startswith(_EXPORT)
    }
    if changed := sorted(name for name in expected if expected[name] != own.get(name)):
        what = "is {!r}, but {!r} in the run that is exported; remove it, then it is taken from there"
        problems = [Problem(environment_name(name), what.format(own.get(name), expected[name])) for name in changed]
        raise SettingsError(problems, advice=f"only exports may differ from those of {run}; else train again")
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
        check_stop: Called between files.

    Raises:
        DataError: A file is missing, or not what the manifest says.
    """
    results, folder = run.results, work / "exported-run"
    log.get_logger().info("taking over a finished run, to export it", run=run.store.uri)
    records, key = dict[str, bytes](), stage_key(EXPORTED_RUN)
    with _named():
        for entry in results["evidence"]:
            check_stop()
            if entry["path"].endswith(".json") and _is_of_stage(entry["path"]):
                records[entry["path"]] = _fetch(run, entry, folder).read_bytes()
            elif _is_of_stage(entry["path"]):
                upload_in_turn(store, _fetch(run, entry, folder), entry["path"])
        published = {path for record in records.values() for path in _artifacts_in(record)} | {FINDINGS}
        for entry in results["artifacts"]:
            check_stop()
            if entry["path"] in published:
                upload_in_turn(store, _fetch(run, entry, folder), entry["path"])
        _copy_first_stage(run, store, folder, check_stop)
        for path, record in [*records.items(), *_attempts(run)]:
            check_stop()
            write_in_turn(store, path, _with_fingerprint(record, *fingerprints), store.tag(path))
    shutil.rmtree(folder, ignore_errors=True)
    exported = json.dumps(asdict(ExportedRun(run.id, run.sha256, results["run"]["attempts"][-1]["number"])))
    write_in_turn(store, key, stage_records.render(key, exported, fingerprints[1], attempt), store.tag(key))


def _copy_first_stage(run: PublishedRun, store: ObjectStore, folder: Path, check_stop: Callable[[], None]) -> None:
    """Copies the folder of a first stage as it is: a whole run, whose manifest has the hashes of its files."""
    for path in [info.key for info in run.store.list(FIRST_STAGE) if is_key(info.key)]:
        check_stop()
        run.store.download(path, folder / path)
        upload_in_turn(store, folder / path, path)
        (folder / path).unlink()


def _attempts(run: PublishedRun) -> Iterator[tuple[str, bytes]]:
    """(key, content) of the records of the attempts."""
    for attempt in run.results["run"]["attempts"]:
        key = attempt_key(attempt["number"])
        record = _read_whole(run, key)
        if parse_logged(record).record.number != attempt["number"]:
            raise DataError([Problem(f"{run.store.uri}/{key}", "is the record of another attempt")])
        yield key, record


def _with_fingerprint(record: bytes, before: str, own: str) -> bytes:
    """A record with this run's fingerprint in place of the finished run's; those of earlier versions have none."""
    if json.loads(record).get(stage_records.RUN) != before:
        return record
    return sealed({**unsealed(record), stage_records.RUN: own})


def _is_of_stage(path: str) -> bool:
    """Whether a file is the record of a stage that is taken over, or belongs to one."""
    return path.startswith(STAGES) and path not in _NOT_TAKEN and not path.startswith(f"{STAGES}{DERIVED_EXPORT}")


def _artifacts_in(record: bytes) -> list[str]:
    return [artifact["path"] for artifact in json.loads(record).get("artifacts", ())]


def _fetch(run: PublishedRun, entry: Mapping[str, Any], folder: Path) -> Path:
    """A verified copy of a file in the manifest."""
    if not is_key(entry["path"]):
        raise DataError([Problem(run.store.uri, f"lists {entry['path'][:200]!r}, which is no path in a run")])
    return fetch_artifact(run.store, Artifact(**entry), folder)


def _read_whole(run: PublishedRun, key: str) -> bytes:
    """A small file, compared with its hash if the manifest has one."""
    hashes = {entry["path"]: entry["sha256"] for entry in run.results["evidence"]}
    stored = run.store.read(key)
    if stored is None:
        raise DataError([Problem(f"{run.store.uri}/{key}", "is missing")])
    if key in hashes and hashlib.sha256(stored.data).hexdigest() != hashes[key]:
        raise DataError([Problem(f"{run.store.uri}/{key}", "is damaged: its SHA-256 is not that of the manifest")])
    return stored.data


@contextmanager
def _named() -> Iterator[None]:
    """Names the setting in what is wrong with the run that it gives; a fault of its files is one of data."""
    try:
        yield
    except (SettingsError, VerificationError, DataError) as error:
        kind = SettingsError if isinstance(error, SettingsError) else DataError
        raise kind([Problem(SETTING, str(problem)) for problem in error.problems]) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError([Problem(SETTING, f"its records cannot be read: {str(error)[:200]}")]) from None
