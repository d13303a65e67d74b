"""Whether a CPU keeps the activations of a micro-batch or computes them again: what the machine's memory allows."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from job.estimate import Setup, activation_bytes

SHARE = 0.5
"""Of the memory that is available, what activations may take: neighbours need some, and formulas leave things out."""
GROUPS = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current"),  # version 2
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
)


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
    for limit, used in _LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            free = min(free, int((groups / limit).read_text()) - int((groups / used).read_text()))
    return max(0, free)
