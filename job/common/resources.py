"""What the machine must have, checked before anything is downloaded: disk, and shared memory for several processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from job import log
from job.errors import Unreachable

MIB = 1 << 20
SLACK_BYTES = 256 * MIB
"""For what is not known beforehand: logs, records of the evaluation, caches of libraries."""
STATES_ON_DISK = 3
"""One that was restored, one that is being uploaded, one that is being written."""
SHARED_MEMORY_BYTES = 1024 * MIB
"""What NCCL and data loaders of several processes are comfortable with; Docker gives 64 MiB."""


def checkpoint_bytes(trainable_parameters: int, optimizer: str) -> int:
    """Estimates a checkpoint: the adapter in fp32, and Adam's two moments, which the 8-bit ones keep in a byte each."""
    moments = 2 if "8bit" in optimizer else 8
    return trainable_parameters * (4 + moments)


def required_bytes(downloads: Iterable[int], checkpoint: int = 0) -> int:
    """Estimates the disk that a run fills.

    Args:
        downloads: Bytes of each source that is copied here: model, data, questions. What is read in place counts 0.
        checkpoint: Bytes of one checkpoint, see `checkpoint_bytes`; the published adapter is never larger.
    """
    return sum(downloads) + (STATES_ON_DISK + 1) * checkpoint + SLACK_BYTES


def check_disk(folder: Path, need_bytes: int) -> None:
    """Refuses a disk that is going to be too full.

    Args:
        folder: Where the job is going to write; it need not exist yet.
        need_bytes: See `required_bytes`.

    Raises:
        Unreachable: There is too little, or it cannot be found out. Another machine may have more: it is worth a retry.
    """
    folder = folder.absolute()
    try:
        place = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise Unreachable(f"{folder}: cannot find out how much disk is free: {error.strerror}") from error
    if free < need_bytes:
        raise Unreachable(
            f"{folder}: {_text(free)} of disk are free and about {_text(need_bytes)} are needed; "
            "free space, give the machine or the pod more, or set JOB_STORAGE__CACHE to a folder on a larger disk"
        )


def check_shared_memory(processes: int, folder: Path = Path("/dev/shm")) -> bool:  # noqa: S108 - it is looked at, not written
    """Whether shared memory is large enough for so many processes; warns if not, because some setups need little."""
    try:
        total = shutil.disk_usage(folder).total
    except OSError:
        total = 0
    if processes <= 1 or total >= SHARED_MEMORY_BYTES:
        return True
    log.get_logger().warning(
        "shared memory is small for several processes",
        folder=str(folder),
        has=_text(total),
        wants=_text(SHARED_MEMORY_BYTES),
        fix="docker run --shm-size=1g, or an emptyDir with medium: Memory mounted there",
    )
    return False


def _text(count: int) -> str:
    return f"{count / (1024 * MIB):.1f} GiB" if count >= 1024 * MIB else f"{count / MIB:.0f} MiB"
