"""Quantized bases that are kept: a start that finds one loads 4 GB, verified, and does not fetch 14 and quantize them.

A base is a folder in the hub's layout, its tokenizer beside it. `base.json` comes last and holds the hash of each file:
without it there is no base. In a store the files lie under their hashes, so that two runs that put the same base there
at once never mix. A run notes which base it began with, and its later attempts take that one or none: the same key does
not prove the same bits. Whatever cannot be kept, found or used costs a warning and the way without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from pydantic import TypeAdapter

from job import log
from job.errors import JobError, Unreachable
from job.hashes import hash_file, hash_files, sealed, unsealed
from job.hub import SMALL_FILES
from job.limits import check_disk, required_bytes
from job.model import load_tokenizer
from job.store import ObjectStore, TooLarge, is_key

INDEX = "base.json"
SHARD = "256MB"
"""Of weights: what an upload may have in its hands when the job has to end."""
MERGES = "merges.txt"
LEFT_SECONDS = 86_400
"""Age at which a folder that was never finished goes."""
_ENDINGS = (".safetensors", ".json", ".model", ".jinja", MERGES)


@dataclass(frozen=True)
class Shelf:
    """Where one base is kept: under `key`, in a folder of this machine, and in a store too unless that is None.

    `index_sha256` is that of the one `base.json` that will do; None where any will.
    """

    key: str
    folder: Path
    store: ObjectStore | None
    index_sha256: str | None = None


@dataclass(frozen=True)
class KeptBase:
    """Which base a run began with; both None where it is not kept."""

    key: str | None = None
    index_sha256: str | None = None


@dataclass(frozen=True)
class _File:
    bytes: int
    sha256: str


_Index = TypeAdapter(dict[str, _File])


def shelf_of(facts: Mapping[str, Any], cache: Path, store: ObjectStore | None) -> Shelf:
    """The place of the base that these JSON-able facts determine: source, quantization, software, machine."""
    return shelf_at(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(), cache, store)


def shelf_at(key: str, cache: Path, store: ObjectStore | None, index_sha256: str | None = None) -> Shelf:
    """The place of a base whose key is known, and perhaps its index."""
    return Shelf(key, cache / "bases" / key, store, index_sha256)


def on_shelf(shelf: Shelf | None) -> KeptBase:
    """What lies there, for the run's record."""
    if shelf is None or not (index := shelf.folder / INDEX).is_file():
        return KeptBase()
    return KeptBase(shelf.key, hash_file(index))


def find(shelf: Shelf, alive: Callable[[], None]) -> Path | None:
    """The folder of a kept base, every byte of it verified: one that lies here, else one from the store.

    Args:
        shelf: Where to look.
        alive: Called between two files; may raise what ends the job.
    """
    if shelf.folder.is_dir():
        try:
            _verify(shelf.folder, _parse(data := (shelf.folder / INDEX).read_bytes()))
            if _is_wanted(shelf, data):
                return shelf.folder
        except (OSError, ValueError) as error:
            _warn("is damaged, and is made again", shelf.folder, error)
            shutil.rmtree(shelf.folder, ignore_errors=True)
        if shelf.folder.exists():  # another run's, or one that cannot be removed
            return None
    if shelf.store is None:
        return None
    try:
        return _fetch(shelf, shelf.store, alive)
    except (_Damaged, TooLarge) as error:
        _warn("is damaged, and is made again", f"{shelf.store.uri}/{_key(shelf, INDEX)}", error)
        for key in getattr(error, "keys", ()):
            with suppress(JobError, OSError, ValueError):
                shelf.store.delete(key)  # proved wrong: it does nobody any good
    except (OSError, Unreachable) as error:  # of this machine's disk, or of a store that will say so again
        _warn("cannot be fetched", shelf.folder, error)
    return None


class _Damaged(Exception):
    """What the store has is not a whole base; `keys` are those of objects whose bytes were seen to be wrong."""

    def __init__(self, why: str, keys: Sequence[str] = ()) -> None:
        super().__init__(why)
        self.keys = keys


def _fetch(shelf: Shelf, store: ObjectStore, alive: Callable[[], None]) -> Path | None:
    """Brings the base here, verified before it takes its place."""
    if (stored := store.read(_key(shelf, INDEX))) is None or not _is_wanted(shelf, stored.data):
        return None
    try:
        index = _parse(stored.data)
    except ValueError as error:
        raise _Damaged(str(error), [_key(shelf, INDEX)]) from error
    sizes = {info.key: info.bytes for info in store.list(_key(shelf, ""))}
    for name, file in index.items():
        if sizes.get(_key(shelf, f"{file.sha256}/{name}")) != file.bytes:
            raise _Damaged(f"{name} is missing, or not in its size")
    check_disk(shelf.folder, required_bytes(file.bytes for file in index.values()))
    with _new_folder(shelf.folder) as folder:
        for name, file in index.items():
            alive()
            store.download(_key(shelf, f"{file.sha256}/{name}"), folder / name, max_bytes=file.bytes)
        hashes = zip(index.items(), hash_files([folder / name for name in index]), strict=True)
        if wrong := [_key(shelf, f"{file.sha256}/{name}") for (name, file), sha in hashes if sha != file.sha256]:
            raise _Damaged(f"other bytes than they should be: {', '.join(wrong)}", wrong)
        (folder / INDEX).write_bytes(stored.data)
    return shelf.folder if on_shelf(shelf).index_sha256 == hashlib.sha256(stored.data).hexdigest() else None


