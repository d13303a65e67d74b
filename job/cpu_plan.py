"""Whether a CPU keeps the activations of a micro-batch or computes them again: what the machine's memory allows."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from job.estimate import Setup, activation_bytes

SHARE = 0.5
"""Of the memory that is available, what activations may take: neighbours need some, and formulas leave things out."""
GROUPS = Path("/sys/fs/cgroup")
_VERSIONS = (("", "max", "current"), ("memory", "limit_in_bytes", "usage_in_bytes"))
"""Of control groups, the newer one first: their folder, and the ends of the names of their files."""


def keeps_activations(setup: Setup, tokens: int, processes: int) -> bool:
    """Whether there is room for them.

    Args:
        setup: What is trained.
        tokens: Of the largest micro-batch.
        processes: How many train on this machine.
    """
    return processes * activation_bytes(replace(setup, recompute=False), tokens) <= SHARE * available_bytes()


def available_bytes(groups: Path = GROUPS) -> int:
    """Memory that can be had without swapping, by the kernel and by the limits of this container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for folder, limit, used in _VERSIONS:
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            most, taken = (int((groups / folder / f"memory.{name}").read_text()) for name in (limit, used))
            free = min(free, most - taken + _reclaimable(groups / folder / "memory.stat"))
    return max(0, free)


def _reclaimable(statistics: Path) -> int:
    """Bytes of files that were read and are not in use, which count as taken until somebody needs the memory."""
    lines = (line.split() for line in statistics.read_text().splitlines())
    return max((int(value) for name, value in lines if name.endswith("inactive_file")), default=0)
