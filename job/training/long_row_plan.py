"""Which attention kernel computes long rows, and which of them are divided over the processes.

The processes agree on both, because both affect the last bits of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from job import log
from job.common.resources import main_memory
from job.distributed.processes import Processes
from job.training.execution_plan import HOST_SHARE, longest_sequence
from job.training.gpu_memory import gpu_memory
from job.training.memory_check import Sharing
from job.training.memory_model import LONG_ROW, Setup
from job.training.sequence_parallel import tokens_alone, why_not_divided


@dataclass(frozen=True)
class Rows:
    """The lengths that decide how much memory training needs, in tokens, and how long rows are computed.

    Attributes:
        padded: The longest padded sequence; 0 if every row is computed layer by layer.
        long: The longest micro-batch with a long row that one process computes layer by layer; 0 if all long rows are
            divided; None if no row is computed layer by layer.
        kernel: The attention kernel of rows that are computed layer by layer; None if there are no such rows.
        divided: The longest row that is divided over the processes; 0 if none is.
        above: Rows of more tokens than this are divided; None if no row may be.
        processes: Number of processes that a row is divided over.
    """

    padded: int
    long: int | None
    kernel: str | None = None
    divided: int = 0
    above: int | None = None
    processes: int = 1


def plan_rows(
    model: Any,
    setup: Setup | None,
    lengths: Sequence[int],
    *,
    fused: bool,
    budget: int,
    global_batch_size: int,
    method: str,
    sequence_parallel: Literal["auto", "off"],
    never: str,
    gigabytes: float | None,
    offload: bool | None,
    group: Processes,
) -> Rows | None:
    """How fused layers compute the rows; None without fused layers. All processes call it together.

    Args:
        model: The base with its adapter.
        setup: The model and its training; None if the architecture is not known.
        lengths: Tokens of each example.
        fused: Whether fused layers compute in this process.
        budget: The token budget of a micro-batch.
        global_batch_size: Examples of a step.
        method: A key of `METHODS`.
        sequence_parallel: `JOB_TRAIN__SEQUENCE_PARALLEL`.
        never: Why no row may be divided; empty if one may.
        gigabytes: `JOB_TRAIN__GPU_MEMORY_GB`: usable GPU memory in units of 1e9 bytes; None for all.
        offload: `JOB_TRAIN__OFFLOAD_ACTIVATIONS`; None to choose.
        group: All processes of the run.
    """
    rows = _undivided(model, lengths, budget, global_batch_size, method) if fused else None
    if (longest := max(lengths)) <= LONG_ROW:
        return rows
    several = method == "sft" and group.place.world_size > 1
    divides = several and sequence_parallel == "auto"
    kernel = _agreed_kernel(model, setup, rows, group, divides=divides)
    rows = rows and replace(rows, kernel=kernel)
    if not several:
        return rows
    own = 0
    if divides:
        own = _tokens_alone(
            model, setup, longest, group, gigabytes=gigabytes, offload=offload, never=never, kernel=kernel
        )
    above = _agreed_limit(group, own)  # a collective: also called if this machine's setting forbids dividing
    return rows if rows is None or above is None else _divided(rows, lengths, budget, above, group.place.world_size)


def sharing_of(setup: Setup, longest: int, rows: Rows | None, world_size: int, never: str) -> Sharing:
    """How many processes compute the longest row together, and how many could; `never` as in `Sharing`."""
    above = None if rows is None else rows.above
    return Sharing(
        processes=world_size if above is not None and longest > above else 1,
        may_divide=1 if why_not_divided(setup.architecture, world_size) else world_size,
        never=never,
    )


def _undivided(model: Any, lengths: Sequence[int], budget: int, global_batch_size: int, method: str) -> Rows:
    """The rows as one process would compute them, before a kernel for long rows is chosen."""
    from job.model.fused import fused_decoder
    from job.training.long_rows import why_not_here

    longest = max(lengths)
    if longest > LONG_ROW and method == "sft" and fused_decoder.knows(model.get_base_model()):
        if (why := why_not_here(model)) is None:
            short = [length for length in lengths if length <= LONG_ROW]
            padded = longest_sequence(short, global_batch_size, budget) if short else 0
            return Rows(padded, max(longest, budget))
        log.get_logger().warning("long rows are not computed layer by layer, which takes more memory and time", why=why)
    return Rows(longest_sequence(lengths, global_batch_size, budget), None)


def _tokens_alone(
    model: Any,
    setup: Setup | None,
    longest: int,
    group: Processes,
    *,
    gigabytes: float | None,
    offload: bool | None,
    never: str,
    kernel: str | None,
) -> int:
    """Tokens of the longest row that this process can compute alone; 0 if it cannot take part in a divided row."""
    if setup is None or kernel is None:
        return 0
    from job.model.fused.long_attention import copies_of

    tokens = tokens_alone(
        setup,
        longest,
        memory_bytes=gpu_memory(gigabytes)[0],
        host_bytes=int(HOST_SHARE * main_memory().total_bytes / group.place.local_world_size),
        offload=offload,
        copies=copies_of(setup.architecture, model.device, kernel),
    )
    why = never or why_not_divided(setup.architecture, group.place.world_size)
    if why and tokens < longest:
        log.get_logger().warning("long rows are not divided over the processes, which would take less memory", why=why)
    return 0 if why else tokens


def _agreed_limit(group: Processes, own: int) -> int | None:
    """The number of tokens above which rows are divided, equal in all processes; None if one cannot take part.

    Args:
        group: All processes of the run.
        own: The result of `_tokens_alone` in this process.
    """
    limits = group.gather("tokens of a row that one process computes", own)
    return min(limits) if all(limits) else None


def _divided(rows: Rows, lengths: Sequence[int], budget: int, above: int, processes: int) -> Rows:
    """`rows`, where rows of more than `above` tokens are divided over `processes`."""
    alone = [length for length in lengths if LONG_ROW < length <= above]
    longest = max(lengths)
    return replace(
        rows,
        long=max(*alone, budget) if alone else 0,
        divided=longest if longest > above else 0,
        above=above,
        processes=processes,
    )


def _agreed_kernel(
    model: Any, setup: Setup | None, rows: Rows | None, group: Processes, *, divides: bool
) -> str | None:
    """The attention kernel of long rows, equal in all processes, each of which has tested its own.

    None if no row is computed layer by layer.
    """
    from job.model.fused.long_attention import choose_kernel, slowest

    if setup is None or rows is None or rows.long is None:
        own = None
    else:
        base = model.get_base_model()
        own = choose_kernel(
            setup.architecture,
            base.dtype,
            model.device,
            windowed=getattr(base.config.get_text_config(), "sliding_window", None) is not None,
            processes=group.place.world_size if divides else 1,
        )
    if group.place.world_size == 1:
        return own
    kernels = group.gather("kernel of long rows", own)
    if own is None or None in kernels:
        return own
    if (agreed := slowest(kernels)) != own:
        message = (
            "attention of long rows is computed by a slower kernel, since another process cannot use the faster one"
        )
        change = "that process's log says why it cannot"
        log.get_logger().warning(message, kernel=agreed, faster=own, change=change)
    return agreed
