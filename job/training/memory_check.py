"""Refuses rows that cannot fit into memory, before training begins.

A row is refused only if it certainly does not fit: if the way of computing it that needs the least memory needs more
than is free, even after the formula's margin of error is subtracted. A row that may fit is tried; if memory runs out
then, training ends with `TrainingFailed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from job.common.formatting import size
from job.errors import Problem, SettingsError
from job.training.memory_model import (
    MARGIN,
    Setup,
    largest_budget,
    least_activation_bytes,
)
from job.training.sequence_parallel import enough_gpus, row_bytes, row_host_bytes

_ADVICE = "lower it (JOB_DATA__ON_LONG_ROW sets what is done with longer rows)"


@dataclass(frozen=True)
class Sharing:
    """How many processes compute the longest row together (`training.sequence_parallel`).

    Attributes:
        processes: Number of processes that compute it.
        may_divide: Number that could compute it if JOB_TRAIN__SEQUENCE_PARALLEL allowed it.
        never: Why no number of processes can divide a row; empty if some number can.
    """

    processes: int = 1
    may_divide: int = 1
    never: str = ""

    def advice(self, setup: Setup, fits: Callable[[int], bool]) -> str:
        """Advice about more GPUs, to be appended to the other advice; empty if they would not help.

        Args:
            setup: The model, its adapter, and how they are trained.
            fits: Whether the row would fit if it were divided over this number of processes.
        """
        enough = enough_gpus(setup, lambda count: count > self.processes and fits(count))
        if enough is None:
            return ""
        if self.never:
            return f"; several GPUs cannot compute it together: {self.never}"
        if self.may_divide > self.processes and fits(self.may_divide):
            return f", or set JOB_TRAIN__SEQUENCE_PARALLEL=auto: the {self.may_divide} GPUs then compute it together"
        return f", or use {enough} such GPUs, which compute it together"


def refuse_rows(
    setup: Setup,
    longest: int,
    *,
    free_bytes: int,
    host_bytes: int | None,
    offload: bool | None,
    copies: int | None,
    where: str = "",
    sharing: Sharing = Sharing(),
) -> None:
    """Refuses the longest row if it certainly does not fit.

    Args:
        setup: The model, its adapter, and how they are trained.
        longest: Tokens of the longest row.
        free_bytes: Free memory of the device, with the model loaded.
        host_bytes: Main memory available to this process; None if the device is the CPU.
        offload: `JOB_TRAIN__OFFLOAD_ACTIVATIONS`; None to choose.
        copies: As in `long_row_bytes`; None if `training.long_rows` does not compute long rows.
        where: File and line of the row; empty if they are not known.
        sharing: How many processes compute the row together.

    Raises:
        SettingsError: The row does not fit.
    """

    def on_device(tokens: int) -> int:
        return _least(setup, tokens, sharing.processes, offload=offload, copies=copies)

    def in_main_memory(tokens: int) -> int:
        return row_host_bytes(setup, tokens, sharing.processes, kept_attention=False)

    def more_gpus(*, offload: bool | None) -> str:
        if copies is None or host_bytes is None:
            return ""
        needs = partial(_least, setup, longest, offload=offload, copies=copies)
        return sharing.advice(setup, lambda count: needs(count) <= free_bytes)

    row = f"the longest row{f', {where},' if where else ''} has {longest:,} tokens"
    row += f" and is divided over {sharing.processes} GPUs" if sharing.processes > 1 else ""
    device = "the GPU's memory" if host_bytes is not None else "the machine's memory"
    if (need := on_device(longest)) > free_bytes:
        fix = _ADVICE
        if (
            offload is False
            and copies is not None
            and _least(setup, longest, sharing.processes, offload=None, copies=copies) <= free_bytes
        ):
            fix += ", set JOB_TRAIN__OFFLOAD_ACTIVATIONS=auto"
        _refuse(row, need, free_bytes, device, on_device, longest, fix, more_gpus(offload=offload))
    if copies is None or host_bytes is None or offload is False:
        return
    without_offloading = _least(setup, longest, sharing.processes, offload=False, copies=copies)
    if (offload or without_offloading > free_bytes) and (need := in_main_memory(longest)) > host_bytes:
        fix = _ADVICE
        if without_offloading <= free_bytes:
            fix += ", set JOB_TRAIN__OFFLOAD_ACTIVATIONS=auto"
        # The processes of a machine share its main memory, so more GPUs help only if the row fits without offloading.
        _refuse(row, need, host_bytes, "the machine's memory", in_main_memory, longest, fix, more_gpus(offload=False))


def _least(setup: Setup, tokens: int, processes: int, *, offload: bool | None, copies: int | None) -> int:
    """The least bytes on the device that the settings allow, minus the formula's margin of error."""
    if copies is None:
        return int((1 - MARGIN) * least_activation_bytes(setup, tokens))
    need = row_bytes(setup, tokens, processes, offloaded=offload is not False, kept_attention=False, copies=copies)
    return int((1 - MARGIN) * need)


def _refuse(  # noqa: PLR0917 - the message contains all of them
    row: str, need: int, free: int, memory: str, needs: Callable[[int], int], longest: int, fix: str, more: str
) -> None:
    fits = largest_budget(needs, free, longest)
    what = (
        f"{row}; these take at least {size(need, ' ')} of {memory} for activations, and {size(free, ' ')} are free; "
        f"about {fits:,} tokens fit: {fix}, or use a machine with more{more}"
    )
    raise SettingsError([Problem("JOB_TRAIN__MAX_LENGTH", what)])
