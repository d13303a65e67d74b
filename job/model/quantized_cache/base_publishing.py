"""A kept base goes to its store, beside the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from threading import Event

from job import log
from job.errors import JobError
from job.model.quantized_cache.layout import INDEX, Shelf, key_of, parse_index, warn
from job.storage.base import ObjectStore


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
    """Puts the base there, unless a whole one is there already."""
    try:
        data = (shelf.folder / INDEX).read_bytes()
        there = {info.key: info.bytes for info in store.list(key_of(shelf, ""))}
        files = {key_of(shelf, f"{file.sha256}/{name}"): (name, file) for name, file in parse_index(data).items()}
        if _is_whole(shelf, store, there):  # this one, or another: its runs have noted it
            return
        for key in (key for key, (_, file) in files.items() if there.get(key) != file.bytes):
            if not get_on():
                return
            store.upload(shelf.folder / files[key][0], key)
        store.write(key_of(shelf, INDEX), data)
    except (JobError, OSError, ValueError) as error:
        warn("cannot be published", shelf.folder, error)
    else:
        log.get_logger().info("the quantized base is kept", uri=f"{store.uri}/{key_of(shelf, '')}")


def _is_whole(shelf: Shelf, store: ObjectStore, there: Mapping[str, int]) -> bool:
    """Whether the index in the store names files that are all there, in their sizes."""
    if key_of(shelf, INDEX) not in there or (stored := store.read(key_of(shelf, INDEX))) is None:
        return False
    try:
        index = parse_index(stored.data)
    except ValueError:
        return False
    return all(there.get(key_of(shelf, f"{file.sha256}/{name}")) == file.bytes for name, file in index.items())
