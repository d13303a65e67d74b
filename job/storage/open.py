"""Opens the store at a URI or path that a user gives, and downloads from it.

The contract of stores, and how to add one: `job/storage/base.py`. The table of stores: `job/storage/location.py`.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from pkgutil import resolve_name

from job.common.disk import disk_errors
from job.errors import DataError, Problem, SettingsError, Unreachable
from job.storage.base import Conflict, NotSupported, ObjectInfo, ObjectStore, Stored, TooLarge, check_key, is_key
from job.storage.credential_variables import check_variables
from job.storage.location import BACKENDS, Location, StorageOptions, is_remote, storage_options

__all__ = [
    "Conflict",
    "Location",
    "NotSupported",
    "ObjectInfo",
    "ObjectStore",
    "StorageOptions",
    "Stored",
    "TooLarge",
    "bytes_to_fetch",
    "check_key",
    "download_listed",
    "fetch",
    "is_key",
    "is_remote",
    "listed_files",
    "open_store",
    "storage_options",
]

_DEFAULT = StorageOptions()
_WILDCARD = re.compile(r"[*?\[]")


def open_store(place: str | Location, options: StorageOptions = _DEFAULT) -> ObjectStore:
    """Opens the store at a URI or path. Nothing is sent or created yet.

    Raises:
        SettingsError: The location, the options, or the cloud's own variables are invalid.
    """
    location = Location.parse(place) if isinstance(place, str) else place
    check_variables(location.scheme)
    store: ObjectStore = resolve_name(BACKENDS[location.scheme]).open(location, options)
    return store


def fetch(place: str, folder: Path, options: StorageOptions = _DEFAULT) -> str:
    """Downloads an object of a URI, or all objects below it as a folder; a path or hub id is returned unchanged.

    With the wildcards `*`, `?` or `[` in its last part, a URI means all objects of such names in their folder.

    Args:
        place: A slash at the end of a URI says that it is a folder.
        folder: Where to put it, under the last part of its name.
        options: How to reach the store.

    Returns:
        The local file or folder, or `place` itself; for a URI with wildcards the same pattern in a local folder.

    Raises:
        SettingsError: There is nothing at the URI, or it makes no sense.
        DataError: Names below it cannot be files in one folder, or would leave it.
        Unreachable, AccessDenied: As the store says.
    """
    if not is_remote(place):
        return place
    location = Location.parse(place)
    if _WILDCARD.search(location.name):
        return _fetch_glob(place, location, folder, options)
    store, target = open_store(location.parent, options), folder / location.name
    name = location.name if location.key else ""
    if name and not location.folder:
        try:
            store.download(name, target)
        except FileNotFoundError:
            pass
        else:
            return str(target)
    objects = listed_files(store, place, f"{name}/" if name else "")
    if not objects:
        raise SettingsError([Problem(place, "there is no such object, and nothing below it; correct the URI")])
    for path, info in objects.items():
        download_listed(store, info, target / path)
    return str(target)


def listed_files(store: ObjectStore, place: str, start: str = "") -> dict[str, ObjectInfo]:
    """The objects whose keys begin with `start`, by the rest of their keys, which can be paths of files in one folder.

    Args:
        store: Where they are.
        place: The URI that names them, for messages.
        start: Empty, or ends in a slash.

    Raises:
        DataError: A name cannot be that of a file, since other programs may write such names to a bucket.
        Unreachable, AccessDenied: As the store says.
    """
    objects = {info.key.removeprefix(start): info for info in store.list(start)}
    if problems := _impossible_names(place, objects):
        raise DataError(problems)
    return objects


def download_listed(store: ObjectStore, info: ObjectInfo, path: Path) -> None:
    """Downloads an object that a listing named; another program may have replaced or removed it since.

    Raises:
        Unreachable: It is gone, or has another size. A restart lists again.
        AccessDenied: As the store says.
    """
    place = f"{store.uri}/{info.key}"
    try:
        store.download(info.key, path, max_bytes=info.bytes)
    except FileNotFoundError:
        raise Unreachable(f"{place} was removed while it was fetched; start again") from None
    except TooLarge:
        raise Unreachable(f"{place} changed while it was fetched: it has more than its {info.bytes} bytes") from None
    with disk_errors(f"{place}: cannot read {path}"):
        size = path.stat().st_size
    if size != info.bytes:
        raise Unreachable(f"{place} changed while it was fetched: {info.bytes} bytes, then {size}")


def _fetch_glob(place: str, location: Location, folder: Path, options: StorageOptions) -> str:
    store, target = open_store(location.parent, options), folder / "shards"
    objects = _matching(store, location.name)
    if not objects:
        raise SettingsError([Problem(place, "no object matches; correct the URI or the wildcards in it")])
    if problems := _impossible_names(place, {info.key: info for info in objects}):
        raise DataError(problems)
    for info in objects:
        download_listed(store, info, target / info.key)
    return str(target / location.name)


def _matching(store: ObjectStore, pattern: str) -> list[ObjectInfo]:
    """The objects right below a place whose names fit the pattern."""
    start = pattern[: _WILDCARD.search(pattern).start()]  # type: ignore[union-attr]  # it has one
    return [info for info in store.list(start) if "/" not in info.key and fnmatchcase(info.key, pattern)]


def bytes_to_fetch(place: str, options: StorageOptions = _DEFAULT) -> int:
    """Bytes that `fetch` is going to download; 0 for a path or hub id, and if nothing is there, which `fetch` reports.

    Raises:
        SettingsError: The URI is invalid.
        Unreachable, AccessDenied: As the store says.
    """
    if not is_remote(place):
        return 0
    location = Location.parse(place)
    if _WILDCARD.search(location.name):
        return sum(info.bytes for info in _matching(open_store(location.parent, options), location.name))
    name = location.name if location.key else ""
    sizes = {info.key: info.bytes for info in open_store(location.parent, options).list(name)}
    if name in sizes and not location.folder:
        return sizes[name]
    start = f"{name}/" if name else ""
    return sum(size for path, size in sizes.items() if path.startswith(start))


def _impossible_names(uri: str, paths: dict[str, ObjectInfo]) -> list[Problem]:
    problems = []
    for path in paths:
        try:
            check_key(path)
        except ValueError:
            problems.append(
                Problem(uri, f"the name {path!r} is not a valid file name below the folder; rename the object")
            )
            continue
        parents = [parent.as_posix() for parent in Path(path).parents]
        problems += [
            Problem(uri, f"{parent!r} is both an object and a folder, which a disk cannot have; rename one")
            for parent in parents
            if parent in paths
        ]
    return problems
