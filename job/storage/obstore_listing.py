"""Listings by obstore, sorted by key and in bounded memory, however the server sorts and however often it fails."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import obstore

from job.errors import Unreachable
from job.storage.obstore_errors import FAILURES
from job.storage.obstore_requests import ask_once, pause_or_raise

_PAGE, _MAX_REPEATED_PAGES = 1000, 3
Page = list[tuple[str, int]]
"""Whole keys and bytes of objects."""


def entries(client: Any, uri: str, start: str, *, retries: int, sorted_by_key: bool) -> Iterator[tuple[str, int]]:
    """Whole key and bytes of each object whose whole key begins with `start`, once, sorted by key.

    Args:
        client: obstore's store.
        uri: Its URI, for messages.
        start: The beginning of whole keys.
        retries: How often a request is tried at most.
        sorted_by_key: Whether the server sorts so. Then a listing is passed on as it comes; if not, it is read to its
            end first, into a temporary database, whose pages SQLite keeps on the disk beyond 2 MB.

    Raises:
        Unreachable: The answers are no listing that ends, or the disk takes no temporary file.
        FAILURES: As obstore raises them, after the last try.
    """
    return (_in_order_of_server if sorted_by_key else _sorted)(client, uri, start, retries)


def _in_order_of_server(client: Any, uri: str, start: str, retries: int) -> Iterator[tuple[str, int]]:
    last, tries, repeated = "", 0, 0
    before: Page = []
    while True:
        try:
            for page in _pages(client, start, after=last):
                end = max(key for key, _ in page)
                repeated = _count_repeated(uri, repeated, new=end > last)
                tries = 0 if end > last else tries
                if page != before:
                    yield from (entry for entry in page if entry[0].startswith(start))
                last, before = max(last, end), page
        except FAILURES as error:
            tries = pause_or_raise(tries, error, retries)  # and continues behind what was passed on
        else:
            return


def _sorted(client: Any, uri: str, start: str, retries: int) -> Iterator[tuple[str, int]]:
    tries = 0
    try:
        with closing(sqlite3.connect("", isolation_level=None, check_same_thread=False)) as database:
            database.execute("PRAGMA journal_mode=OFF")
            database.execute("CREATE TABLE objects (key TEXT PRIMARY KEY, bytes INTEGER) WITHOUT ROWID")
            while True:
                database.execute("DELETE FROM objects")
                try:
                    _read_into(database, uri, _pages(client, start, after=""))
                except FAILURES as error:
                    tries = pause_or_raise(tries, error, retries)
                else:
                    break
            # SQLite compares the bytes of UTF-8, whose order is that of Python's strings.
            in_order = database.execute("SELECT key, bytes FROM objects ORDER BY key")
            yield from (entry for entry in in_order if entry[0].startswith(start))
    except sqlite3.Error as error:
        what = f"{uri}: cannot list: the listing does not fit into a temporary file ({error}); set TMPDIR"
        raise Unreachable(what) from error


def _read_into(database: sqlite3.Connection, uri: str, pages: Iterator[Page]) -> None:
    repeated = 0
    for page in pages:
        database.execute("BEGIN")
        new = database.executemany("INSERT INTO objects VALUES (?, ?) ON CONFLICT DO NOTHING", page).rowcount
        database.execute("COMMIT")
        repeated = _count_repeated(uri, repeated, new=new > 0)


def _count_repeated(uri: str, repeated: int, *, new: bool) -> int:
    repeated += not new
    if repeated == _MAX_REPEATED_PAGES:
        raise Unreachable(f"{uri}: cannot list: the server repeats the same page")
    return repeated


def _pages(client: Any, start: str, *, after: str) -> Iterator[Page]:
    """Objects in the order of the server, from the one after `after` on, until those that begin with `start` are over.

    obstore lists folders: within one, the listing begins close before `start` and ends behind it.
    """
    folder, _, name = start.rpartition("/")
    # A name without its end comes before it, and obstore takes none of dots alone.
    offset = after or (start[:-1] if name[:-1].strip(".") else None)
    pages = ask_once(obstore.list, client, folder or None, offset=offset, chunk_size=_PAGE)
    while page := ask_once(next, pages, ()):
        yield [(info["path"], info["size"]) for info in page]
        if is_beyond(page[-1]["path"], folder, name):
            return


def is_beyond(key: str, folder: str, name: str) -> bool:
    """Whether no key that begins with `folder/name` can follow `key` in a listing of `folder`.

    True only if this holds for every order that servers use: by whole keys or folder by folder, compared as UTF-8 (as
    Python does) or UTF-16.
    """
    component = key.removeprefix(f"{folder}/" if folder else "").partition("/")[0]
    later = component > name and component.encode("utf-16-be") > name.encode("utf-16-be")
    return later and not component.startswith(name)
