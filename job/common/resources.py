"""What the machine has: free disk, shared memory and available memory, checked before anything is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from job import log
from job.common.formatting import size
from job.common.optimizers import OPTIMIZERS
from job.errors import Unreachable

MIB = 1 << 20
MARGIN_BYTES = 256 * MIB
"""Disk reserve for what cannot be estimated: logs, samples of the evaluation, caches of libraries."""
CHECKPOINTS_ON_DISK = 3
"""The one that was restored, the one that is being uploaded, the one that is being written."""
OTHER_OUTPUT_BYTES = 32 * MIB
"""Reserve in a run's own folder for what cannot be estimated: answers, tokenizer, report, records."""
SHARED_MEMORY_BYTES = 1024 * MIB
"""Enough for NCCL and the data loaders of several processes; Docker's default is 64 MiB."""

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and use of a control group: version 2, version 1."""


def checkpoint_bytes(trainable_parameters: int, optimizer: str) -> int:
    """Estimated bytes of a checkpoint: the adapter in fp32 (4 bytes a parameter) and the optimizer's state."""
    return trainable_parameters * (4 + OPTIMIZERS[optimizer].bytes_per_parameter)


def required_bytes(downloads: Iterable[int], checkpoint: int = 0) -> int:
    """Estimated bytes of disk that a run needs.

    Args:
        downloads: Bytes of each source that is copied to this machine: model, data, questions; 0 if read in place.
        checkpoint: Bytes of one checkpoint, see `checkpoint_bytes`; the published adapter is never larger.
    """
    return sum(downloads) + (CHECKPOINTS_ON_DISK + 1) * checkpoint + MARGIN_BYTES


def output_bytes(checkpoint: int, *, keep: int, saves: int, others: int = 0) -> int:
    """Bytes that a run has at most at once in its own folder, JOB_RUN__OUTPUT.

    The oldest checkpoint is deleted after the newest is complete, so one more than `keep` is there for a moment. What
    follows training is written beside those that are kept.

    Args:
        checkpoint: Bytes of one checkpoint, see `checkpoint_bytes`.
        keep: JOB_CHECKPOINT__KEEP.
        saves: How many checkpoints training writes.
        others: Bytes of all that is written after training.
    """
    return max(min(keep + 1, saves) * checkpoint, min(keep, saves) * checkpoint + others)


def check_disk(folder: Path, need_bytes: int) -> None:
    """Checks that a disk has enough free space.

    Args:
        folder: Where the job is going to write; it need not exist yet.
        need_bytes: See `required_bytes`.

    Raises:
        Unreachable: There is too little space, or it cannot be read. A retry may get a machine with more.
    """
    if (free := disk_space(folder).free) < need_bytes:
        raise Unreachable(
            f"{folder.absolute()}: {size(free, ' ')} of disk are free and about {size(need_bytes, ' ')} are needed; "
            "delete files there, use a machine or pod with a larger disk, or name another one by JOB_STORAGE__CACHE"
        )


@dataclass(frozen=True)
class DiskSpace:
    """The file system that a folder is on, or will be on.

    Attributes:
        device: Names the file system. Two folders with the same number and the same total share their space.
        total: Bytes of all of it.
        free: Bytes that are free for an ordinary user.
        writable: Bytes that are free for this process: root may use what the file system reserves, too.
    """

    device: int
    total: int
    free: int
    writable: int

    def shares(self, other: DiskSpace) -> bool:
        """Whether what is written to one folder is missing in the other. A quota of a folder shows as another total."""
        return (self.device, self.total) == (other.device, other.total)


def disk_space(folder: Path) -> DiskSpace:
    """Measures the disk of a folder, which need not exist yet.

    Raises:
        Unreachable: It cannot be read.
    """
    folder = folder.absolute()
    try:
        place = next(place for place in (folder, *folder.parents) if place.exists())
        usage, device = shutil.disk_usage(place), place.stat().st_dev
    except OSError as error:
        raise Unreachable(f"{folder}: cannot find out how much disk is free: {error.strerror}") from error
    return DiskSpace(device, usage.total, usage.free, usage.total - usage.used if os.geteuid() == 0 else usage.free)


