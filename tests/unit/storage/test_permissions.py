"""A volume that two users share in turn: files of one are checked before the other's attempt begins."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from job.storage.local import LocalStore
from job.storage.permissions import check_permissions, how_to_get_access

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two users")
OTHER = 65533


def as_user(user: int, group: int, work: Callable[[], object], *, umask: int = 0o002) -> str:
    """Does something as another user, in a forked process; returns its error's text."""
    ours, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
        os.umask(umask)
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent looks at it
            os.write(theirs, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(theirs)
    os.waitpid(pid, 0)
    with os.fdopen(ours) as text:
        return text.read()


@pytest.fixture
def volume() -> Iterator[Path]:
    """A folder that everybody may write to, as a volume's root is for its group."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@as_root
@pytest.mark.parametrize(("umask", "group", "goes_on"), [(0o002, 0, True), (0o022, 0, False), (0o002, OTHER, False)])
def test_a_run_of_another_user(volume: Path, *, umask: int, group: int, goes_on: bool) -> None:
    """With umask 002 another user of the same group goes on; else it is said whose the files are, and what to do."""
    place = str(volume / "a-run")
    write = lambda: LocalStore(Path(place)).write("stages/a.json", b"1")  # noqa: E731
    assert as_user(65532, 0, write, umask=umask) == ""
    found = as_user(OTHER, group, lambda: check_permissions(str(volume), place))
    if goes_on:
        assert found == ""
        assert as_user(OTHER, group, write) == ""
        return
    mode = "775" if umask == 0o002 else "755"
    what = rf"JOB_RUN__OUTPUT: {place}\S* cannot be used by this user \(user {OTHER}, group {group}\)"
    assert re.search(rf"^SettingsError: .*{what}; start as its owner \(docker run --user 65532:0\).* {mode}$", found)


def test_what_this_user_wrote_is_no_problem(tmp_path: Path) -> None:
    """Nor is a folder that does not exist yet, a store elsewhere, or a temporary folder of somebody else."""
    LocalStore(tmp_path / "run").write("stages/a.json", b"1")
    (tmp_path / "run/qlora-job-0123-1-x").mkdir(mode=0)
    check_permissions(str(tmp_path), str(tmp_path / "run"))
    check_permissions(str(tmp_path), str(tmp_path / "no-run"))
    check_permissions("s3://bucket/prefix", "s3://bucket/prefix/run")


@as_root
def test_what_a_killed_command_left_is_in_nobodys_way(volume: Path) -> None:
    """Such as of a command outside the image, with another umask: a staged file is not written to again."""
    place = volume / "a-run"
    assert as_user(65532, 0, lambda: LocalStore(place).write("stages/a.json", b"1")) == ""
    assert as_user(65532, 0, (place / ".store/0123.part.sagemaker-ignore").touch, umask=0o077) == ""
    assert as_user(OTHER, 0, lambda: check_permissions(str(volume), str(place))) == ""
    assert as_user(65532, 0, (place / ".store/lock-1").touch, umask=0o022) == ""
    assert "lock-1 cannot be used" in as_user(OTHER, 0, lambda: check_permissions(str(volume), str(place)))


@as_root
def test_what_runs_share(volume: Path) -> None:
    """A new run is told, too, if it could not add to the scores that all runs share; it may need none of them."""
    assert as_user(65532, 0, lambda: LocalStore(volume).write("scores/a/b.jsonl", b"1"), umask=0o022) == ""
    found = as_user(OTHER, 0, lambda: check_permissions(str(volume), str(volume / "new")))
    assert re.search(rf"JOB_RUN__OUTPUT: {volume}/\S+ cannot be used by this user .* --user 65532:0", found)
    for folder in (volume / ".store", volume / "scores"):
        folder.chmod(0o777)
    for lock in (volume / ".store").glob("lock*"):
        lock.chmod(0o666)
    assert as_user(OTHER, 0, lambda: check_permissions(str(volume), str(volume / "new"))) == ""


def test_nobody_can_write_to_a_volume_that_is_mounted_read_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There another owner or mode would not help, so neither is advised."""
    assert "chown" in how_to_get_access(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert "mounted read-only: mount it writable" in how_to_get_access(tmp_path)
    assert "chown" not in how_to_get_access(tmp_path)
