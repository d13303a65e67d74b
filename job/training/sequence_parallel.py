"""Which long rows all processes of a run compute together, and in which memory. Pure functions of numbers, no torch.

A long row (`training.long_rows`) that does not fit on one GPU is divided: each of N processes has the hidden states of
1/N of its tokens, and around attention it exchanges them for 1/N of the heads of all tokens
(`model.fused.sequence_parallel`).

Which rows are divided affects the last bits of a gradient. So it follows from the memory of the GPU and the machine in
all, and not from what is free at the moment; and a resumed run keeps what its checkpoint says.
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
"""Up to which a number of GPUs is suggested: those of one machine."""


def why_not_divided(architecture: Architecture, processes: int) -> str | None:
    """Why so many processes cannot share the heads of attention; None if they can.

    Each needs whole heads of keys and values, or, where there are fewer of these than processes, an equal part of the
    queries of one, which it gets a copy of.
    """
    heads, kv_heads = architecture.heads, architecture.kv_heads
    if processes <= kv_heads or (processes % kv_heads == 0 and heads % processes == 0):
        return None
    fix = f"at most {kv_heads}, or a multiple of {kv_heads} that divides {heads}"
    if kv_heads == 1:
        fix = f"a number that divides {heads}"
    return f"{heads} heads with {kv_heads} of keys and values cannot be shared by {processes} processes: take {fix}"


def divided_row_bytes(
    setup: Setup, tokens: int, processes: int, *, offloaded: bool, kept_attention: bool, copies: int
) -> int:
    """Bytes of activations on each GPU at the peak of a row that is divided; arguments as of `long_row_bytes`.

    Each has what a row of its own tokens takes. But the kernel's fp32 gradients of the queries are of all tokens; and
    attention's output is there once by tokens and once by heads, as are queries, keys and values while they are sent.
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
    """The same of a row that so many processes compute: one, or all."""
    if processes == 1:
        return long_row_bytes(setup, tokens, offloaded=offloaded, kept_attention=kept_attention, copies=copies)
    return divided_row_bytes(
        setup, tokens, processes, offloaded=offloaded, kept_attention=kept_attention, copies=copies
    )


def row_host_bytes(setup: Setup, tokens: int, processes: int = 1, *, kept_attention: bool) -> int:
    """Bytes of main memory of each process for such a row, where its activations are offloaded."""
    return long_row_host_bytes(setup, -(-tokens // processes), kept_attention=kept_attention)


def row_memory(
    setup: Setup,
    tokens: int,
    processes: int = 1,
    *,
    offload: bool | None = None,
    copies: int = ATTENTION_COPIES,
) -> Memory:
    """As `training_memory` of a row that is computed layer by layer, in the way that takes the least of the GPU."""
    tokens = max(tokens, LONG_ROW + 1)
    alone = training_memory(setup, tokens, tiles=True, offload=offload, copies=copies)
    if processes == 1:
        return alone
    one, shared = (
        row_bytes(setup, tokens, n, offloaded=offload is not False, kept_attention=False, copies=copies)
        for n in (1, processes)
    )
    return replace(alone, activations=alone.activations - one + shared)


def least_memory(
    setup: Setup, tokens: int, processes: int, *, offload: bool | None = None, copies: int = ATTENTION_COPIES
) -> Memory:
    """The less of a row that one process computes, and of the same that all compute; `processes` is 1 if none is."""
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
    """Tokens of the longest row, of up to `most`, that one process computes; those of more are divided.

    Args:
        setup: What is trained.
        most: Tokens of the longest row there is.
        memory_bytes: Of the GPU, or the part of it that may be used, with nothing in it.
        host_bytes: Of main memory that activations may fill in each process, when nothing is in it.
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
    """The least number of GPUs that could compute a row together; None where no number up to `MOST_GPUS` could.

    Args:
        setup: Of it, the heads.
        fits: Whether a row divided over so many processes fits into the memory of each.
    """
    counts = (n for n in range(2, MOST_GPUS + 1) if why_not_divided(setup.architecture, n) is None)
    return next((n for n in counts if fits(n)), None)
