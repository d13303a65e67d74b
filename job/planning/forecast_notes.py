"""What `plan` says of a GPU besides its figures: why a run does not fit, what slows it down, and what would help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from job.common.formatting import size
from job.planning.forecast_input import HALF_PRECISION, RunShape
from job.planning.forecast_memory import (
    answer_bytes,
    computed_in_tiles,
    free_for_original_base,
    gpus_of_longest_row,
    original_base_bytes,
    peak_bytes,
    scores_original_base,
)
from job.planning.forecast_time import reading_original_seconds
from job.planning.gpu_prices import Gpu
from job.records import ExecutionPlan
from job.training import memory_model
from job.training.execution_plan import AMPERE, FP8_CAPABILITY
from job.training.memory_model import Setup
from job.training.sequence_parallel import MOST_GPUS, enough_gpus, row_host_bytes

FLASH_CAPABILITY = (8, 0)
"""Compute capability from which there is a kernel for packed sequences; below, attention runs example by example."""


def why_it_does_not_fit(gpu: Gpu, run: RunShape, setup: Setup, *, needs_tiles: bool) -> str:
    """What a run that a GPU cannot carry out lacks there, and which settings would help.

    `needs_tiles` says whether the longest row is one that GPUs from Ampere on compute in tiles.
    """
    if run.fp8 and gpu.capability < FP8_CAPABILITY:
        lacks = "has no FP8 products: JOB_TRAIN__COMPUTE=fp8 is refused there"
    else:
        usable, need = memory_model.usable_bytes(gpu.memory_bytes), peak_bytes(run, setup)
        lacks = f"{size(need, ' ')} are needed, and {size(usable, ' ')} can safely be used"
        lacks += _other_placement(run, setup, usable)
        if needs_tiles and gpu.capability < AMPERE:
            lacks += "; only GPUs from Ampere on compute rows of this length in tiles"
        lacks += _answer_too_long(run, setup, usable)
    return _joined(lacks, _enough_to_divide(gpu, run, setup))


def why_slower(gpu: Gpu, run: RunShape, setup: Setup, execution: ExecutionPlan | None, hours: float | None) -> str:
    """What costs time in a run that fits on a GPU, what is left out there, and which settings would change it."""
    return _joined(
        _without_flash(gpu, setup),
        _left_out(gpu, run, setup),
        *(_longest_row(gpu, run, setup, execution) if run.trains else ()),
        _base_elsewhere(gpu, run, setup),
        _reading_original(gpu, run, setup, hours),
    )


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _other_placement(run: RunShape, setup: Setup, usable: int) -> str:
    """How many GPUs are enough for a base that is sharded over too few, and whether it fits in main memory."""
    if setup.placement != "sharded":
        return ""
    needs = partial(peak_bytes, run)
    enough = _gpus_to_shard(setup, usable, needs)
    more = "" if enough is None else f"; {enough} of these GPUs are enough (JOB_RUN__PROCESSES={enough})"
    host = needs(replace(setup, placement="host")) <= usable
    return f"{more}{'; JOB_MODEL__PLACEMENT=host fits' if host else ''}"


def _answer_too_long(run: RunShape, setup: Setup, usable: int) -> str:
    """Which setting shortens a generated answer, where not even one fits."""
    if (need := answer_bytes(run, setup)) <= usable:
        return ""
    prompt, tokens = run.answered
    cache = size(memory_model.cache_bytes(setup, tokens), " ")
    fix = "lower JOB_EVAL__PROMPTS_MAX_NEW_TOKENS, or the max_gen_toks of the task"
    what = f"an answer of {tokens - prompt:,} tokens to a prompt of {prompt:,} takes {size(need, ' ')}, {cache} of it"
    return f"; {what} for its cache: {fix}"


def _enough_to_divide(gpu: Gpu, run: RunShape, setup: Setup) -> str:
    """How many GPUs are enough to divide a long row that does not fit on the run's."""
    if not run.trains or not run.divide or not computed_in_tiles(run, run.micro_batch):
        return ""
    usable = memory_model.usable_bytes(gpu.memory_bytes)

    def need(count: int) -> int:
        first = run.first_stage and replace(run.first_stage, processes=count)
        return peak_bytes(replace(run, processes=count, first_stage=first), replace(setup, processes=count))

    enough = enough_gpus(setup, lambda count: need(count) <= usable)
    if enough is None:
        return ""
    return f"{enough} of these GPUs compute the longest row together (JOB_RUN__PROCESSES={enough})"


def _without_flash(gpu: Gpu, setup: Setup) -> str:
    if gpu.capability >= FLASH_CAPABILITY or setup.value_bytes != HALF_PRECISION:
        return ""
    return "has no kernel for attention over many sequences at once; how much slower it is has not been measured"


def _left_out(gpu: Gpu, run: RunShape, setup: Setup) -> str:
    """The note on the unquantized base, where it is to be scored and does not fit."""
    if not run.full_precision or scores_original_base(gpu, run, setup):
        return ""
    takes = size(original_base_bytes(run, setup), " ")
    free = size(max(0, free_for_original_base(gpu, setup)), " ")
    return f"the unquantized base is not scored: it takes {takes}, and {free} can safely be used"


def _longest_row(gpu: Gpu, run: RunShape, setup: Setup, execution: ExecutionPlan | None) -> tuple[str, str]:
    """Over how many GPUs the longest row is divided, and whether its activations go to main memory."""
    over = gpus_of_longest_row(run, setup, memory_model.usable_bytes(gpu.memory_bytes))
    divided = f"the longest row is divided over the {over} GPUs" if over > 1 else ""
    if execution is None or not execution.offloaded:
        return divided, ""
    least = size(row_host_bytes(setup, run.micro_batch, over, kept_attention=False), " ")
    return divided, f"activations of the longest row are kept in main memory, at least {least}"


def _base_elsewhere(gpu: Gpu, run: RunShape, setup: Setup) -> str:
    """Where a base is that is not on the GPU as a whole, and which faster placement fits."""
    if setup.placement == "gpu":
        return ""
    if setup.placement == "sharded":
        return f"the base's 4-bit weights are sharded over the {setup.processes} GPUs"
    usable, needs = memory_model.usable_bytes(gpu.memory_bytes), partial(peak_bytes, run)
    faster = ""
    if needs(replace(setup, placement="gpu")) <= usable:
        faster = "; they fit on this GPU too, which is faster (JOB_MODEL__PLACEMENT=gpu)"
    elif (enough := _gpus_to_shard(setup, usable, needs)) is not None:
        faster = f"; {enough} of these GPUs hold them sharded, which is faster"
    return f"{memory_model.copies_in_main_memory(setup, run.processes_here)}{faster}"


def _gpus_to_shard(setup: Setup, usable: int, bytes_needed: Callable[[Setup], int]) -> int | None:
    """How many GPUs of `usable` bytes are enough for a sharded base; None where `MOST_GPUS` are too few."""
    sharded = (replace(setup, placement="sharded", processes=count) for count in range(2, MOST_GPUS + 1))
    return next((candidate.processes for candidate in sharded if bytes_needed(candidate) <= usable), None)


def _reading_original(gpu: Gpu, run: RunShape, setup: Setup, hours: float | None) -> str:
    """Which setting saves reading the unquantized base, if that takes more than half of all hours."""
    reading = reading_original_seconds(setup) / 3600
    if hours is None or reading < hours / 2 or run.first_stage is not None:
        return ""
    if not scores_original_base(gpu, run, setup):
        return ""
    return f"{reading:.2f} of the hours are for reading the unquantized base (JOB_EVAL__FULL_PRECISION=off: not scored)"
