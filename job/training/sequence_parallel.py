"""Which long rows all processes of a run compute together, and how much memory that takes. Pure functions, no torch.

A long row (`training.long_rows`) that does not fit on one GPU is divided over N processes: each has the hidden states
of 1/N of its tokens, and computes attention for 1/N of the heads over all tokens (`model.fused.sequence_parallel`).

Whether a row is divided affects the last bits of a gradient. Therefore it depends on the total memory of GPU and
machine, not on the memory that is free at the moment, and a resumed run keeps the limit of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from job.model.architecture import Architecture
from job.training.memory_model import (
    ATTENTION_COPIES,
    LONG_ROW,
    Memory,
    Setup,
    largest_budget,
    long_row_bytes,
    long_row_host_bytes,
    training_memory,
    usable_bytes,
)

MOST_GPUS = 8
"""The largest number of GPUs that a message suggests: those of one machine."""


def why_not_divided(architecture: Architecture, processes: int) -> str | None:
    """Why this number of processes cannot share the model's attention heads; None if it can.

    Each process needs whole key/value heads. With more processes than key/value heads, several processes get a copy of
    the same key/value head, and each an equal part of its query heads.
    """
    heads, kv_heads = architecture.heads, architecture.kv_heads
    if processes <= kv_heads or (processes % kv_heads == 0 and heads % processes == 0):
        return None
    fix = f"at most {kv_heads}, or a multiple of {kv_heads} that divides {heads}"
    if kv_heads == 1:
        fix = f"a number that divides {heads}"
    return f"{heads} heads with {kv_heads} of keys and values cannot be divided over {processes} processes: use {fix}"


def divided_row_bytes(
    setup: Setup, tokens: int, processes: int, *, offloaded: bool, kept_attention: bool, copies: int
) -> int:
    """Bytes of activations on each GPU at the peak of a divided row of `tokens`; the rest as for `long_row_bytes`.

    A GPU needs the memory of a row of `tokens / processes` tokens, and in addition: the kernel's fp32 gradients of the
    queries, which cover all tokens; and second copies of queries, keys, values and attention's output, which exist
    divided by tokens and divided by heads while they are exchanged.
    """
    a = setup.architecture
    own = -(-tokens // processes)
    keys = a.keys * max(1, processes // a.kv_heads)
    exchanged = setup.value_bytes * (2 * a.queries + 2 * keys) * own
    alone = long_row_bytes(setup, own, offloaded=offloaded, kept_attention=kept_attention, copies=copies * processes)
    return alone + exchanged


def row_bytes(
    setup: Setup, tokens: int, processes: int = 1, *, offloaded: bool, kept_attention: bool, copies: int
) -> int:
    """Bytes of activations on each GPU for a row that `processes` compute; arguments as for `divided_row_bytes`."""
    if processes == 1:
        return long_row_bytes(setup, tokens, offloaded=offloaded, kept_attention=kept_attention, copies=copies)
    return divided_row_bytes(
        setup, tokens, processes, offloaded=offloaded, kept_attention=kept_attention, copies=copies
    )


def row_host_bytes(setup: Setup, tokens: int, processes: int = 1, *, kept_attention: bool) -> int:
    """Bytes of main memory that each process needs for such a row if its activations are offloaded."""
    return long_row_host_bytes(setup, -(-tokens // processes), kept_attention=kept_attention)


def row_memory(
    setup: Setup,
    tokens: int,
    processes: int = 1,
    *,
    offload: bool | None = None,
    copies: int = ATTENTION_COPIES,
) -> Memory:
    """Memory of each GPU for a row that is computed layer by layer, in the way that takes the least GPU memory.

    Args:
        setup: The model, its adapter, and how they are trained.
        tokens: Tokens of the row.
        processes: Number of processes that compute the row together.
        offload: `JOB_TRAIN__OFFLOAD_ACTIVATIONS`; None to choose.
        copies: As in `long_row_bytes`.
    """
    tokens = max(tokens, LONG_ROW + 1)
    alone = training_memory(setup, tokens, tiles=True, offload=offload, copies=copies)
    if processes == 1:
        return alone
    whole, shared = (
        row_bytes(setup, tokens, n, offloaded=offload is not False, kept_attention=False, copies=copies)
        for n in (1, processes)
    )
    return replace(alone, activations=alone.activations - whole + shared)


def least_memory(
    setup: Setup, tokens: int, processes: int, *, offload: bool | None = None, copies: int = ATTENTION_COPIES
) -> Memory:
    """The smaller `row_memory` of two: one process computes the row, or all do.

    Arguments as for `row_memory`, but `processes` is the number that may divide the row; 1 if it may not be divided.
    """
    ways = [row_memory(setup, tokens, n, offload=offload, copies=copies) for n in {1, processes}]
    return min(ways, key=lambda memory: memory.total)


def tokens_alone(
    setup: Setup,
    most: int,
    *,
    memory_bytes: int,
    host_bytes: int,
    offload: bool | None,
    copies: int = ATTENTION_COPIES,
) -> int:
    """Tokens of the longest row that one process can compute alone, at most `most`; longer rows are divided.

    Args:
        setup: The model, its adapter, and how they are trained.
        most: Tokens of the run's longest row.
        memory_bytes: Total GPU memory, or the usable part of it.
        host_bytes: Main memory that activations of each process may fill, of the machine's total.
        offload: `JOB_TRAIN__OFFLOAD_ACTIVATIONS`; None to choose.
        copies: As in `long_row_bytes`.
    """

    def lacks(tokens: int) -> int:
        fits = {
            offloaded: row_memory(setup, tokens, offload=offloaded, copies=copies).total <= usable_bytes(memory_bytes)
            for offloaded in (False, True)
            if offload in {None, offloaded}
        }
        fits[True] = fits.get(True, False) and row_host_bytes(setup, tokens, kept_attention=False) <= host_bytes
        return 0 if any(fits.values()) else 1

    return max(LONG_ROW, largest_budget(lacks, 0, most))


def enough_gpus(setup: Setup, fits: Callable[[int], bool]) -> int | None:
    """The least number of GPUs that could compute a row together; None if no number from 2 to `MOST_GPUS` could.

    Args:
        setup: The model and its training; only the numbers of attention heads are used.
        fits: Whether the row fits into each GPU's memory if it is divided over this number of GPUs.
    """
    counts = (n for n in range(2, MOST_GPUS + 1) if why_not_divided(setup.architecture, n) is None)
    return next((n for n in counts if fits(n)), None)