def check_shared_memory(processes: int, folder: Path = Path("/dev/shm")) -> bool:  # noqa: S108 - it is looked at, not written
    """Whether shared memory is large enough for this number of processes; warns if not, since some setups need less."""
    try:
        total = shutil.disk_usage(folder).total
    except OSError:
        total = 0
    if processes <= 1 or total >= SHARED_MEMORY_BYTES:
        return True
    log.get_logger().warning(
        "shared memory is small for several processes",
        folder=str(folder),
        has=size(total, " "),
        wants=size(SHARED_MEMORY_BYTES, " "),
        fix="docker run --shm-size=1g, or an emptyDir with medium: Memory mounted there",
    )
    return False


def available_bytes(groups: Path = CGROUPS, own_groups: Path = OWN_CGROUPS) -> int:
    """Bytes of memory available without swapping: by the kernel, and by the limits of all cgroups of this process."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for group in _groups(groups, own_groups):
        for limit, used in _FILES:
            with suppress(OSError, ValueError):  # the file is missing, or holds "max"
                most, taken = (int((group / name).read_text()) for name in (limit, used))
                free = min(free, most - taken + _reclaimable(group / "memory.stat"))
    return max(0, free)


@dataclass(frozen=True)
class MainMemory:
    """The main memory of this process's machine or container.

    Attributes:
        total_bytes: The machine's, or the least limit of this process's control groups.
        available_bytes: See `available_bytes`.
        oom_kills: Processes of this control group that the kernel has killed because memory was full, since the group
            was made; None where the kernel does not count them.
        group: Names the control group: another one, or one of another start of the machine, has another name.
    """

    total_bytes: int
    available_bytes: int
    oom_kills: int | None = None
    group: str = ""


def main_memory(groups: Path = CGROUPS, own_groups: Path = OWN_CGROUPS) -> MainMemory:
    """The current state of main memory; takes less than a millisecond."""
    import psutil

    total, kills, innermost = int(psutil.virtual_memory().total), None, None
    # The outermost first: the last one with a count is this process's own.
    for group in sorted(_groups(groups, own_groups), key=lambda folder: len(folder.parts)):
        for limit, _ in _FILES:
            with suppress(OSError, ValueError):
                total = min(total, int((group / limit).read_text()))
        for name in ("memory.events", "memory.oom_control"):  # version 2, version 1
            with suppress(OSError, ValueError):
                counts = dict(line.split() for line in (group / name).read_text().splitlines())
                if "oom_kill" in counts:
                    kills, innermost = int(counts["oom_kill"]), group
    name = ""
    if innermost is not None:
        with suppress(OSError):
            name = f"{_BOOT.read_text().strip()}/{innermost.stat().st_ino}"
    return MainMemory(total, available_bytes(groups, own_groups), kills, name)


_BOOT = Path("/proc/sys/kernel/random/boot_id")


def usable_cpus(groups: Path = CGROUPS, own_groups: Path = OWN_CGROUPS) -> int:
    """How many processors this process may keep busy: by its affinity, and by the quotas of all its cgroups."""
    count = len(os.sched_getaffinity(0))
    for group in _groups(groups, own_groups, "cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with suppress(OSError, ValueError):  # the file is missing, or holds "max"
                quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
                if quota > 0:  # version 1 has -1 where there is none
                    count = min(count, max(1, quota // period))
    return count


def _groups(groups: Path, own_groups: Path, controller: str = "memory") -> set[Path]:
    """The folders of this process's cgroups and of their parents. A container sees its own cgroup at the top."""
    folders = {groups, groups / controller}
    with suppress(OSError, ValueError):
        for line in own_groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):
                top = groups / controller if controllers else groups
                inner = PurePosixPath(path.lstrip("/"))
                folders |= {top / part for part in (inner, *inner.parents)}
    return folders


def _reclaimable(statistics: Path) -> int:
    """Bytes of the page cache that count as used, but are freed as soon as memory is needed."""
    with suppress(OSError, ValueError):
        lines = (line.split() for line in statistics.read_text().splitlines())
        return max((int(value) for name, value in lines if name.endswith("inactive_file")), default=0)
    return 0
