"""Recognizes that memory of a GPU or of the machine ran out, frees caches, and reports it as an error with a fix."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from job.common.formatting import first_line, size
from job.errors import JobError, TrainingFailed

if TYPE_CHECKING:
    from types import TracebackType

_FULL = (
    *("out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED", "t allocate memory", "captures_underway.empty()"),
    *("MemoryError", "bad_alloc", "failed to map segment"),
)
"""`captures_underway` is what torch's allocator says instead, when it looks for memory to free after a recording has
failed. `MemoryError` and `bad_alloc` are of a helper process, whose error is text: in Python and in C++. The last one
is what the loader says of a library that an import needs."""
_LIBRARIES_BYTES = 2_300_000_000
"""Address space of a process that has imported torch, transformers, lm-eval and TRL and computed nothing: measured on a
CPU, Python 3.11, 2026-11-30. With less, OpenBLAS waits for memory for ever, and torch's libraries may abort."""
_RESERVE_BYTES = 64 << 20
_ARENA_BYTES = 64 << 20
"""What malloc maps at once for a thread, which may fail where a little less is left."""
_reserve: list[bytes] = []
_OF_A_GPU = re.compile(r"CUDA|CUBLAS|CUDNN|NCCL|\bHIP\b|\bGPU\b|captures_underway", re.IGNORECASE)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error means that a GPU's memory is full, or the machine's.

    Or that it was raised from such an error, or while such an error was handled. Libraries also go on without a module
    for which there was no memory, and a later import misses something of it: where this process's address space is
    limited and has been full, every error of an import counts.
    """
    errors = [*_chain(error)]
    return any(map(says_full, errors)) or (any(map(_in_import, errors)) and _address_space_was_full())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from or while they were handled."""
    waiting, seen = [error], set[int]()
    while waiting:
        error = waiting.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            yield error
            waiting += [error.__context__, error.__cause__]


def is_of_gpu(error: BaseException) -> bool:
    """Whether the memory that ran out, as `out_of_memory` says, is a GPU's; else it is the machine's."""
    torch = sys.modules.get("torch")
    for full in filter(says_full, _chain(error)):
        if torch is not None and isinstance(full, torch.OutOfMemoryError):
            return True
        if not isinstance(full, MemoryError | OSError | ImportError) and _OF_A_GPU.search(str(full)):
            return True
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
    first = first_line(error)
    if is_of_gpu(error):
        return TrainingFailed(f"GPU memory ran out while {activity}; use a GPU with more memory, or {fix} ({first})")
    if any(map(_in_import, _chain(error))):  # no setting makes a library smaller
        return TrainingFailed(f"{imports_failed()} ({first})")
    if isinstance(error, MemoryError | OSError):
        first = ""
    details = "; ".join(filter(None, (_process_limit(), first)))
    return TrainingFailed(
        f"the machine's memory ran out while {activity}; use a machine with more memory, or {fix}"
        f"{f' ({details})' if details else ''}"
    )


def _in_import(error: BaseException) -> bool:
    """Whether an error was raised by the import of a module."""
    if isinstance(error, ImportError):
        return True
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        traceback = traceback.tb_next
    return False


def imports_failed() -> str:
    """The message for memory that runs out while the job's libraries are imported."""
    limit = _process_limit()
    more = f"; {limit}: raise that" if limit else ""
    return f"the machine's memory ran out while libraries were imported; use a machine with more memory{more}"


def check_address_space() -> None:
    """Checks, before libraries are imported that would not report it, that a limit of this process leaves them enough.

    Raises:
        TrainingFailed: It does not.
    """
    limit = _address_space()
    if limit is not None and limit < _LIBRARIES_BYTES and "torch" not in sys.modules:
        raise TrainingFailed(
            f"the machine's memory cannot be used: {_process_limit()}, and the libraries of the job alone take "
            f"{size(_LIBRARIES_BYTES, ' ')}; raise that limit, or remove it (ulimit -v unlimited)"
        )


def _address_space() -> int | None:
    """The most bytes of address space that this process may have; None without a limit."""
    with suppress(ImportError, MemoryError, OSError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        return None if limit == resource.RLIM_INFINITY else limit
    return None


def _address_space_was_full() -> bool:
    """Whether so little of a limited address space was left at some time that the next library may not have fitted."""
    limit = _address_space()
    if limit is None:
        return False
    with suppress(OSError, MemoryError, ValueError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        found = re.search(r"^VmPeak:\s+(\d+) kB", status, re.MULTILINE)
        return found is not None and int(found[1]) * 1024 > limit - _ARENA_BYTES - _RESERVE_BYTES
    return False


def _process_limit() -> str:
    """That limit in words, which ends a process before the machine's memory is full; empty without one."""
    limit = _address_space()
    return "" if limit is None else f"this process is limited to {size(limit, ' ')} of address space (ulimit -v)"


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


def too_small(stage: str, longest: int, error: BaseException, where: str = "", *, free_bytes: int) -> TrainingFailed:
    """The error where not even one row at a time fits.

    Args:
        stage: What memory ran out in.
        longest: Tokens of the longest row.
        error: The original error.
        where: File and line of that row; empty if they are not known.
        free_bytes: Main memory that is available now; not said where a GPU's memory ran out.
    """
    on_gpu, first = is_of_gpu(error), first_line(error)
    if tried := re.search(r"you tried to allocate (\d+) bytes", first):  # of torch on a CPU
        first = f"{size(int(tried[1]), ' ')} more could not be allocated"
    of_machine = () if on_gpu else (f"{size(free_bytes, ' ')} are free now", _process_limit())
    details = "; ".join(filter(None, (first, *of_machine)))
    whose, machine = ("the GPU's", "GPU") if on_gpu else ("the machine's", "machine")
    row = f"the longest row{f', {where},' if where else ''} has {longest:,} tokens"
    return TrainingFailed(
        f"{whose} memory ran out in {stage} with one row at a time: {row}; lower JOB_TRAIN__MAX_LENGTH or "
        f"JOB_LORA__RANK (JOB_DATA__ON_LONG_ROW sets what is done with longer rows), or use a {machine} with more "
        f"memory ({details})"
    )


def keep_reserve() -> None:
    """Keeps address space from which an error can be reported after all other memory has run out.

    Nothing is written to it, so it takes no memory of the machine.
    """
    _reserve.append(bytes(_RESERVE_BYTES))


def give_back_reserve() -> None:
    """To be called before an error is reported, for which libraries may have to be imported."""
    _reserve.clear()


def print_one_line(event: str, why: str, exit_code: int) -> None:
    """Writes an error to stderr as JSON, without the log's libraries, for which there is no memory."""
    line = json.dumps({"event": event, "why": why, "level": "error", "exit_code": exit_code}, ensure_ascii=False)
    with suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))
