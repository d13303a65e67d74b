"""Durable checkpoints: a checkpoint exists when its commit marker does, and is used only when every byte is right.

    checkpoints/step-00000040/0003/<files>     first, in the attempt's own folder: 0003 is its epoch
    checkpoints/step-00000040/COMMITTED.json   last: sizes and SHA-256 of the files, step, epoch, software

No attempt writes a file where another one does, so a late request of an attempt that was replaced can damage nothing.
Restoring goes back from the newest marker to the first checkpoint that is intact. Training starts from step 0 only if
the store confirms that there is no checkpoint; an error of the store is raised.

A marker also names its run, by a hash of the settings, data and weights: a checkpoint of another run is not used.

Hashes and the marker's seal find accidents. They are no signature: whoever can write to the bucket can replace a whole
checkpoint, which can falsify numbers but never runs code.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from job.checkpoints.commit_marker import MAX_MARKER_BYTES, MarkedFile, Marker, parse_marker, render_marker
from job.common.disk import disk_errors
from job.common.hashing import hash_file
from job.errors import Unreachable
from job.log import get_logger
from job.runs.layout import CHECKPOINTS, COMMITTED, checkpoint_part, marker_key, step_name
from job.storage.base import write_in_turn
from job.storage.open import ObjectStore, TooLarge, is_key

# Bytes that a restore leaves free on the disk, for the checkpoints of later steps.
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class MarkerFields:
    """The attempt that writes checkpoints, as their markers describe it.

    Attributes:
        epoch: The lease's number of the attempt.
        world_size: Number of processes.
        software: Versions of this process.
        run: The run's fingerprint: a checkpoint is restored by attempts that have the same.
    """

    epoch: int
    world_size: int
    software: Mapping[str, str]
    run: str | None = None


def commit(store: ObjectStore, folder: Path, step: int, writer: MarkerFields) -> None:
    """Uploads the files of `folder`, then the marker. An attempt commits a step once.

    Raises:
        Replaced: Another attempt took the run over.
        Unreachable, AccessDenied: As the store says.
    """
    paths = sorted(folder.iterdir())
    files = {path.name: MarkedFile(bytes=path.stat().st_size, sha256=hash_file(path)) for path in paths}
    marker = Marker(
        step=step,
        epoch=writer.epoch,
        world_size=writer.world_size,
        software=dict(writer.software),
        files=files,
        run=writer.run,
    )
    for path in paths:
        store.upload(path, marker.folder + path.name)
    write_in_turn(store, marker_key(step), render_marker(marker), store.tag(marker_key(step)))


def steps(store: ObjectStore) -> list[int]:
    """Steps of the checkpoints that have a marker, newest first."""
    return [step for step, names in _files_by_step(store).items() if COMMITTED in names]


def prune(
    store: ObjectStore, keep: int, *, own_steps: Collection[int], verified: int, fresh: Collection[int] = ()
) -> None:
    """Deletes all but the newest `keep` usable checkpoints, each marker before its files.

    Args:
        store: The run's.
        keep: How many to keep, at least 1.
        own_steps: Steps that this attempt committed: they are usable.
        verified: Step that this attempt restored, 0 if none. Checkpoints up to it are usable. A later one that
            is not this attempt's own was incomplete when it began, or was written late by a replaced attempt.
        fresh: Steps committed so recently that a copy of the folder (SageMaker's in S3) may not have them yet. They
            are kept and not counted, so that an older checkpoint stays until they are copied.
    """
    files_by_step = _files_by_step(store)
    usable = [
        step for step, names in files_by_step.items() if COMMITTED in names and (step <= verified or step in own_steps)
    ]
    kept = {
        *[step for step in usable if step not in fresh][: max(keep, 1)],
        *(step for step in usable if step in fresh),
    }
    for step, names in files_by_step.items():
        # Without a usable one nothing is deleted: a person may still recover something from the rest.
        if kept and step not in kept:
            _delete(store, step, names)


def make_committer(
    store: ObjectStore,
    writer: MarkerFields,
    *,
    keep: int,
    settle_seconds: float,
    verified: int,
    on_committed: Callable[[int, float], None],
) -> Callable[[Path, int], None]:
    """Returns a function that uploads the folder of a step, commits it, and deletes checkpoints no longer needed.

    Args:
        store: The run's.
        writer: This attempt.
        keep: How many checkpoints to keep, at least 1.
        settle_seconds: For how long after its commit a checkpoint is `fresh` (see `prune`).
        verified: Step that this attempt restored, 0 if none.
        on_committed: Called with the step, and the seconds that all this took.
    """
    committed: dict[int, float] = {}

    def commit_and_prune(folder: Path, step: int) -> None:
        began = time.monotonic()
        commit(store, folder, step, writer)
        now = committed[step] = time.monotonic()
        fresh = [step for step, when in committed.items() if now - when < settle_seconds]
        prune(store, keep, own_steps=committed.keys(), verified=verified, fresh=fresh)
        on_committed(step, time.monotonic() - began)

    return commit_and_prune


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that cannot be used, and why."""

    step: int
    why: str


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint on the local disk, or none: then `folder` is None and `step` is 0.

    `skipped` are the newer ones that were not intact, newest first.
    """

    folder: Path | None
    step: int
    skipped: tuple[Skipped, ...]


def restore(
    store: ObjectStore,
    folder: Path,
    software: Mapping[str, str],
    check: Callable[[Path, int], None] = lambda _folder, _step: None,
    *,
    world_size: int = 1,
    run: str | None = None,
) -> Restored:
    """Downloads the newest intact checkpoint.

    Args:
        store: The run's.
        folder: The parent of the checkpoint's new folder.
        software: Versions of this process. A checkpoint of others is used, and the difference is logged: the run
            continues, but is no longer bit-identical to one that was never interrupted.
        check: Checks a folder with verified bytes, given its step; raises ValueError if it cannot be used.
        world_size: Number of processes now; that another number wrote a checkpoint is logged as well.
        run: The run's fingerprint; a checkpoint with another one is not used. None accepts any.

    Raises:
        JobError: Any error of the store except that an object does not exist; or the disk is too small.
    """
    skipped: list[Skipped] = []
    for step in steps(store):
        try:
            marker = _read_marker(store, step, run)
            target = _download(store, marker, folder, check)
        except UnusableCheckpoint as error:
            skipped.append(Skipped(step, str(error)))
            get_logger().warning("checkpoint is incomplete or damaged, trying an older one", step=step, why=str(error))
            continue
        written_with = marker.software
        if changed := sorted(k for k in software if written_with.get(k) != software[k]):
            versions = [f"{k} {written_with.get(k, 'unknown')} before, {software[k]} now" for k in changed]
            message = "checkpoint was written with other software versions: the last bits of the result may change"
            get_logger().warning(message, changed=versions)
        if marker.world_size != world_size:
            message = (
                "checkpoint was written by another number of processes: each step has the same examples, "
                "but the last bits change"
            )
            get_logger().warning(message, processes=world_size, before=marker.world_size)
        return Restored(target, step, tuple(skipped))
    if skipped:
        get_logger().error("no valid checkpoint: training starts again from step 0", skipped=[s.step for s in skipped])
    return Restored(None, 0, tuple(skipped))


class UnusableCheckpoint(Exception):
    """Why a checkpoint cannot be used."""


def delete_all_but_intact(store: ObjectStore, folder: Path, *, epoch: int, run: str | None, keep: int) -> list[Skipped]:
    """Deletes all checkpoints but the newest `keep` intact ones: the manifest lists every file that is left in the run.

    Restoring looks at the newest ones alone, and at none once training is done. Those that this attempt wrote are not
    read back: their hashes were taken from the files that it uploaded. Older ones are deleted as well: an earlier
    attempt that was suspended while it deleted them might finish doing so later.

    Args:
        store: The run's.
        folder: For copies, which are deleted.
        epoch: Number of this attempt.
        run: The run's fingerprint.
        keep: How many to keep, at least 1.

    Returns:
        Those that were not intact.

    Raises:
        JobError: Any error of the store except that an object does not exist; or the disk is too small.
    """
    damaged, valid = [], 0
    for step, names in _files_by_step(store).items():
        if COMMITTED not in names:
            continue
        try:
            if valid >= max(keep, 1):
                _delete(store, step, names)
                continue
            marker = _read_marker(store, step, run)
            if marker.epoch != epoch:
                shutil.rmtree(_download(store, marker, folder, lambda _folder, _step: None))
            valid += 1
        except UnusableCheckpoint as error:
            get_logger().warning("checkpoint is incomplete or damaged, and is deleted", step=step, why=str(error))
            _delete(store, step, names)
            damaged.append(Skipped(step, str(error)))
    return damaged


def _delete(store: ObjectStore, step: int, names: Iterable[str]) -> None:
    """Deletes a checkpoint, the marker before its files."""
    for name in sorted(names, key=lambda name: name != COMMITTED):
        store.delete(f"{CHECKPOINTS}{step_name(step)}/{name}")


def _download(store: ObjectStore, marker: Marker, folder: Path, check: Callable[[Path, int], None]) -> Path:
    """Downloads into a folder beside the final one, verifies every byte, and only then renames it.

    Args:
        store: The run's.
        marker: The checkpoint's.
        folder: The checkpoint becomes a folder in it.
        check: As for `restore`.

    Raises:
        UnusableCheckpoint: It cannot be used.
        JobError: Any error of the store except that an object does not exist; or the disk is too small.
    """
    target = folder / step_name(marker.step)
    partial = target.with_name(target.name + ".partial")
    with disk_errors(f"cannot restore a checkpoint into {folder}"):
        for old in (target, partial):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _check_sizes(store, marker, shutil.disk_usage(partial).free)
            for name, file in marker.files.items():
                _fetch_file(store, marker.folder + name, partial / name, file)
            _check_content(partial, marker.step, check)
            return partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_content(folder: Path, step: int, check: Callable[[Path, int], None]) -> None:
    try:
        check(folder, step)
    except ValueError as error:
        raise UnusableCheckpoint(f"its hashes match, but its content is invalid: {error}") from None


def _read_marker(store: ObjectStore, step: int, run: str | None) -> Marker:
    """Parses a marker, trusting nothing in it; the sizes it declares are checked against what is there.

    Raises:
        UnusableCheckpoint: It is none, is damaged, or of another step or run.
    """
    try:
        stored = store.read(marker_key(step), max_bytes=MAX_MARKER_BYTES)
    except TooLarge:
        raise UnusableCheckpoint(f"the marker has more than {MAX_MARKER_BYTES} bytes") from None
    if stored is None:
        raise UnusableCheckpoint("the marker is missing")
    try:
        marker = parse_marker(stored.data)
    except ValueError as error:
        raise UnusableCheckpoint(str(error)) from None
    if marker.step != step:
        raise UnusableCheckpoint(f"the marker is of step {marker.step}")
    if run is not None and marker.run not in {None, run}:
        raise UnusableCheckpoint("it was trained with other settings, data or weights than this run's")
    return marker


def _fetch_file(store: ObjectStore, key: str, path: Path, file: MarkedFile) -> None:
    try:
        store.download(key, path, max_bytes=file.bytes)
    except FileNotFoundError:
        raise UnusableCheckpoint(f"{path.name} is missing") from None
    except TooLarge:
        raise UnusableCheckpoint(f"{path.name} is larger than the marker says") from None
    if hash_file(path) != file.sha256:
        raise UnusableCheckpoint(f"{path.name} has another SHA-256 than the marker")


def _check_sizes(store: ObjectStore, marker: Marker, free: int) -> None:
    """Compares what is there with what the marker declares and with `free` bytes of disk, before any download.

    What the listing lacks is left to the download: only its 404 is a confirmed absence.
    """
    prefix = marker.folder
    sizes = {info.key.removeprefix(prefix): info.bytes for info in store.list(prefix)}
    total = 0
    for name, file in marker.files.items():
        size = sizes.get(name, 0)
        if name in sizes and size != file.bytes:
            raise UnusableCheckpoint(f"{name} has {size} bytes, the marker says {file.bytes}")
        total += size
    if total + SPARE_BYTES > free:
        raise Unreachable(
            f"{store.uri}: the checkpoint of step {marker.step} has {total} bytes and the disk {free} free; "
            "give the machine a larger disk, or set JOB_STORAGE__CACHE to a folder on one"
        )


def _files_by_step(store: ObjectStore) -> dict[int, list[str]]:
    """Names of the objects in every step's folder, newest step first."""
    files_by_step: dict[int, list[str]] = {}
    for info in store.list(CHECKPOINTS):
        if is_key(info.key) and (part := checkpoint_part(info.key)):
            files_by_step.setdefault(part[0], []).append(part[1])
    return dict(sorted(files_by_step.items(), reverse=True))
