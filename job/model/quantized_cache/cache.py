"""Caches the quantized base on this machine or in a store, so that a start loads 4 GB instead of quantizing 14.

A run records which cached base it began with, and its later attempts use only that one: an equal key does not prove
equal bits. If a base cannot be saved, found or used, the job logs a warning and continues without the cache.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

from job import log
from job.common.hashing import hash_files, sealed
from job.common.new_folder import new_folder
from job.common.resources import check_disk, required_bytes
from job.errors import JobError, Preempted, Replaced
from job.model.files import SOURCE_CONFIG
from job.model.placed_loading import save_quantized
from job.model.quantized_cache.layout import (
    INDEX,
    MERGES,
    CachedBase,
    CachedFile,
    CacheEntry,
    cached_base,
    is_wanted,
    key_of,
    parse_index,
    verify,
    warn,
)
from job.model.tokenizer import load_tokenizer
from job.storage.base import ObjectStore, TooLarge
from job.storage.hub import SMALL_FILES

SHARD = "256MB"
"""Of weights: what an upload may have in its hands when the job has to end."""


def find(entry: CacheEntry, check_stop: Callable[[], None]) -> Path | None:
    """The folder of a cached base whose hashes were verified: on this machine, else downloaded from the store.

    Args:
        entry: Where to look.
        check_stop: Called between two files; may raise what ends the job.
    """
    if entry.folder.is_dir():
        try:
            verify(entry.folder, parse_index(data := (entry.folder / INDEX).read_bytes()))
            if is_wanted(entry, data):
                return entry.folder
        except (OSError, ValueError) as error:
            warn("is damaged: the base is quantized again", entry.folder, error)
            shutil.rmtree(entry.folder, ignore_errors=True)
        if entry.folder.exists():  # another run's, or one that cannot be removed
            return None
    if entry.store is None:
        return None
    try:
        return _fetch(entry, entry.store, check_stop)
    except (_Damaged, TooLarge) as error:
        warn("is damaged: the base is quantized again", f"{entry.store.uri}/{key_of(entry, INDEX)}", error)
        for key in getattr(error, "keys", ()):
            with suppress(JobError, OSError, ValueError):
                entry.store.delete(key)  # its content is wrong, so no run can use it
    except (Preempted, Replaced):
        raise
    except (OSError, JobError) as error:  # of the disk, or of a store that refuses keys outside of the run
        warn("cannot be fetched", entry.folder, error)
    return None


class _Damaged(Exception):
    """What the store has is not a whole base; `keys` are those of objects whose bytes were seen to be wrong."""

    def __init__(self, reason: str, keys: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.keys = keys


def _fetch(entry: CacheEntry, store: ObjectStore, check_stop: Callable[[], None]) -> Path | None:
    """Downloads the base, and verifies it before it is moved to its final place."""
    if (stored := store.read(key_of(entry, INDEX))) is None:
        return None
    if not is_wanted(entry, stored.data):
        raise _Damaged("it is not the one with which the run began")
    try:
        index = parse_index(stored.data)
    except ValueError as error:
        raise _Damaged(str(error), [key_of(entry, INDEX)]) from error
    sizes = {info.key: info.bytes for info in store.list(key_of(entry, ""))}
    for name, file in index.items():
        if sizes.get(key_of(entry, f"{file.sha256}/{name}")) != file.bytes:
            raise _Damaged(f"{name} is missing, or has the wrong size")
    check_disk(entry.folder, required_bytes(file.bytes for file in index.values()))
    with new_folder(entry.folder) as folder:
        for name, file in index.items():
            check_stop()
            store.download(key_of(entry, f"{file.sha256}/{name}"), folder / name, max_bytes=file.bytes)
        hashes = zip(index.items(), hash_files([folder / name for name in index]), strict=True)
        if wrong := [key_of(entry, f"{file.sha256}/{name}") for (name, file), sha in hashes if sha != file.sha256]:
            raise _Damaged(f"files with wrong bytes: {', '.join(wrong)}", wrong)
        (folder / INDEX).write_bytes(stored.data)
    return entry.folder if cached_base(entry).index_sha256 == hashlib.sha256(stored.data).hexdigest() else None


def save(model: Any, source: Path, entry: CacheEntry) -> CachedBase:
    """Saves a freshly quantized base with its tokenizer; if that fails, logs a warning and continues.

    Args:
        model: transformers' model, quantized, nothing added to it yet.
        source: The folder it came from.
        entry: Where to keep it.

    Returns:
        What was kept; nothing where another process was first: that its base has the same bits is not known.
    """
    try:
        check_disk(entry.folder, required_bytes([model.get_memory_footprint()]))
        with new_folder(entry.folder) as folder:
            save_quantized(model, folder, shard=SHARD)
            for path in sorted({path for kind in (*SMALL_FILES, MERGES) for path in source.glob(kind)}):
                if path.is_file() and not (folder / path.name).exists() and not path.name.endswith(".index.json"):
                    shutil.copyfile(path, folder / path.name)
            shutil.copyfile(source / "config.json", folder / SOURCE_CONFIG)
            _keep_version(source / "config.json", folder / "config.json")
            load_tokenizer(folder)  # what cannot be loaded is not kept
            files = sorted(folder.iterdir())
            index = {
                path.name: asdict(CachedFile(path.stat().st_size, sha256))
                for path, sha256 in zip(files, hash_files(files), strict=True)
            }
            (folder / INDEX).write_bytes(data := sealed(index))
        own = CachedBase(entry.key, hashlib.sha256(data).hexdigest())
        return own if cached_base(entry) == own else CachedBase()
    except Exception as error:  # noqa: BLE001 - safetensors and transformers raise many types
        warn("cannot be kept", entry.folder, error)
        return CachedBase()


def _keep_version(source: Path, saved: Path) -> None:
    """Leaves the version that the source was saved by: transformers reads some tokenizers by it."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (source, saved))
    if (version := old.get("transformers_version")) is None:
        new.pop("transformers_version", None)
    else:
        new["transformers_version"] = version
    saved.write_text(json.dumps(new, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def publishing(
    entry: CacheEntry | None, stop: Callable[[], bool], report_progress: Callable[[], None]
) -> Iterator[None]:
    """Uploads the base to its store in another thread while the body runs.

    An exception, or a job that has to end, stops the upload after the current file.
    """
    if entry is None or entry.store is None or not entry.folder.is_dir():
        yield
        return
    ended = Event()

    def keep_going() -> bool:
        report_progress()
        return not (ended.is_set() or stop())

    with ThreadPoolExecutor(1, thread_name_prefix="base") as pool:
        upload = pool.submit(copy_context().run, _publish, entry, entry.store, keep_going)
        try:
            yield
        except BaseException:
            ended.set()
            raise
    upload.result()


def _publish(entry: CacheEntry, store: ObjectStore, keep_going: Callable[[], bool]) -> None:
    """Puts the base there, unless a whole one is there already."""
    try:
        data = (entry.folder / INDEX).read_bytes()
        there = {info.key: info.bytes for info in store.list(key_of(entry, ""))}
        files = {key_of(entry, f"{file.sha256}/{name}"): (name, file) for name, file in parse_index(data).items()}
        if _is_whole(entry, store, there):  # this one, or another: its runs have noted it
            return
        for key in (key for key, (_, file) in files.items() if there.get(key) != file.bytes):
            if not keep_going():
                return
            store.upload(entry.folder / files[key][0], key)
        store.write(key_of(entry, INDEX), data)
    except (JobError, OSError, ValueError) as error:
        warn("cannot be published", entry.folder, error)
    else:
        log.get_logger().info("the quantized base is kept", uri=f"{store.uri}/{key_of(entry, '')}")


def _is_whole(entry: CacheEntry, store: ObjectStore, sizes: Mapping[str, int]) -> bool:
    """Whether the index in the store names files that are all there, in their sizes."""
    if key_of(entry, INDEX) not in sizes or (stored := store.read(key_of(entry, INDEX))) is None:
        return False
    try:
        index = parse_index(stored.data)
    except ValueError:
        return False
    return all(sizes.get(key_of(entry, f"{file.sha256}/{name}")) == file.bytes for name, file in index.items())
