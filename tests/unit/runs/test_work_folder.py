"""Work folders: those of killed attempts are removed by the next attempt at the same run, and no others."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from job.errors import AccessDenied, JobError, SettingsError, Unreachable
from job.runs import work_folder as module
from job.runs.work_folder import folder_for, work_folder

KILLED = """
import os, signal, sys
from job.runs.work_folder import work_folder

with work_folder(sys.argv[1], sys.argv[2], int(sys.argv[3]), cleans=True) as folder:
    (folder / "states").mkdir()
    (folder / "states/weights").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(cache: Path, run: str, attempt: int) -> Path:
    """The folder that a killed attempt left, with a checkpoint."""
    before = set(cache.iterdir()) if cache.exists() else set()
    subprocess.run([sys.executable, "-c", KILLED, cache, run, str(attempt)], check=False)
    (left,) = set(cache.iterdir()) - before
    return left


def test_the_next_attempt_removes_what_killed_ones_left(tmp_path: Path) -> None:
    """Folders of earlier attempts at this run are gone when the next one begins; its own is when it ends."""
    first, second = (killed(tmp_path / "cache", "s3://bucket/run", attempt) for attempt in (1, 2))
    assert not first.exists()
    assert (second / "states/weights").exists()
    with work_folder(str(tmp_path / "cache"), "s3://bucket/run", 3, cleans=True) as folder:
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    assert not list((tmp_path / "cache").iterdir())


def test_a_killed_push_leaves_nothing_for_good(tmp_path: Path) -> None:
    """What belongs to no attempt is numbered by the time, so that the next one of its name removes it."""
    left = killed(tmp_path / "cache", "push of s3://bucket/run", 1)
    with folder_for("push of s3://bucket/run", str(tmp_path / "cache")) as folder:
        assert not left.exists()
        assert folder.is_dir()


def test_a_cache_below_a_file_is_a_mistake_in_the_settings(tmp_path: Path) -> None:
    """Commands make the folder without having looked at it before."""
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot make the folder"), folder_for("a push", f"{tmp_path}/file/cache"):
        pass


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOENT, SettingsError), (errno.EROFS, AccessDenied), (errno.ENOSPC, Unreachable)]
)
def test_a_cache_without_room_for_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[JobError]
) -> None:
    """One that is there, but read-only, full, or of a file system such as /proc, which says that it does not exist."""

    def refuse(*_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number), str(tmp_path))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(error, match="JOB_STORAGE__CACHE: cannot make a folder in"), folder_for("a push", str(tmp_path)):
        pass


@pytest.mark.parametrize("moment", ["before it has a lock", "before its lock is held", "while it is removed"])
def test_a_folder_that_another_process_takes_for_a_left_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Of two commands on the same run with the same cache, one may find the other's folder before it is locked."""
    open_lock, removed = module._open_lock, list[Path]()

    def found_by_another(folder: Path) -> int:
        if removed:
            return open_lock(folder)
        removed.append(folder)
        if moment == "before it has a lock":
            shutil.rmtree(folder)
        lock = open_lock(folder)
        if moment == "before its lock is held":
            shutil.rmtree(folder)
        if moment == "while it is removed":
            fcntl.flock(others.enter_context((folder / ".lock").open()), fcntl.LOCK_EX)
        return lock

    monkeypatch.setattr(module, "_open_lock", found_by_another)
    with ExitStack() as others, folder_for("a push", str(tmp_path)) as folder:
        assert folder.is_dir()
        assert folder not in removed
    assert not list(tmp_path.iterdir())


def test_what_is_in_use_or_of_another_run_stays(tmp_path: Path) -> None:
    """A replaced attempt that still goes on keeps its folder, as do other runs, later attempts and other files."""
    cache = tmp_path / "cache"
    other, later = killed(cache, "s3://bucket/other", 1), killed(cache, "s3://bucket/run", 7)
    (cache / "hub").mkdir()
    with work_folder(str(cache), "s3://bucket/run", 2, cleans=True) as replaced:
        with work_folder(str(cache), "s3://bucket/run", 3, cleans=True) as folder:
            assert {path.name for path in cache.iterdir()} == {
                *("hub", other.name, later.name, replaced.name, folder.name),
            }
        with work_folder(str(cache), "s3://bucket/run", 8, cleans=False):
            assert later.exists()
