"""Checks at the start whether this user can read and replace the files that an earlier user left on the same volume.

Otherwise a run that was begun under another user id would fail at the first file that it has to replace, after a
download or hours of training. The image writes with umask 002, so users of one group can continue each other's runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from job.errors import Problem, SettingsError
from job.storage.base import HIDDEN, LOCK
from job.storage.location import is_remote

_TEMPORARY = ("qlora-job-", ".new-")
"""Folders of this user alone, made by `tempfile`; those of other users do no harm."""
_MAX_FOLDERS = 20_000
"""Folders to look into at most, below one `root`: what cannot be used mostly shows in the first ones."""


def check_permissions(output: str, run: str) -> None:
    """Refuses a run with something in its folder that this user cannot read, or cannot replace.

    Args:
        output: Folder of the runs, path or URI, with what they share; a folder that does not exist is not looked at.
        run: That of the run.

    Raises:
        SettingsError: With the first file or folder that was found.
    """
    if is_remote(output):
        return
    shared = Path(output).expanduser()
    unusable = chain(
        _unusable(Path(run).expanduser()), _unusable(shared / HIDDEN), _unusable(shared / "scores", folders=1)
    )
    if (first := next(unusable, None)) is not None:
        raise SettingsError([Problem("JOB_RUN__OUTPUT", _remedy(first))])


def _unusable(root: Path, *, folders: int = _MAX_FOLDERS) -> Iterator[Path]:
    """What this user cannot use: folders that it cannot write to, files that it cannot read, locks it cannot take.

    Args:
        root: Where to begin; a folder that does not exist is not looked at.
        folders: Number of folders to look into, `root` included. With 1 its subfolders are left out: those of the
            shared scores are of one base, machine and version of the code each, and this run may need none of them.
    """
    for folder, inner, files in islice(os.walk(root), folders):
        path = Path(folder)
        inner[:] = [name for name in inner if not name.startswith(_TEMPORARY)]
        if not _may(path, os.R_OK | os.W_OK | os.X_OK):
            yield path
        for name in files:
            file = path / name
            hidden = path.name == HIDDEN
            if hidden and not name.startswith(LOCK):  # staged by a process that was killed: it is never opened again
                continue
            if not file.is_symlink() and not _may(file, os.R_OK | (os.W_OK if hidden else 0)):
                yield file


def _may(path: Path, mode: int) -> bool:
    """Whether this user may do so; also if it is gone meanwhile."""
    return os.access(path, mode, effective_ids=True) or not os.path.lexists(path)


def is_read_only(path: Path) -> bool:
    """Whether the file system is read-only for every user."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _remedy(path: Path) -> str:
    return f"{path} cannot be used by this user (user {os.geteuid()}, group {os.getegid()}); {how_to_get_access(path)}"


def how_to_get_access(path: Path) -> str:
    """What to do about a file or folder that this user cannot change, and whose it is."""
    if is_read_only(path):
        return "its volume is mounted read-only: mount it writable, or give another path"
    try:
        owner = path.stat()
    except OSError:
        return "give it to this user (chown -R)"
    who, mode = f"{owner.st_uid}:{owner.st_gid}", f"{owner.st_mode & 0o7777:o}"
    return f"start as its owner (docker run --user {who}), or give it to this user (chown -R); its mode is {mode}"
