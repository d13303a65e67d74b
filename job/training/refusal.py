"""Refuses rows that cannot fit into memory, before training begins.

The longest row is refused if the way to compute it that needs least memory, less the error of the formula, needs more
than is free. A row that may fit is tried, and training ends with `TrainingFailed` if memory runs out.
"""

from __future__ import annotations

from collections.abc import Callable

from job.common.formatting import size
from job.errors import Problem, SettingsError
from job.training.memory_model import (
    MARGIN,
    Setup,
    largest_budget,
    least_activation_bytes,
    long_row_bytes,
    long_row_host_bytes,
)

_ADVICE = "lower it (JOB_DATA__ON_LONG_ROW says what becomes of longer rows)"


def refuse_rows(
    setup: Setup,
    longest: int,
    *,
    free_bytes: int,
    host_bytes: int | None,
    offload: bool | None,
    copies: int | None,
    where: str = "",
) -> None:
    """Does nothing if the longest row may fit.

    Args:
        setup: What is trained.
        longest: Tokens of the longest row.
        free_bytes: Of the device, with the model in it.
        host_bytes: Of main memory that is available to this process; None where the device is the CPU.
        offload: `JOB_TRAIN__OFFLOAD_ACTIVATIONS`; None to choose.
        copies: As in `long_row_bytes`; None where `training.long_rows` does not compute long rows.
        where: File and line of the row; empty if they are not known.

    Raises:
        SettingsError: It cannot fit.
    """

    def on_device(tokens: int) -> int:
        return _least(setup, tokens, offload=offload, copies=copies)

    def in_main_memory(tokens: int) -> int:
        return long_row_host_bytes(setup, tokens, kept_attention=False)

    row = f"the longest row{f', {where},' if where else ''} has {longest:,} tokens"
    device = "the GPU's memory" if host_bytes is not None else "the machine's memory"
    if (need := on_device(longest)) > free_bytes:
        fix = _ADVICE
        if (
            offload is False
            and copies is not None
            and _least(setup, longest, offload=None, copies=copies) <= free_bytes
        ):
            fix += ", set JOB_TRAIN__OFFLOAD_ACTIVATIONS=auto"
        _refuse(row, need, free_bytes, device, on_device, longest, fix)
    if copies is None or host_bytes is None or offload is False:
        return
    alone = _least(setup, longest, offload=False, copies=copies)
    if (offload or alone > free_bytes) and (need := in_main_memory(longest)) > host_bytes:
        fix = _ADVICE
        if alone <= free_bytes:
            fix += ", set JOB_TRAIN__OFFLOAD_ACTIVATIONS=auto"
        _refuse(row, need, host_bytes, "the machine's memory", in_main_memory, longest, fix)


def _least(setup: Setup, tokens: int, *, offload: bool | None, copies: int | None) -> int:
    """The least bytes on the device that the settings allow, less the error of the formula."""
    if copies is None:
        return int((1 - MARGIN) * least_activation_bytes(setup, tokens))
    need = long_row_bytes(setup, tokens, offloaded=offload is not False, kept_attention=False, copies=copies)
    return int((1 - MARGIN) * need)


def _refuse(  # noqa: PLR0917 - all of it is in the message
    row: str, need: int, free: int, memory: str, needs: Callable[[int], int], longest: int, fix: str
) -> None:
    fits = largest_budget(needs, free, longest)
    what = (
        f"{row}, which take at least {size(need, ' ')} of {memory} for activations, and {size(free, ' ')} are free; "
        f"about {fits:,} tokens fit: {fix}, or take a machine with more"
    )
    raise SettingsError([Problem("JOB_TRAIN__MAX_LENGTH", what)])
