"""Whether a CPU keeps the activations of a micro-batch or computes them again: what the machine's memory allows."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from job.training.memory_model import Setup, activation_bytes

SHARE = 0.3
"""Of the memory that is available, what activations may take by the formula. With dropout half as much again is kept,
the adapter's gradients and moments come on top, and neighbours need some."""
GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and use of a control group, of version 2 and of version 1."""


def keeps_activations(setup: Setup, tokens: int, processes: int) -> bool:
    """Whether there is room for them.

    Args:
        setup: What is trained.
        tokens: Of the largest micro-batch.
        processes: How many train on this machine.
    """
    return processes * activation_bytes(replace(setup, recompute=False), tokens) <= SHARE * available_bytes()


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
