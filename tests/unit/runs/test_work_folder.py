"""Work folders: those that killed attempts left are removed by the next attempt at the same run, and no others."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from job.errors import AccessDenied, SettingsError
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


def test_a_cache_where_no_folder_can_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands make the folder without having looked at it before; one that is there may be read-only."""
    (tmp_path / "file").touch()
    for cache in (f"{tmp_path}/file/cache", "/proc/cache"):
        with pytest.raises(SettingsError, match="JOB_STORAGE__CACHE: cannot make"), folder_for("a push", cache):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
        with pytest.raises(AccessDenied, match="JOB_STORAGE__CACHE: cannot make"), folder_for("a push", str(tmp_path)):
            pass


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
