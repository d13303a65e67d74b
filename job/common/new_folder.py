"""A folder that appears complete or not at all (atomically)."""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LEFT_SECONDS = 86_400
"""Age at which an unfinished folder is removed."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that takes its place when it is complete, unless another process was there first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".new-*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent, ignore_cleanup_errors=True) as new:
        folder = Path(new) / "base"
        folder.mkdir()
        yield folder
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
