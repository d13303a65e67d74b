"""Quantized bases that are kept: a start that finds one loads 4 GB, verified, and does not fetch 14 and quantize them.

A base is a folder in the hub's layout, its tokenizer beside it. `base.json` comes last and holds the hash of each file:
without it there is no base. In a store the files lie under their hashes, so that two runs that put the same base there
at once never mix. A base that cannot be kept, or is damaged, costs a warning and the way without it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from pydantic import TypeAdapter

from job import log
from job.errors import JobError
from job.hashes import hash_files, sealed, unsealed
from job.hub import SMALL_FILES
from job.limits import check_disk, required_bytes
from job.store import ObjectStore, TooLarge, is_key

INDEX = "base.json"
SHARD = "256MB"
"""Of weights: what an upload may have in its hands when the job has to end."""
_ENDINGS = (".safetensors", ".json", ".model", ".jinja")


@dataclass(frozen=True)
class Shelf:
    """Where one base is kept: under `key`, in a folder of this machine, and in a store too unless that is None."""

    key: str
    folder: Path
    store: ObjectStore | None


@dataclass(frozen=True)
class _File:
    bytes: int
    sha256: str


_Index = TypeAdapter(dict[str, _File])


def shelf_of(facts: Mapping[str, Any], cache: Path, store: ObjectStore | None) -> Shelf:
    """The place of the base that these JSON-able facts determine, bit by bit: source, quantization, software."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Shelf(key, cache / "bases" / key, store)


def find(shelf: Shelf, alive: Callable[[], None]) -> Path | None:
    """The folder of a kept base, every byte of it verified: one that lies here, else one from the store.

    Args:
        shelf: Where to look.
        alive: Called between two files; may raise what ends the job.
    """
    if shelf.folder.is_dir():
        try:
            _verify(shelf.folder, _read_index(shelf.folder / INDEX))
        except (OSError, ValueError) as error:
            _warn("is damaged, and is made again", shelf.folder, error)
            shutil.rmtree(shelf.folder, ignore_errors=True)
        else:
            return shelf.folder
    if shelf.store is None or (stored := shelf.store.read(_key(shelf, INDEX))) is None:
        return None
    try:
        index = _parse(stored.data)
        check_disk(shelf.folder, required_bytes(file.bytes for file in index.values()))
        with _new_folder(shelf.folder) as folder:
            for name, file in index.items():
                alive()
                shelf.store.download(_key(shelf, f"{file.sha256}/{name}"), folder / name, max_bytes=file.bytes)
            (folder / INDEX).write_bytes(stored.data)
        _verify(shelf.folder, _read_index(shelf.folder / INDEX))
    except (OSError, ValueError, TooLarge) as error:
        _warn("is damaged, and is made again", f"{shelf.store.uri}/{_key(shelf, INDEX)}", error)
        shutil.rmtree(shelf.folder, ignore_errors=True)
        for key in [_key(shelf, INDEX), *[info.key for info in shelf.store.list(_key(shelf, ""))]]:
            shelf.store.delete(key)
        return None
    return shelf.folder


def keep(model: Any, source: Path, shelf: Shelf) -> None:
    """Saves a freshly quantized base with its tokenizer; where that is not possible, says so and goes on.

    Args:
        model: transformers' model, quantized, nothing added to it yet.
        source: The folder it came from.
        shelf: Where to keep it.
    """
    try:
        with _new_folder(shelf.folder) as folder:
            model.save_pretrained(folder, max_shard_size=SHARD)
            for path in sorted({path for kind in SMALL_FILES for path in source.glob(kind)}):
                if not (folder / path.name).exists() and not path.name.endswith(".index.json"):
                    shutil.copyfile(path, folder / path.name)
            _keep_version(source / "config.json", folder / "config.json")
            files = sorted(folder.iterdir())
            index = {
                path.name: asdict(_File(path.stat().st_size, sha256))
                for path, sha256 in zip(files, hash_files(files), strict=True)
            }
            (folder / INDEX).write_bytes(sealed(index))
    except OSError as error:
        _warn("cannot be kept", shelf.folder, error)


@contextmanager
def publishing(shelf: Shelf | None) -> Iterator[None]:
    """Within it the base goes to its store, beside the work. An exception leaves what is not there yet undone."""
    if shelf is None or shelf.store is None or not shelf.folder.is_dir():
        yield
        return
    ended = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="base") as pool:
        done = pool.submit(copy_context().run, _publish, shelf, shelf.store, ended)
        try:
            yield
        except BaseException:
            ended.set()
            raise
    done.result()


def _publish(shelf: Shelf, store: ObjectStore, ended: Event) -> None:
    try:
        if store.read(_key(shelf, INDEX)) is not None:
            return
        index = _read_index(shelf.folder / INDEX)
        there = {info.key: info.bytes for info in store.list(_key(shelf, ""))}
        for name, file in index.items():
            if ended.is_set():
                return
            if there.get(key := _key(shelf, f"{file.sha256}/{name}")) != file.bytes:
                store.upload(shelf.folder / name, key)
        store.write(_key(shelf, INDEX), (shelf.folder / INDEX).read_bytes())
    except (JobError, OSError, ValueError) as error:
        _warn("cannot be published", shelf.folder, error)
    else:
        log.get_logger().info("the quantized base is kept", uri=f"{store.uri}/{_key(shelf, '')}")


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
    with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent, ignore_cleanup_errors=True) as new:
        folder = Path(new) / "base"
        folder.mkdir()
        yield folder
        if not target.exists():
            folder.rename(target)


def _read_index(path: Path) -> dict[str, _File]:
    return _parse(path.read_bytes())


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
