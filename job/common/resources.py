"""What the machine must have, checked before anything is downloaded: disk, and shared memory for several processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from job import log
from job.common.optimizers import OPTIMIZERS
from job.errors import Unreachable

MIB = 1 << 20
SLACK_BYTES = 256 * MIB
"""For what is not known beforehand: logs, records of the evaluation, caches of libraries."""
STATES_ON_DISK = 3
"""One that was restored, one that is being uploaded, one that is being written."""
SHARED_MEMORY_BYTES = 1024 * MIB
"""What NCCL and data loaders of several processes are comfortable with; Docker gives 64 MiB."""


def checkpoint_bytes(trainable_parameters: int, optimizer: str) -> int:
    """Estimates a checkpoint: the adapter in fp32, and the optimizer's state."""
    return trainable_parameters * (4 + OPTIMIZERS[optimizer].bytes_per_parameter)


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


GROUPS = Path("/sys/fs/cgroup")


OWN = Path("/proc/self/cgroup")


_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and use of a control group, of version 2 and of version 1."""


def available_bytes(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Memory that can be had without swapping, by the kernel and by the limits of all groups that hold this process."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for group in _groups(groups, own):
        for limit, used in _FILES:
            with suppress(OSError, ValueError):  # there is none, or it is "max"
                most, taken = (int((group / name).read_text()) for name in (limit, used))
                free = min(free, most - taken + _reclaimable(group / "memory.stat"))
    return max(0, free)


def _groups(groups: Path, own: Path) -> set[Path]:
    """The folders of this process's groups and of those above them; a container sees its own at the top."""
    found = {groups, groups / "memory"}
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                top = groups / "memory" if controllers else groups
                inner = PurePosixPath(path.lstrip("/"))
                found |= {top / part for part in (inner, *inner.parents)}
    return found


def _reclaimable(statistics: Path) -> int:
    """Bytes of files that were read and are not in use, which count as taken until somebody needs the memory."""
    with suppress(OSError, ValueError):
        lines = (line.split() for line in statistics.read_text().splitlines())
        return max((int(value) for name, value in lines if name.endswith("inactive_file")), default=0)
    return 0
