"""A check of `plan`: whether a store accepts what the job will write, tested by the kinds of requests the job makes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from job.common.disk import disk_errors
from job.errors import JobError, Unreachable
from job.planning.preflight import Found
from job.storage.local import LocalStore
from job.storage.open import ObjectStore

FILE_BYTES = (8 << 20) + 1
"""Bytes of the file that `plan` uploads to a store: large enough for a multipart upload, like a checkpoint."""


def round_trip(store: ObjectStore, name: str, folder: Path | None = None) -> Found[float]:
    """Tests a store with the kinds of requests that the job makes; returns the seconds that they took.

    A small object is written and read, files of 0 and of `FILE_BYTES` bytes are uploaded and downloaded, all are listed
    and deleted, and conditional writes are tested. All objects have unique names.

    Args:
        store: The store.
        name: The store's name in messages.
        folder: Where the files are made, and removed again; None for the system's folder for temporary files.

    Raises:
        AccessDenied: A kind of request is not allowed.
        Unreachable: The store does not answer, or does not return what was written.
    """
    key, content = f".plan-{uuid4().hex}", uuid4().bytes
    files = {f"{key}-{size}": size for size in (0, FILE_BYTES)}
    began = time.monotonic()
    try:
        store.write(key, content)
        stored = store.read(key)
        unchanged = [_file_round_trip(store, object_key, size, folder) for object_key, size in files.items()]
        listed = [info.key for info in store.list(key)]
    except BaseException:
        for object_key in (key, *files):
            with suppress(JobError):  # the first request that failed says more than the last
                store.delete(object_key)
        raise
    for object_key in (key, *files):
        store.delete(object_key)
    right = stored is not None and stored.data == content and all(unchanged) and listed == sorted([key, *files])
    if not right or store.read(key) is not None:
        raise Unreachable(f"{name}: objects that were written could not be read, listed and deleted unchanged")
    conditional = store.conditional_writes()
    seconds = time.monotonic() - began
    what = f"{name}: wrote, read, listed and deleted"
    if conditional:
        return "ok", f"{what}; conditional writes work", seconds
    return (
        "note",
        f"{what}; no conditional writes, so two attempts that start at the same time may both run for a while",
        seconds,
    )


def _file_round_trip(store: ObjectStore, key: str, size: int, parent: Path | None) -> bool:
    """Whether an uploaded file of random bytes is downloaded unchanged."""
    with (
        tempfile.TemporaryDirectory(prefix="qlora-job-", dir=parent) as folder,
        disk_errors(f"cannot write to {folder}"),
    ):
        original, copy = Path(folder, "there"), Path(folder, "back")
        original.write_bytes(os.urandom(size))
        store.upload(original, key)
        try:
            store.download(key, copy, max_bytes=size)
        except FileNotFoundError:
            return False
        return original.read_bytes() == copy.read_bytes()


def local_round_trip(output: Path, name: str, folder: Path | None = None) -> Found[float]:
    """`round_trip` in a temporary folder below a local output; all folders that it creates are removed afterwards."""
    root = output / f".plan-{uuid4().hex}"
    new_folders = [missing for missing in (root, *root.parents) if not missing.exists()]
    try:
        return round_trip(LocalStore(root), name, folder)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        with suppress(OSError):
            for missing in new_folders[1:]:
                missing.rmdir()  # fails unless it is empty: another process may use it by now
