"""Which examples an optimizer step trains on, and how they are cut into micro-batches. Pure functions, no torch.

A step is a fact: `batch` depends on the seed, the number of rows, the global batch size and the step, and on nothing
else. Restarts, GPUs and micro-batch sizes are execution details that cannot change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """Optimizer steps in one epoch; the last one is smaller where the rows do not divide evenly."""
    return -(-rows // global_batch_size)


@lru_cache(maxsize=4)
def epoch_order(seed: int, rows: int, epoch: int) -> tuple[int, ...]:
    """A permutation of `range(rows)` for one epoch.

    Sorted by hash instead of drawn from a generator: no library's random stream can change under it between versions.
    """
    return tuple(sorted(range(rows), key=lambda row: sha256(f"{seed}:{epoch}:{row}".encode()).digest()))


def batch(seed: int, rows: int, global_batch_size: int, step: int) -> tuple[int, ...]:
    """The rows that optimizer step `step` (from 0) trains on, over all GPUs. Every epoch visits every row once."""
    epoch, index = divmod(step, steps_per_epoch(rows, global_batch_size))
    start = index * global_batch_size
    return epoch_order(seed, rows, epoch)[start : start + global_batch_size]


def shares(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Deals the examples of a step out to the processes: the longest first, each to the one with the fewest tokens.

    Args:
        lengths: Tokens of each example.
        processes: How many there are.

    Returns:
        Positions into `lengths` by process, each exactly once, in order. Some get none where examples are few.
    """
    dealt: list[list[int]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = min(range(processes), key=lambda process: (tokens[process], process))
        dealt[least].append(index)
        tokens[least] += lengths[index]
    return [sorted(share) for share in dealt]


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Packs examples into micro-batches of at most `budget` tokens by first-fit decreasing.

    Args:
        lengths: Tokens of each example.
        budget: Tokens a micro-batch may hold; an example longer than that gets a micro-batch of its own.

    Returns:
        Positions into `lengths`, each exactly once, grouped.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = next((i for i, free in enumerate(room) if free >= lengths[index]), None)
        if slot is None:
            groups.append([])
            room.append(budget)
            slot = len(groups) - 1
        groups[slot].append(index)
        room[slot] -= lengths[index]
    return groups
