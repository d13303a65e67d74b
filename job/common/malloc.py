"""Memory that a CPU's tensors leave is kept for the next ones.

glibc gives blocks of more than 32 MB back to the kernel as soon as they are freed, and has every page of the next one
filled with zeros: with activations of that size a third of the time of an evaluation.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of its parameters, from `malloc.h`."""
LARGEST = 512 << 20
"""Blocks of more bytes are given back at once, as ever: weights, not activations."""
MOST = 1 << 30
"""Bytes that are kept at most at the end of the heap."""


def keep_freed_memory() -> bool:
    """Returns whether this system's C library could be told so."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library than glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST) and mallopt(_TRIM_THRESHOLD, MOST))
