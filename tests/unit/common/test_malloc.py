"""Freed memory is kept: a process that repeatedly allocates the same large block faults its pages in only once."""

from __future__ import annotations

import os

from tests import warm


def faults(kept: bool) -> int:  # noqa: FBT001
    """Pages that a process was given for the last ten of twenty blocks of 64 MB, each freed before the next."""
    source = f"""
import resource, torch
from job.common.malloc import keep_freed_memory
assert not {kept} or keep_freed_memory()
for number in range(20):
    torch.ones(1 << 24)
    if number == 9:  # the first blocks grow the heap
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = warm.run([], os.environ, source=source)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_the_pages_of_a_block_are_asked_for_once() -> None:
    """With glibc; where there is another C library, nothing is promised."""
    assert faults(kept=True) * 5 < faults(kept=False)