def _is_wanted(shelf: Shelf, index: bytes) -> bool:
    return shelf.index_sha256 in {None, hashlib.sha256(index).hexdigest()}


def keep(model: Any, source: Path, shelf: Shelf) -> None:
    """Saves a freshly quantized base with its tokenizer; where that is not possible, says so and goes on.

    Args:
        model: transformers' model, quantized, nothing added to it yet.
        source: The folder it came from.
        shelf: Where to keep it.
    """
    try:
        check_disk(shelf.folder, required_bytes([model.get_memory_footprint()]))
        with _new_folder(shelf.folder) as folder:
            model.save_pretrained(folder, max_shard_size=SHARD)
            for path in sorted({path for kind in (*SMALL_FILES, MERGES) for path in source.glob(kind)}):
                if not (folder / path.name).exists() and not path.name.endswith(".index.json"):
                    shutil.copyfile(path, folder / path.name)
            _keep_version(source / "config.json", folder / "config.json")
            load_tokenizer(folder)  # what cannot be loaded is not kept
            files = sorted(folder.iterdir())
            index = {
                path.name: asdict(_File(path.stat().st_size, sha256))
                for path, sha256 in zip(files, hash_files(files), strict=True)
            }
            (folder / INDEX).write_bytes(sealed(index))
    except Exception as error:  # noqa: BLE001 - safetensors and transformers raise whatever they like
        _warn("cannot be kept", shelf.folder, error)


@contextmanager
def publishing(shelf: Shelf | None, stop: Callable[[], bool], beat: Callable[[], None]) -> Iterator[None]:
    """Within it the base goes to its store, beside the work.

    An exception, or a job that has to end, leaves what is not there yet undone.
    """
    if shelf is None or shelf.store is None or not shelf.folder.is_dir():
        yield
        return
    ended = Event()

    def get_on() -> bool:
        beat()
        return not (ended.is_set() or stop())

    with ThreadPoolExecutor(1, thread_name_prefix="base") as pool:
        done = pool.submit(copy_context().run, _publish, shelf, shelf.store, get_on)
        try:
            yield
        except BaseException:
            ended.set()
            raise
    done.result()


def _publish(shelf: Shelf, store: ObjectStore, get_on: Callable[[], bool]) -> None:
    """Puts there what is missing or damaged; an index that is there already has to be the same one."""
    try:
        data = (shelf.folder / INDEX).read_bytes()
        there = {info.key: info.bytes for info in store.list(_key(shelf, ""))}
        files = {_key(shelf, f"{file.sha256}/{name}"): (name, file) for name, file in _parse(data).items()}
        missing = [key for key, (_, file) in files.items() if there.get(key) != file.bytes]
        if not missing and _key(shelf, INDEX) in there:
            return
        if _is_whole(shelf, store, there):  # another one: its runs have noted it
            return
        for key in missing:
            if not get_on():
                return
            store.upload(shelf.folder / files[key][0], key)
        store.write(_key(shelf, INDEX), data)
    except (JobError, OSError, ValueError) as error:
        _warn("cannot be published", shelf.folder, error)
    else:
        log.get_logger().info("the quantized base is kept", uri=f"{store.uri}/{_key(shelf, '')}")


def _is_whole(shelf: Shelf, store: ObjectStore, there: Mapping[str, int]) -> bool:
    """Whether the index in the store names files that are all there, in their sizes."""
    if _key(shelf, INDEX) not in there or (stored := store.read(_key(shelf, INDEX))) is None:
        return False
    try:
        index = _parse(stored.data)
    except ValueError:
        return False
    return all(there.get(_key(shelf, f"{file.sha256}/{name}")) == file.bytes for name, file in index.items())


def _keep_version(source: Path, saved: Path) -> None:
    """Leaves the version that the source was saved by: transformers reads some tokenizers by it."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (source, saved))
    if (version := old.get("transformers_version")) is None:
        new.pop("transformers_version", None)
    else:
        new["transformers_version"] = version
    saved.write_text(json.dumps(new, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _key(shelf: Shelf, name: str) -> str:
    return f"bases/{shelf.key}/{name}"


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that takes its place when it is complete, unless another process was there first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".new-*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > LEFT_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent, ignore_cleanup_errors=True) as new:
        folder = Path(new) / "base"
        folder.mkdir()
        yield folder
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise


def _parse(data: bytes) -> dict[str, _File]:
    """The files of a base.

    Raises:
        ValueError: It is no index, or names what cannot be a file of a base.
    """
    index = _Index.validate_python(unsealed(data))
    for name in index:
        if "/" in name or not is_key(name) or not name.endswith(_ENDINGS):
            raise ValueError(f"{name!r} is no file of a base")
    return index


def _verify(folder: Path, index: Mapping[str, _File]) -> None:
    """Raises ValueError unless exactly these files lie there, whole; OSError if one cannot be read."""
    names = {path.name for path in folder.iterdir()} - {INDEX}
    if names != index.keys():
        raise ValueError(f"other files than it should have: {', '.join(sorted(names ^ index.keys()))}")
    for name, sha256 in zip(index, hash_files([folder / name for name in index]), strict=True):
        if index[name].sha256 != sha256:
            raise ValueError(f"the SHA-256 of {name} is another")


def _warn(what: str, where: object, error: Exception) -> None:
    why = (str(error).splitlines() or [type(error).__name__])[0][:300]
    log.get_logger().warning(f"the quantized base {what}", where=str(where), why=why)
