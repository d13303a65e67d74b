"""Brings one checkpoint here, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from job.checkpoints import commit_marker
from job.checkpoints.commit_marker import Marker
from job.common.hashing import hash_file
from job.errors import Unreachable
from job.storage.base import disk_errors
from job.storage.open import ObjectStore, TooLarge

# Left on the disk after a restore, for the snapshots of the steps to come.
SPARE_BYTES = 64 << 20


class NotWhole(Exception):
    """Why a checkpoint cannot be used."""


def download(store: ObjectStore, step: int, folder: Path, check: Callable[[Path, int], None]) -> tuple[Path, Marker]:
    """Downloads into a folder beside the final one, verifies every byte, and only then gives it its name.

    Args:
        store: The run's.
        step: Which checkpoint.
        folder: The checkpoint becomes a folder in it.
        check: As for `checkpoints.restore`.

    Raises:
        NotWhole: It cannot be used.
        JobError: Whatever the store says, apart from absence; or the disk is too small.
    """
    marker = _read_marker(store, step)
    target = folder / f"step-{step:08d}"
    partial = target.with_name(target.name + ".partial")
    with disk_errors(f"cannot restore a checkpoint into {folder}"):
        for old in (target, partial):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _check_sizes(store, marker, shutil.disk_usage(partial).free)
            for name, file in marker.files.items():
                _fetch_file(store, commit_marker.files_prefix(marker) + name, partial / name, file)
            _check_content(partial, step, check)
            return partial.replace(target), marker
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_content(folder: Path, step: int, check: Callable[[Path, int], None]) -> None:
    try:
        check(folder, step)
    except ValueError as error:
        raise NotWhole(f"its bytes are right, its content is not: {error}") from None


def _read_marker(store: ObjectStore, step: int) -> Marker:
    """Parses a marker as hostile input; the sizes it declares are checked against what is there."""
    try:
        stored = store.read(commit_marker.step_prefix(step) + commit_marker.NAME, max_bytes=commit_marker.MAX_BYTES)
    except TooLarge:
        raise NotWhole(f"the marker has more than {commit_marker.MAX_BYTES} bytes") from None
    if stored is None:
        raise NotWhole("the marker is missing")
    try:
        marker = commit_marker.parse(stored.data)
    except ValueError as error:
        raise NotWhole(str(error)) from None
    if marker.step != step:
        raise NotWhole(f"the marker is of step {marker.step}")
    return marker


def _fetch_file(store: ObjectStore, key: str, path: Path, file: commit_marker.MarkedFile) -> None:
    try:
        store.download(key, path, max_bytes=file.bytes)
    except FileNotFoundError:
        raise NotWhole(f"{path.name} is missing") from None
    except TooLarge:
        raise NotWhole(f"{path.name} is larger than the marker says") from None
    if hash_file(path) != file.sha256:
        raise NotWhole(f"{path.name} has another SHA-256 than the marker says")


def _check_sizes(store: ObjectStore, marker: Marker, free: int) -> None:
    """Compares what is there with what the marker declares and with `free` bytes of disk, before any download.

    What the listing lacks is left to the download: only its 404 is a confirmed absence.
    """
    prefix = commit_marker.files_prefix(marker)
    there = {info.key.removeprefix(prefix): info.bytes for info in store.list(prefix)}
    needed = 0
    for name, file in marker.files.items():
        size = there.get(name, 0)
        if name in there and size != file.bytes:
            raise NotWhole(f"{name} has {size} bytes, the marker says {file.bytes}")
        needed += size
    if needed + SPARE_BYTES > free:
        raise Unreachable(
            f"{store.uri}: the checkpoint of step {marker.step} has {needed} bytes and the disk {free} free; "
            "give the machine a larger disk, or set JOB_STORAGE__CACHE to a place on one"
        )
