"""Where cached quantized bases are stored, and when one is complete.

A base is a folder in the hub's layout, its tokenizer next to it. `base.json` comes last and holds the hash of each
file: without it there is no base. In a store the files are named by their hashes, so that two runs that put the same
base there at once never mix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from job import log
from job.common.formatting import first_line
from job.common.hashing import hash_file, hash_files, unsealed
from job.storage.base import ObjectStore, is_key

INDEX = "base.json"
MERGES = "merges.txt"
_ENDINGS = (".safetensors", ".json", ".model", ".jinja", MERGES)


@dataclass(frozen=True)
class CacheEntry:
    """Where one base is kept: under `key`, in a folder of this machine, and in a store too unless that is None.

    `index_sha256` is that of the one `base.json` that will do; None where any will.
    """

    key: str
    folder: Path
    store: ObjectStore | None
    index_sha256: str | None = None


@dataclass(frozen=True)
class CachedBase:
    """Which base a run began with; the first two None if it is not cached."""

    key: str | None = None
    index_sha256: str | None = None
    quantized_experts: int = 0
    """Weights of a mixture's experts that are held in 4 bits; earlier versions had none, and did not record it."""


@dataclass(frozen=True)
class CachedFile:
    """One file of a base, as its index has it."""

    bytes: int
    sha256: str


_Index = TypeAdapter(dict[str, CachedFile])


def entry_for(facts: Mapping[str, Any], cache: Path, store: ObjectStore | None) -> CacheEntry:
    """The place of the base that these JSON-able facts determine: source, quantization, software, machine."""
    return entry_at(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(), cache, store)


def entry_at(key: str, cache: Path, store: ObjectStore | None, index_sha256: str | None = None) -> CacheEntry:
    """The place of a base whose key is known, and perhaps its index."""
    return CacheEntry(key, cache / "bases" / key, store, index_sha256)


def cached_base(entry: CacheEntry | None) -> CachedBase:
    """The cached base, for the run's record."""
    if entry is None or not (index := entry.folder / INDEX).is_file():
        return CachedBase()
    return CachedBase(entry.key, hash_file(index))


def is_wanted(entry: CacheEntry, index: bytes) -> bool:
    """Whether this `base.json` is one that will do."""
    return entry.index_sha256 in {None, hashlib.sha256(index).hexdigest()}


def parse_index(data: bytes) -> dict[str, CachedFile]:
    """The files of a base.

    Raises:
        ValueError: It is no index, or names what cannot be a file of a base.
    """
    index = _Index.validate_python(unsealed(data))
    for name in index:
        if "/" in name or not is_key(name) or not name.endswith(_ENDINGS):
            raise ValueError(f"{name!r} is not a file of a base")
    return index


def verify(folder: Path, index: Mapping[str, CachedFile]) -> None:
    """Raises ValueError unless exactly these files are there, undamaged; OSError if one cannot be read."""
    names = {path.name for path in folder.iterdir()} - {INDEX}
    if names != index.keys():
        raise ValueError(f"missing or unexpected files: {', '.join(sorted(names ^ index.keys()))}")
    for name, sha256 in zip(index, hash_files([folder / name for name in index]), strict=True):
        if index[name].sha256 != sha256:
            raise ValueError(f"the SHA-256 of {name} differs")


def key_of(entry: CacheEntry, name: str) -> str:
    """The key of a file of the base in its store."""
    return f"bases/{entry.key}/{name}"


def warn(message: str, where: object, error: Exception) -> None:
    """Logs what is wrong with a cached base; the job continues without it."""
    why = first_line(error, 300)
    log.get_logger().warning(f"the quantized base {message}", where=str(where), why=why)
