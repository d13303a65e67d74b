"""Recognizes that the memory of a GPU or of the machine ran out, and reports it as an error with a fix."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from job.errors import JobError, TrainingFailed

_FULL = ("out of memory", "ALLOC_FAILED", "t allocate memory", "captures_underway.empty()")
"""The last is what torch's allocator says instead, when it looks for memory to free after a recording has failed."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error means that a GPU's memory is full; libraries beside torch have no class for that."""
    torch = sys.modules.get("torch")  # a heavy import; if torch is not imported, no GPU can be full
    while error is not None:
        if torch is not None and isinstance(error, torch.OutOfMemoryError):
            return True
        if any(word in str(error) for word in _FULL):
            return True
        error = error.__context__
    return False


@contextmanager
def memory_errors(what: str, fix: str) -> Iterator[None]:
    """Reports for which work memory ran out. A retry would fail in the same way, so the exit code forbids it.

    Args:
        what: What is done within.
        fix: What the user can do about it.

    Raises:
        TrainingFailed: The memory of the GPU or of the machine ran out within.
    """
    try:
        yield
    except JobError:
        raise
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise TrainingFailed(
            f"the machine's memory ran out while {what}; use a machine with more memory, or {fix}"
        ) from error
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not out_of_memory(error):
            raise
        first = (str(error).splitlines() or [""])[0][:200]
        raise TrainingFailed(
            f"GPU memory ran out while {what}; use a GPU with more memory, or {fix} ({first})"
        ) from error


def too_small(what: str, longest: int, error: BaseException) -> TrainingFailed:
    """The error where not even one row at a time fits, of at most `longest` tokens."""
    first = (str(error).splitlines() or [""])[0][:200]
    return TrainingFailed(
        f"memory ran out in {what} with one row at a time, the longest of {longest:,} tokens; lower "
        f"JOB_TRAIN__MAX_LENGTH or JOB_LORA__RANK, or use a GPU with more memory ({first})"
    )
