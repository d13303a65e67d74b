"""Whether this user can read and write what an earlier user of the same volume left, before anything begins.

A run that was begun under one user id and goes on under another would fail at the first file that it has to replace,
after a download or hours of training. The image writes with umask 002, so user ids of one group can take turns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from job.errors import Problem, SettingsError
from job.storage.base import HIDDEN
from job.storage.location import is_remote

_TEMPORARY = ("qlora-job-", ".new-")
"""Folders of this user alone, made by `tempfile`; those of another one are in nobody's way."""
_LOOKED_AT = 20_000
"""Entries below a folder; what lies there is of a few users, each with many files."""


def check_permissions(folders: Mapping[str, str]) -> None:
    """Refuses folders with something in them that this user cannot read, or cannot replace.

    Args:
        folders: Setting -> the folder that it names, path or URI; a folder that does not exist is not looked at.

    Raises:
        SettingsError: With one problem for each folder, the first that was found in it.
    """
    problems = []
    for setting, place in folders.items():
        if is_remote(place):
            continue
        if found := next(_closed(Path(place).expanduser()), None):
            problems.append(Problem(setting, _remedy(found)))
    if problems:
        raise SettingsError(problems)


def _closed(root: Path) -> Iterator[Path]:
    """What this user cannot use: folders that it cannot write to, files that it cannot read, locks it cannot take."""
    for folder, inner, files in islice(os.walk(root), _LOOKED_AT):
        here = Path(folder)
        inner[:] = [name for name in inner if not name.startswith(_TEMPORARY)]
        if not _may(here, os.R_OK | os.W_OK | os.X_OK):
            yield here
        for name in files:
            file = here / name
            needed = os.R_OK | (os.W_OK if here.name == HIDDEN else 0)
            if not file.is_symlink() and not _may(file, needed):
                yield file


def _may(path: Path, mode: int) -> bool:
    """Whether this user may do so; also if it is gone meanwhile."""
    return os.access(path, mode, effective_ids=True) or not os.path.lexists(path)


def _remedy(path: Path) -> str:
    return f"{path} cannot be used by this user (user {os.geteuid()}, group {os.getegid()}); {own_or_hand_over(path)}"


def own_or_hand_over(path: Path) -> str:
    """What to do about a file or folder of another user, and whose it is."""
    try:
        owner = path.stat()
    except OSError:
        return "give it to this user (chown -R)"
    who, mode = f"{owner.st_uid}:{owner.st_gid}", f"{owner.st_mode & 0o7777:o}"
    return f"start as its owner (docker run --user {who}), or give it to this user (chown -R); its mode is {mode}"
