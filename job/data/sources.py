"""Sources of rows: a source is checked without being read, and opened as the lines of its files or of the hub."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain, repeat
from pathlib import Path

from job import log
from job.data.files import find_files, fixed_part, is_glob
from job.data.formats import Lines, read_lines
from job.data.hub_dataset import is_hub_id, open_dataset
from job.data.notes import Notes
from job.errors import Problem, SettingsError, named_by, naming
from job.storage.location import is_remote

_ALIVE_SECONDS = 0.5
_SAY_SECONDS = 10
REVISION_SETTINGS = {
    "JOB_DATA__SOURCE": "JOB_DATA__REVISION",
    "JOB_DATA__VALIDATION": "JOB_DATA__VALIDATION_REVISION",
}
"""The settings that give a source -> those that give the source's revision on the hub."""


def check_source(source: str, revision: str | None, split: str, setting: str = "JOB_DATA__SOURCE") -> None:
    """Refuses a source that cannot be read, as far as can be checked without reading it or using the network.

    `setting` is the one that gives the source, a key of `REVISION_SETTINGS`.

    Raises:
        DataError: A path that is not there, or holds nothing that is read; it names the setting that gives it.
        SettingsError: A hub id without a revision.
    """
    if is_hub_id(source):
        require_revision(revision, REVISION_SETTINGS[setting], source)
        return
    with named_by(setting):
        find_files(source, split)


def require_revision(revision: str | None, setting: str = "JOB_DATA__REVISION", source: str | None = None) -> str:
    """The revision of a hub data set, which has to be given by a setting."""
    if revision is None:
        what = "a data set of the hub needs a revision, preferably a commit, so that the run can be repeated"
        if source is not None:
            what = f"{what}; {source} is taken for one, since the path does not exist here"
        raise SettingsError([Problem(setting, what)])
    return revision


def watched(rows: Lines, name: str, check_stop: Callable[[], None]) -> Lines:
    """The rows of the source `name`; between two of them `check_stop` is called about twice a second.

    Every ten seconds their number so far is logged: a data set of millions of rows takes minutes.
    """
    now = time.monotonic()
    due, said = now + _ALIVE_SECONDS, now
    for number, row in enumerate(rows):
        if (now := time.monotonic()) > due:
            check_stop()
            due = time.monotonic() + _ALIVE_SECONDS
            if now > said + _SAY_SECONDS:
                log.get_logger().info("rows are read", source=name, rows=number)
                said = now
        yield row


@contextmanager
def named_as_given(source: str, name: str) -> Iterator[None]:
    """Within it, problems of the copy `source` name the URI `name`, as the user gave it, and not a temporary folder."""
    glob = is_glob(source) and not Path(source).exists()
    copy, given = (fixed_part(source), fixed_part(name)) if glob else (source, name)
    with nullcontext() if source == name else naming(given.rstrip("/"), copy.rstrip("/")):
        yield


@contextmanager
def copies_named_as_given(given: Mapping[str, str]) -> Iterator[None]:
    """`named_as_given` for several: the path of each file -> the place that the user gave, if it is a URI."""
    with ExitStack() as stack:
        for copy, name in given.items():
            if is_remote(name):
                stack.enter_context(named_as_given(copy, name))
        yield


def open_source(
    source: str, revision: str | None, split: str, name: str, *, note: Notes, check_stop: Callable[..., None]
) -> tuple[str | None, bool, Lines]:
    """The commit (None for files), whether the split chose the files, and the rows of a source.

    Messages call a copy on this machine by `name`, the URI that it was made of.
    """
    if is_hub_id(source):
        commit, rows = open_dataset(source, require_revision(revision), split, name, check_stop)
        return commit, True, rows
    with named_as_given(source, name):
        files, by_split = find_files(source, split)
    # A file found in a directory is named by its path in it.
    base, shown = (source, name) if Path(source).exists() else (fixed_part(source) or ".", fixed_part(name))
    if shown and not shown.endswith("/"):
        shown += "/"
    names = [name if file == Path(source) else f"{shown}{file.relative_to(base).as_posix()}" for file in files]
    parts: Iterator[Lines] = map(read_lines, files, names)
    single_file = len(files) == 1
    return None, by_split, chain.from_iterable(parts if single_file else map(_with_warning, parts, names, repeat(note)))


def _with_warning(rows: Lines, name: str, note: Notes) -> Lines:
    """The rows of one of several files; warns if it has none, since copying it may have failed."""
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        note("warning", "one of the files has no rows", file=name)
