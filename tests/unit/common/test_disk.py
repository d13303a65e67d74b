"""Files are written completely or not at all, and errors of the disk are errors of the job."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from job.common.disk import atomic_write, disk_errors
from job.errors import Unreachable


def test_landing_leaves_nothing_of_a_failure(tmp_path: Path) -> None:
    """A file that could not be finished does not appear, and the old one stays."""
    (tmp_path / "a").write_bytes(b"old")

    def interrupted() -> None:
        with atomic_write(tmp_path / "a") as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_landing_takes_the_longest_name(tmp_path: Path) -> None:
    """A name as long as the file system allows can still be written."""
    name = "n" * 255
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_bytes(b"x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_absence_passes_through() -> None:
    """`FileNotFoundError` is an answer, and not turned into a failure of the disk."""
    with pytest.raises(FileNotFoundError), disk_errors("a: cannot read"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a")


def test_a_full_disk_is_the_one_that_was_written_to(tmp_path: Path) -> None:
    """Of a copy, the folder of the second file; its own name is that of a temporary one, which is gone by then."""
    said = os.strerror(errno.ENOSPC)
    with pytest.raises(Unreachable) as raised, disk_errors("store: cannot write a"):
        raise OSError(errno.ENOSPC, said, "/source/a", None, tmp_path / "target" / "b.part")
    assert str(raised.value) == (
        f"store: cannot write a: the disk is full ({said}, {tmp_path}/target); free space, or give it more"
    )
    with pytest.raises(Unreachable, match=rf"is full \({said}, /target/a\)"), disk_errors("cannot write"):
        raise OSError(errno.ENOSPC, said, "/target/a")
