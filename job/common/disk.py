"""Files on a local disk: written atomically and durably; errors of the disk as errors of the job."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from job.errors import AccessDenied, Problem, SettingsError, Unreachable

_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FAILING = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOTCONN}
_NO_NAME = {errno.ENAMETOOLONG, errno.ELOOP}
# Errors of a file system for a call that it does not support.
_UNKNOWN = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`; on success the file written there replaces `path`, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not derived from the name, which may already be as long as the file system allows.
    temporary = path.parent / f".{uuid4().hex}.part"
    try:
        yield temporary
        sync(temporary)
        rename(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def rename(path: Path, target: Path) -> None:
    """Renames a file within a file system, replacing a file of that name."""
    with lacking("renaming of files"):
        path.replace(target)


def sync_folder(path: Path) -> None:
    """Flushes the entries of a folder to the disk, if the file system supports that."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in {*_UNKNOWN, errno.EINVAL, errno.EBADF, errno.EISDIR}:
            raise


@contextmanager
def lacking(feature: str) -> Iterator[None]:
    """Turns the error of a file system that does not support `feature` into a SettingsError."""
    try:
        yield
    except OSError as error:
        if error.errno not in {*_UNKNOWN, errno.ENOLCK, errno.EXDEV}:
            raise
        use = "use a folder on another file system, or a bucket, such as s3://bucket/prefix"
        problem = f"this file system does not support {feature} ({error.strerror}); {use}"
        raise SettingsError([Problem(str(error.filename or "storage"), problem)]) from error


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether a file may not be used or has an impossible name, a disk is full or fails, or too many files are open.

    Such an error is about neither the content of a file nor this program, whoever happens to meet it.
    """
    return isinstance(error, OSError) and error.errno in _REFUSED | _FULL | _FAILING | _NO_NAME


@contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turns errors of a local disk into errors of the job, except `FileNotFoundError`, which passes."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        message = (
            f"{error.filename} exists: a name cannot be both an object and a folder of objects; remove or rename it"
        )
        raise SettingsError([Problem(action, message)]) from error
    except OSError as error:
        if error.errno in _NO_NAME:
            raise SettingsError([Problem(action, f"{error.strerror} ({error.filename}); give another path")]) from error
        if error.errno in _REFUSED:
            raise AccessDenied(f"{action}: {error.strerror} ({error.filename})") from error
        if error.errno in _FULL:
            # Of a copy, the target's folder: the first file is the source, and the second one temporary.
            full = error.filename if error.filename2 is None else Path(os.fsdecode(error.filename2)).parent
            said = ", ".join(str(part) for part in (error.strerror, full) if part)
            raise Unreachable(f"{action}: the disk is full ({said}); free space, or give it more") from error
        raise Unreachable(f"{action}: the disk reports an error: {error}") from error
