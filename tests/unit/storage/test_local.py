"""What is specific to the store in a local folder."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from job.errors import AccessDenied, SettingsError, Unreachable
from job.storage import local
from job.storage.base import Conflict
from job.storage.local import LocalStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folder of the store, not there yet."""
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> LocalStore:
    """An empty store."""
    return LocalStore(root, timeout_seconds=0.2)


def hidden_files(root: Path) -> list[str]:
    """Names of the store's own files."""
    return sorted(path.name for path in (root / ".store").iterdir())


def test_looking_creates_nothing(store: LocalStore, root: Path) -> None:
    """Opening, reading, listing and deleting leave no trace on the disk."""
    assert store.read("a/b") is None
    assert list(store.list()) == []
    store.delete("a/b")
    assert not root.exists()


def test_uri_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path means the same folder after the process has moved elsewhere."""
    monkeypatch.chdir(tmp_path)
    assert LocalStore(Path("runs")).uri == str(tmp_path / "runs")


def test_own_files_are_hidden(store: LocalStore, root: Path) -> None:
    """What the store keeps for itself is in no listing, and after a write only the lock is left of it."""
    store.write("a", b"1")
    assert hidden_files(root) == ["lock"]
    assert [info.key for info in store.list()] == ["a"]


def test_write_is_durable_before_it_is_visible(
    store: LocalStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way of writing flushes the content, then renames, then flushes the folder the name is in."""
    events: list[str] = []
    real_fsync, real_replace, real_link = os.fsync, Path.replace, os.link

    def fsync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append("content" if ".part" in name.suffixes else f"folder {name.name}")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return real_replace(self, target)

    def link(source: Path, target: Path) -> None:
        events.append("rename")
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(os, "link", link)
    (tmp_path / "file").write_bytes(b"x")
    expected = ["content", "rename", "folder new", "folder store"]
    for attempt in (
        lambda: store.write("new/a", b"1"),
        lambda: store.write("new/b", b"1", if_absent=True),
        lambda: store.upload(tmp_path / "file", "new/c"),
    ):
        events.clear()
        attempt()
        assert events == expected
    events.clear()
    store.download("new/a", tmp_path / "to" / "copy")
    assert events == ["content", "rename", "folder to"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_leaves_the_store_intact(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A full disk is an error that says so; the old object stays, and nothing half written remains."""
    store.write("a", b"old")

    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(Unreachable, match="the disk is full"):
            store.write("a", b"new")
    stored = store.read("a")
    assert stored is not None
    assert stored.data == b"old"
    assert hidden_files(root) == ["lock"]


def test_an_upload_to_a_full_disk_does_not_name_its_source(
    store: LocalStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`shutil.copyfile` names both files, whichever disk is full."""
    (tmp_path / "source").write_bytes(b"x")

    def sendfile(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "sendfile", sendfile)
    with pytest.raises(Unreachable) as raised:
        store.upload(tmp_path / "source", "a")
    assert f"{root}: cannot write a: the disk is full" in str(raised.value)
    assert f", {root}/" in str(raised.value)
    assert "source" not in str(raised.value)


def test_failing_disk_is_unreachable(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input/output error of the disk is worth another try elsewhere."""

    def fsync(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Unreachable, match="the disk reports an error"):
        store.write("a", b"new")


def test_a_file_system_that_makes_no_folders_is_a_wrong_path(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as /proc, which says that the folder's parent does not exist."""

    def mkdir(path: Path, **_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(SettingsError, match=f"{root}: cannot be used: its file system allows no new folders"):
        store.write("a", b"new")


def test_forbidden_is_not_absent(
    store: LocalStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk refuses to look, no verb claims that there is nothing."""
    store.write("secret/a", b"1")
    real_stat, real_scandir = Path.stat, os.scandir

    def refuse(path: str | Path) -> None:
        if "secret" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def look(self: Path, **options: bool) -> os.stat_result:
        refuse(self)
        return real_stat(self, **options)

    def scan(path: Path) -> object:
        refuse(path)
        return real_scandir(path)

    monkeypatch.setattr(Path, "stat", look)
    monkeypatch.setattr(os, "scandir", scan)
    for attempt in (
        lambda: store.read("secret/a"),
        lambda: store.download("secret/a", tmp_path / "copy"),
        lambda: store.delete("secret/a"),
        lambda: store.write("secret/a", b"2", if_tag="tag"),
        lambda: list(store.list()),
    ):
        with pytest.raises(AccessDenied, match="Permission denied"):
            attempt()


def test_read_only_disk_is_access_denied(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system is a matter of rights, not of trying again."""

    def mkdir(self: Path, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(AccessDenied, match="Read-only"):
        store.conditional_writes()


@pytest.mark.parametrize("key", ["link/a", "file", "loop"])
def test_symbolic_links_lead_nowhere(store: LocalStore, root: Path, tmp_path: Path, key: str) -> None:
    """No verb follows a symbolic link below the root, and no listing shows one."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a").write_bytes(b"outside")
    (tmp_path / "source").write_bytes(b"x")
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "file").symlink_to(tmp_path / "outside" / "a")
    (root / "loop").symlink_to("loop")
    for attempt in (
        lambda: store.read(key),
        lambda: store.write(key, b"x"),
        lambda: store.upload(tmp_path / "source", key),
        lambda: store.download(key, tmp_path / "copy"),
        lambda: store.delete(key),
        lambda: list(store.list("link/")),
    ):
        with pytest.raises(AccessDenied, match="symbolic link"):
            attempt()
    assert (tmp_path / "outside" / "a").read_bytes() == b"outside"
    assert list(store.list()) == []


def test_root_may_be_a_symbolic_link(tmp_path: Path) -> None:
    """Where the store lies is the user's choice; only what is below is checked."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    LocalStore(tmp_path / "link").write("a", b"1")
    assert (tmp_path / "real" / "a").read_bytes() == b"1"


def test_pipe_is_no_object(store: LocalStore, root: Path) -> None:
    """A named pipe, which would block its reader, is neither read nor listed."""
    root.mkdir()
    os.mkfifo(root / "pipe")
    assert store.read("pipe") is None
    assert list(store.list()) == []


def test_object_and_folder_of_one_name(store: LocalStore) -> None:
    """What S3 could hold and no disk can, an object that is also a folder, is an error that says so."""
    store.write("a", b"1")
    store.write("b/c", b"1")
    for key in ("a/b", "a/b/c", "b"):
        with pytest.raises(SettingsError, match="cannot be both an object and a folder"):
            store.write(key, b"2")


def test_delete_removes_empty_folders(store: LocalStore, root: Path) -> None:
    """As in S3, a folder ends with its last object; the root stays."""
    store.write("a/b/c", b"1")
    store.write("a/d", b"1")
    store.delete("a/b/c")
    assert sorted(path.name for path in (root / "a").iterdir()) == ["d"]
    store.delete("a/d")
    assert [path.name for path in root.iterdir()] == [".store"]


@pytest.mark.parametrize("when", ["before rmdir", "before it is flushed"])
def test_folders_that_another_process_removes_meanwhile(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A process that stood still while it deleted an object goes on when its successor has deleted the whole folder."""
    store.write("a/b/c", b"1")
    other = ["a/b/d"] if when == "before it is flushed" else []
    for key in other:
        store.write(key, b"1")
    original = Path.rmdir if other else local.rename

    def then(*given: Path) -> None:
        try:
            original(*given)
        finally:
            if (root / "a").exists():
                shutil.rmtree(root / "a")

    monkeypatch.setattr(*((Path, "rmdir") if other else (local, "rename")), then)
    store.delete("a/b/c")
    assert list(store.list()) == []


def test_a_write_whose_folder_another_process_removes(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty folder that was just made is made again; one that is removed with the object in it is no error."""
    original, removed = local.rename, []

    def rename(path: Path, target: Path) -> None:
        if target.name == "c" and not removed:
            removed.append(target)
            target.parent.rmdir()
        original(path, target)

    monkeypatch.setattr(local, "rename", rename)
    store.write("a/b/c", b"1")
    assert removed
    assert store.read("a/b/c") is not None

    def rename_and_remove(path: Path, target: Path) -> None:
        original(path, target)
        shutil.rmtree(root / "e", ignore_errors=True)

    monkeypatch.setattr(local, "rename", rename_and_remove)
    store.write("e/f", b"1")
    assert store.read("e/f") is None


def test_what_is_being_deleted_is_left_alone_by_sagemaker(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """SageMaker looks at the names of files, not of their folders: no copy of a deleted object gets to S3."""
    moved: list[str] = []
    real = local.rename
    monkeypatch.setattr(local, "rename", lambda path, target: moved.append(target.name) or real(path, target))
    store.write("a/b", b"1")
    moved.clear()
    store.delete("a/b")
    assert [name.endswith(".sagemaker-ignore") for name in moved] == [True]


def test_marks_of_sagemaker_are_no_objects(store: LocalStore, root: Path) -> None:
    """They are beside what it has copied, and never in S3, where a manifest that lists one would not verify."""
    store.write("stages/pull.json", b"1")
    for ending in ("uploading", "uploaded"):
        (root / f"stages/pull.json.sagemaker-{ending}").touch()
    assert [info.key for info in store.list()] == ["stages/pull.json"]
    (root / "stages/pull.json.sagemaker-uploaded").write_bytes(b"2")  # marks are empty: `verify` must see this one
    assert [info.key for info in store.list()] == ["stages/pull.json", "stages/pull.json.sagemaker-uploaded"]


def test_create_works_without_hard_links(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """On file systems without hard links conditional creation still holds, by the lock."""

    def link(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", link)
    assert store.conditional_writes()
    store.write("a", b"1", if_absent=True)
    with pytest.raises(Conflict):
        store.write("a", b"2", if_absent=True)


def test_lock_that_is_held_elsewhere(store: LocalStore, root: Path) -> None:
    """A lock that a stopped process keeps is waited for only for so long, and blocks no reader."""
    store.write("a", b"1")
    with (root / ".store" / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Unreachable, match="locked by another process"):
            store.write("a", b"2")
        assert store.read("a") is not None
    store.write("a", b"2")


def test_leftovers_of_the_dead_are_removed(store: LocalStore, root: Path) -> None:
    """A file that a killed process staged goes after a day; a fresh one may still be in use and stays."""
    store.write("a", b"1")
    for name, mtime in (("old.part.sagemaker-ignore", 0.0), ("new.part.sagemaker-ignore", None)):
        path = root / ".store" / name
        path.write_bytes(b"x")
        if mtime is not None:
            os.utime(path, (mtime, mtime))
    store.write("a", b"2")
    assert hidden_files(root) == ["lock", "new.part.sagemaker-ignore"]


STOPPED = """
import os, signal, sys
from pathlib import Path
from job.storage import local
from job.storage.base import Conflict

def stop(*_):
    os.kill(os.getpid(), signal.SIGSTOP)
    return before(*_)

store = local.LocalStore(Path(sys.argv[1]))
tag = store.read("a").tag
if sys.argv[2] == "absent":
    before, os.link = os.link, stop
else:
    before, local.rename = local.rename, stop
try:
    if sys.argv[2] == "delete":
        store.delete("a", if_tag=tag)
        sys.exit(0)
    store.write(*{"tag": ("a", b"late"), "any": ("a", b"late"), "absent": ("b", b"late")}[sys.argv[2]],
                if_absent=sys.argv[2] == "absent", if_tag=tag if sys.argv[2] == "tag" else None)
except Conflict:
    sys.exit(9)
"""


@pytest.mark.parametrize(
    ("kind", "code", "left"),
    [("tag", 9, b"new"), ("absent", 9, b"new"), ("any", 0, b"late"), ("delete", 9, b"new")],
)
def test_a_process_that_stands_still_keeps_nobody_out(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str, code: int, left: bytes
) -> None:
    """A process suspended with the lock loses it, and its condition is checked again when it continues."""
    monkeypatch.setattr(local, "_STUCK_SECONDS", 0.1)
    store = LocalStore(root)
    store.write("a", b"old")
    process = subprocess.Popen([sys.executable, "-c", STOPPED, str(root), kind])
    try:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        store.write("a", b"new")
        store.write("b", b"new")
        process.send_signal(signal.SIGCONT)
        # stopped again at each further try: it has to be woken until it is done
        while not os.WIFEXITED(status := os.waitpid(process.pid, os.WUNTRACED)[1]):
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
    assert os.waitstatus_to_exitcode(status) == code
    stored = store.read("b" if kind == "absent" else "a")
    assert stored is not None
    assert stored.data == left
    store.delete("a")


@pytest.mark.parametrize(("call", "lacks"), [("flock", "locks"), ("replace", "renaming")])
def test_a_file_system_says_what_it_lacks(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, call: str, lacks: str
) -> None:
    """Without locks or renames nothing can be written safely: the settings are wrong, and the error says what lacks."""

    def unknown(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(*((fcntl, "flock") if call == "flock" else (Path, "replace")), unknown)
    with pytest.raises(SettingsError, match=f"does not support {lacks}"):
        store.write("a", b"1")


def test_a_file_system_that_flushes_no_folders_will_do(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems cannot flush a folder; files are still flushed, and the store goes on."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store.write("a/b", b"1")
    store.delete("a/b")
    assert list(store.list()) == []
