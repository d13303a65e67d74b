"""Forecast of GPU memory: what a run needs at its peak, and how the job would carry it out on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import ceil

from job.common.gpu_context import CONTEXT_BYTES
from job.planning.forecast_input import HALF_PRECISION, RunShape
from job.planning.gpu_prices import Gpu
from job.records import ExecutionPlan
from job.training import memory_model
from job.training.execution_plan import (
    AMPERE,
    HOST_SHARE,
    choose_budget,
    choose_long_rows,
    choose_placement,
    choose_plan,
    why_not_recorded,
)
from job.training.memory_model import LONG_ROW, TILE_TOKENS, Setup
from job.training.sequence_parallel import (
    least_memory,
    row_host_bytes,
    row_memory,
    why_not_divided,
)

MAX_TOKENS = 65_536
"""Upper bound of the micro-batch, in tokens, if nothing is known about the data."""
_UNKNOWN_HOST = 1 << 50
"""Bytes of main memory where the machine is not chosen yet."""


def run_on(gpu: Gpu, run: RunShape, setup: Setup) -> RunShape:
    """The run with the micro-batches, tiles and attention kernel that the job chooses on this GPU."""
    first = run.first_stage
    if run.budget_by_gpu:
        run = replace(run, budget=choose_budget(gpu.memory_bytes))
        first = first and replace(first, budget=run.budget)
    copies = memory_model.attention_copies(setup.architecture, gpu.capability)
    in_tiles = gpu.capability >= AMPERE and is_fused(gpu, run, setup)
    first = first and replace(first, tiles=first.tiles and in_tiles, attention_copies=copies)
    return replace(run, tiles=run.tiles and in_tiles, attention_copies=copies, first_stage=first)


def placed_on(gpu: Gpu, run: RunShape, setup: Setup) -> Setup:
    """The setup with the base where the job keeps it: in the first of the placements that fits on this GPU.

    The job chooses it for training, also in a run that exports a finished one.
    """
    setup = replace(setup, processes=run.processes)
    needs = partial(peak_bytes, replace(run, trains=True))
    placement = choose_placement(setup, memory_bytes=gpu.memory_bytes, placements=run.placements, needs=needs)
    return replace(setup, placement=placement)


def peak_bytes(run: RunShape, setup: Setup) -> int:
    """Bytes on the GPU at the peak of the run."""
    if not run.trains:
        return exporting_bytes(run, setup)
    stages = [run] if run.first_stage is None else [run.first_stage, run]
    need = max(
        scoring_bytes(run, setup),
        answer_bytes(run, setup),
        *(training_memory(stage, setup, stage.micro_batch).total for stage in stages),
    )
    if run.merges:  # it is scored unquantized, in place of the quantized base
        need = max(need, scoring_bytes(run, replace(setup, quantization="none")))
    return need


def exporting_bytes(run: RunShape, setup: Setup) -> int:
    """Bytes on the GPU at the peak of a run that exports a finished one.

    The base with the adapter is loaded, and scores the adapter's copies; the merged model is scored in its place. There
    are no gradients and no optimizer.
    """
    loaded = training_memory(run, setup, 0)
    unused = loaded.gradients + loaded.optimizer
    need = scoring_bytes(run, setup) - unused
    if run.merges:
        need = max(need, scoring_bytes(run, replace(setup, quantization="none")) - unused - loaded.adapter)
    return need


def computed_in_tiles(run: RunShape, tokens: int) -> bool:
    """Whether a micro-batch of `tokens` tokens has a row that is computed layer by layer."""
    long = run.workload is not None and run.workload.longest > LONG_ROW
    return run.tiles and long and tokens > LONG_ROW


def gpus_for_a_row(run: RunShape, setup: Setup) -> int:
    """How many GPUs may compute a long row together."""
    if not run.divide or why_not_divided(setup.architecture, run.processes) is not None:
        return 1
    return run.processes


def gpus_of_longest_row(run: RunShape, setup: Setup, usable: int) -> int:
    """How many GPUs compute the longest row together, of `usable` bytes each: 1 where it fits on one."""
    over = gpus_for_a_row(run, setup)
    if over == 1 or not computed_in_tiles(run, run.micro_batch):
        return 1
    alone = row_memory(setup, run.micro_batch, offload=run.offload, copies=run.attention_copies)
    return 1 if alone.total <= usable else over


def training_memory(run: RunShape, setup: Setup, tokens: int) -> memory_model.Memory:
    """Memory of training with micro-batches of `tokens` tokens."""
    if computed_in_tiles(run, tokens):
        gpus = gpus_for_a_row(run, setup)
        return least_memory(setup, tokens, gpus, offload=run.offload, copies=run.attention_copies)
    return memory_model.training_memory(setup, tokens)


def largest_micro_batch(run: RunShape, setup: Setup, usable: int) -> int:
    """The largest micro-batch in tokens that fits into `usable` bytes; 0 if the longest example or scoring does not."""
    if max(scoring_bytes(run, setup), answer_bytes(run, setup)) > usable:
        return 0
    most = run.workload.largest_step if run.workload else MAX_TOKENS
    budget = memory_model.largest_budget(lambda tokens: training_memory(run, setup, tokens).total, usable, most)
    return budget if budget >= (run.workload.longest if run.workload else 1) else 0


def scoring_bytes(run: RunShape, setup: Setup) -> int:
    """Bytes on the GPU at the peak of an evaluation."""
    return memory_model.evaluation_bytes(setup, run.scoring_budget, run.reads)


def answer_bytes(run: RunShape, setup: Setup) -> int:
    """Bytes that one answer takes, the longest; 0 where none is generated."""
    return memory_model.generation_bytes(setup, *run.answered) if run.answered[1] else 0


def original_base_bytes(run: RunShape, setup: Setup) -> int:
    """Bytes of the base with its original weights and of scoring with it, as `stages.full_precision` counts them."""
    original, tokens = replace(setup, quantization="none"), run.scoring_budget
    return memory_model.evaluation_bytes(original, tokens, tokens // 2)


def quantized_base_bytes(setup: Setup) -> int:
    """Bytes of the quantized base and the adapter, which stay on the GPU while the unquantized base is scored."""
    return memory_model.weight_bytes(setup) + memory_model.FP32 * setup.adapter


def scores_original_base(gpu: Gpu, run: RunShape, setup: Setup) -> bool:
    """Whether the base with its original weights is to be scored, and fits next to the quantized one."""
    return run.full_precision and original_base_bytes(run, setup) <= free_for_original_base(gpu, setup)


def free_for_original_base(gpu: Gpu, setup: Setup) -> float:
    """Bytes that the base with its original weights and scoring with it may fill."""
    return memory_model.ORIGINAL_SHARE * (gpu.memory_bytes - CONTEXT_BYTES - quantized_base_bytes(setup))


def execution_on(gpu: Gpu, run: RunShape, setup: Setup, *, host_bytes: int = _UNKNOWN_HOST) -> ExecutionPlan | None:
    """How the job would train on this GPU; None if PEFT's own layers would do the forward pass.

    `host_bytes` of main memory are there for each process.
    """
    if not is_fused(gpu, run, setup):
        return None
    free = gpu.memory_bytes - CONTEXT_BYTES - quantized_base_bytes(setup)
    long = computed_in_tiles(run, run.micro_batch)
    plan = choose_plan(
        setup,
        free_bytes=free,
        sequence_tokens=0 if long else run.micro_batch,
        keep_base=False if long and run.keep_base is None else run.keep_base,
        keep_activations=False if long else run.keep_activations,
        recorded=setup.architecture.fused,
        not_recorded=why_not_recorded(setup, gpu.capability, half="float16" if run.fp16 else "bfloat16"),
        fp8=run.fp8,
    )
    if not long:
        return plan
    over = gpus_of_longest_row(run, setup, memory_model.usable_bytes(gpu.memory_bytes))
    return choose_long_rows(
        plan,
        setup,
        tokens=run.micro_batch if over == 1 else 0,
        divided=(run.micro_batch, over) if over > 1 else None,
        free_bytes=free,
        host_bytes=host_bytes,
        offload=run.offload,
        copies=run.attention_copies,
        tile=TILE_TOKENS,
    )


def main_memory_bytes(gpu: Gpu, run: RunShape, setup: Setup) -> int:
    """Bytes of main memory that a machine must have for the base's weights and activations that are kept there.

    0 where nothing has to be: activations that fit on the GPU without attention's output are not offloaded for lack of
    main memory. The shares of it that the job fills are those that it has in a run.
    """
    weights, rows = memory_model.packed_bytes(setup) if setup.placement == "host" else 0, 0
    execution = execution_on(gpu, run, setup, host_bytes=0) if run.trains else None
    if execution is not None and execution.offloaded:
        over = gpus_of_longest_row(run, setup, memory_model.usable_bytes(gpu.memory_bytes))
        rows = row_host_bytes(setup, run.micro_batch, over, kept_attention=False)
    of_each = max(weights / memory_model.MAIN_MEMORY_SHARE, weights + rows / HOST_SHARE)
    return ceil(run.processes_here * of_each)


def is_fused(gpu: Gpu, run: RunShape, setup: Setup) -> bool:
    """Whether the job's fused layers would compute on this GPU."""
    return run.fused and gpu.capability >= run.fused_from and setup.value_bytes == HALF_PRECISION
