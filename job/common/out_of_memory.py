"""Recognizes that memory of a GPU or of the machine ran out, frees caches, and reports it as an error with a fix."""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from job.common.formatting import first_line
from job.errors import JobError, TrainingFailed

_FULL = (
    *("out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED", "t allocate memory", "captures_underway.empty()"),
    *("MemoryError", "bad_alloc"),
)
"""`captures_underway` is what torch's allocator says instead, when it looks for memory to free after a recording has
failed. The last two are of a helper process, whose error is text: in Python and in C++."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error means that a GPU's memory is full, or the machine's.

    Or that it was raised while such an error was handled.
    """
    while error is not None:
        if says_full(error):
            return True
        error = error.__context__
    return False


def says_full(error: BaseException) -> bool:
    """`out_of_memory` of the error itself.

    Libraries besides torch have no class for that, and helper processes only tell the text of their error.
    """
    torch = sys.modules.get("torch")  # a heavy import; if torch is not imported, no GPU can be full
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return (isinstance(error, OSError) and error.errno == errno.ENOMEM) or any(word in str(error) for word in _FULL)


@contextmanager
def memory_errors(activity: str, fix: str) -> Iterator[None]:
    """Reports for which work memory ran out. A retry would fail in the same way, so the exit code forbids it.

    Args:
        activity: What is done within.
        fix: What the user can do about it.

    Raises:
        TrainingFailed: The memory of the GPU or of the machine ran out within.
    """
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ran_out(activity, fix, error) from error


def ran_out(activity: str, fix: str, error: BaseException) -> TrainingFailed:
    """The error for memory that ran out; arguments as for `memory_errors`, and the original error."""
    if isinstance(error, MemoryError | OSError):
        return TrainingFailed(
            f"the machine's memory ran out while {activity}; use a machine with more memory, or {fix}"
        )
    first = first_line(error)
    return TrainingFailed(f"GPU memory ran out while {activity}; use a GPU with more memory, or {fix} ({first})")


def free_caches() -> None:
    """After memory has run out: frees the tensors of the failed work, and the memory that torch's allocator caches."""
    gc.collect()  # the caught error's frames keep tensors alive in reference cycles
    if (torch := sys.modules.get("torch")) is None:
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:  # torch's allocator refuses while it believes a failed recording to be in progress
        if not out_of_memory(error):
            raise


def too_small(stage: str, longest: int, error: BaseException) -> TrainingFailed:
    """The error where not even one row at a time fits, of at most `longest` tokens."""
    first = first_line(error)
    return TrainingFailed(
        f"memory ran out in {stage} with one row at a time, the longest of {longest:,} tokens; lower "
        f"JOB_TRAIN__MAX_LENGTH or JOB_LORA__RANK, or use a GPU with more memory ({first})"
    )
