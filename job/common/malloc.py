"""Has glibc's malloc keep freed memory for the next tensors, instead of returning it to the kernel.

By default glibc returns blocks of more than 32 MB as soon as they are freed. The kernel then fills every page of the
next block with zeros: a third of the time of an evaluation on a CPU (decision 16).
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's `malloc.h`."""
LARGEST = 512 << 20
"""Larger blocks are still returned at once: they are weights, not activations."""
MOST = 1 << 30
"""Most free bytes that are kept at the end of the heap."""


def keep_freed_memory() -> bool:
    """Sets both thresholds of malloc; returns whether the C library took them (glibc does, others do not)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library than glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST) and mallopt(_TRIM_THRESHOLD, MOST))
