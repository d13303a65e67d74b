"""Chooses the execution plan on a GPU: token budget, placement of the base, and what is kept instead of recomputed.

Whether something is kept or recomputed does not change the result's bits; the token budget of a micro-batch does. So
the budget depends only on the GPU's total memory, which is the same on every machine of this kind, and the other
choices depend on the free memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, pstdev

from job.common.gpu_context import CONTEXT_BYTES
from job.records import ExecutionPlan
from job.training.memory_model import (
    EXPERT_COPIES,
    EXPERT_WIDTHS,
    FP32,
    MARGIN,
    Setup,
    activation_bytes,
    training_memory,
    usable_bytes,
)
from job.training.sequence_parallel import row_bytes, row_host_bytes

GIB = 1 << 30
AMPERE, VOLTA = (8, 0), (7, 0)
"""Lowest compute capabilities: `AMPERE` has bf16 and attention for segments of variable length, `VOLTA` fast fp16."""
BUDGETS = ((40 * GIB, 16384), (11 * GIB, 4096), (0, 1024))
"""(minimum bytes of GPU memory, token budget of a micro-batch), the largest first."""
GROUPED = (9, 10)
"""Major compute capabilities (Hopper, Blackwell's data-centre GPUs) for which torch has a grouped matmul kernel, in
bf16. Elsewhere it launches one matmul for each group, and the host waits for the GPU to read the groups' sizes.
Source: torch 2.11, `aten/src/ATen/native/cuda/GroupedBlas.cpp`, `_grouped_mm_cuda`."""
FP8_CAPABILITY = (8, 9)
"""The lowest compute capability with FP8 matrix products: Ada's."""
_REST_BYTES = 4 * GIB
"""Memory that the formulas leave out: tiles of the loss, CUDA graphs, the adapter's copies. 4.1 GiB in the run in the
docstring of `kept_activation_bytes`."""


def why_not_recorded(setup: Setup, capability: tuple[int, int], *, half: str = "bfloat16") -> str | None:
    """Why a wholly fused decoder cannot be recorded as CUDA graphs on this GPU; None if it can.

    Args:
        setup: The model and its training; only the architecture is used.
        capability: The GPU's compute capability.
        half: The compute dtype, by its name in torch.
    """
    if capability < AMPERE:
        return "attention is computed segment by segment on a GPU of compute capability {}.{}".format(*capability)
    if setup.architecture.experts and (half != "bfloat16" or capability[0] not in GROUPED):
        what = "torch reads the group sizes of a mixture's grouped matmul on the host"
        return "{} in {} on a GPU of compute capability {}.{}".format(what, half, *capability)
    return setup.architecture.not_recorded


def choose_budget(total_bytes: int) -> int:
    """The token budget of a micro-batch; `total_bytes` is the GPU memory that the job may use."""
    return next(budget for least, budget in BUDGETS if total_bytes >= least)


def longest_sequence(lengths: Sequence[int], global_batch_size: int, budget: int) -> int:
    """Estimated tokens of the longest packed sequence of any step; an underestimate is very unlikely.

    The estimate is the mean of a step's tokens plus six standard deviations. If a step exceeds it and memory runs out,
    the step is repeated with less memory (`step.py`).

    Args:
        lengths: Tokens of each example.
        global_batch_size: Examples of a step.
        budget: The token budget of a micro-batch.
    """
    tokens = global_batch_size * fmean(lengths) + 6 * global_batch_size**0.5 * pstdev(lengths)
    return max(*lengths, min(budget, int(tokens)))


def kept_activation_bytes(setup: Setup, tokens: int) -> int:
    """Bytes of activations that all layers keep for the backward pass of a sequence, with fused layers.

    In the compute dtype, each layer keeps for each token:

    - the input of every norm;
    - the inputs of the linear layers after two norms (in families with norms only after their linear layers, these
      layers read the residual stream, which is already counted as an input of norms);
    - queries and attention's output; queries and keys a second time if they have norms;
    - gate, up and their product, which a mixture of experts recomputes.

    Source: counted in `model/fused`. On an H100 with Mistral-7B's shape and 3,722 tokens a sequence on average, the
    formula gives 15.0 GiB; the measured peak was 36.2 GiB, of which 4.0 were NF4 weights and 13.0 dequantized ones.

    Args:
        setup: The model, its adapter, and how they are trained.
        tokens: Tokens of the sequence.
    """
    a = setup.architecture
    stream = (2 + a.norms) * a.hidden
    heads = 2 * a.queries + (a.queries + a.keys if a.query_norm else 0)
    of_all_layers = setup.value_bytes * a.layers * (stream + heads + (2 if a.experts else 3) * a.intermediate) * tokens
    # While a mixture's layer computes, it also needs its experts' dequantized weights and a copy of each token for each
    # of its experts.
    now = a.largest_matrix + (EXPERT_COPIES * a.copies + EXPERT_WIDTHS * a.intermediate) * tokens
    return of_all_layers + setup.value_bytes * now * bool(a.experts)


def choose_plan(
    setup: Setup,
    *,
    free_bytes: int,
    sequence_tokens: int,
    keep_base: bool | None,
    keep_activations: bool | None,
    recorded: bool,
    not_recorded: str | None = None,
    fp8: bool = False,
) -> ExecutionPlan:
    """The fastest plan with fused layers that fits into memory; the caller, which fuses the layers, sets `forward`.

    Activations, the base's dequantized weights, both or neither are kept. If only one fits, activations are preferred:
    on an H100 keeping activations gave 13,960 target tokens/s, keeping the base 10,714, both 15,067, neither 9,861.

    If the base is not on the GPU (`choose_placement`), it is not kept dequantized, and no CUDA graph is recorded, since
    a graph would not contain the copies that bring each layer's weights.

    Args:
        setup: The model, its adapter, and how they are trained.
        free_bytes: Free GPU memory after the quantized model was loaded according to `setup.placement`.
        sequence_tokens: Tokens of the longest packed sequence of any step.
        keep_base: Whether to keep the dequantized base; None to choose. True only if `setup.placement` is `gpu`.
        keep_activations: Whether to keep activations; None to choose.
        recorded: Whether the whole decoder is fused, so that its kernels can be recorded. Else transformers' own code
            runs between the fused layers, and keeps more activations.
        not_recorded: Why a wholly fused decoder cannot be recorded on this GPU; None if it can.
        fp8: Whether training computes in FP8: then the kept base is two copies of the weights in FP8.
    """
    on_gpu = setup.placement == "gpu"
    known, recorded, rest = recorded, recorded and on_gpu, _REST_BYTES if on_gpu else _beside(setup)
    # Two bytes a weight either way: once in bf16, or twice in FP8 (`model/fused/fp8.py`).
    base = 2 * setup.architecture.linear_parameters if setup.quantization != "none" or fp8 else 0
    again = activation_bytes(setup, sequence_tokens)
    tried = []
    for kept_base, kept_activations in ((True, True), (False, True), (True, False), (False, False)):
        if (
            keep_base not in {None, kept_base}
            or keep_activations not in {None, kept_activations}
            or (kept_base and not on_gpu)
        ):
            continue
        activations = again
        if kept_activations and known:
            activations = kept_activation_bytes(setup, sequence_tokens)
        elif kept_activations:
            activations = activation_bytes(replace(setup, recompute=False), sequence_tokens)
        need = int((1 + MARGIN) * (activations + base * kept_base) + rest + CONTEXT_BYTES)
        tried.append((kept_base, kept_activations, need))
        if need <= free_bytes:
            break
    kept_base, kept_activations, need = tried[-1]
    why = f"needs {need / GIB:.1f} of {free_bytes / GIB:.1f} GiB that are free"
    forced = "" if keep_base is None and keep_activations is None else "; partly as set"
    graphs = f"; no CUDA graphs: {not_recorded}" if recorded and not_recorded else ""
    where = {"sharded": "; the base is sharded over the processes", "host": "; the base is in main memory"}
    kept_base &= setup.quantization != "none" or fp8
    recorded &= not_recorded is None
    return ExecutionPlan(
        kept_base=kept_base,
        kept_activations=kept_activations,
        recorded=recorded,
        reason=why + forced + graphs + where.get(setup.placement, ""),
        base_held=setup.placement,
    )


HOST_SHARE = 0.6
"""Share of the available main memory that activations of long rows may fill; pinned memory cannot be swapped out."""


def choose_long_rows(
    plan: ExecutionPlan,
    setup: Setup,
    *,
    tokens: int,
    free_bytes: int,
    host_bytes: int,
    offload: bool | None,
    copies: int,
    tile: int,
    divided: tuple[int, int] | None = None,
    attention: str | None = None,
) -> ExecutionPlan:
    """`plan`, completed with the fastest way to compute long rows layer by layer that fits into memory.

    Tried in this order: layer inputs and attention's output on the GPU; both in main memory; only layer inputs, on the
    GPU; only layer inputs, in main memory. Keeping attention's output saves up to a third of attention's time; keeping
    everything on the GPU saves no time as long as the copies to main memory are as fast as the computation.

    Args:
        plan: The plan for the other rows.
        setup: The model, its adapter, and how they are trained.
        tokens: Tokens of the longest micro-batch with a long row that one process computes alone; 0 if there is none.
        free_bytes: Free GPU memory, without the memory that the plan keeps for other rows.
        host_bytes: Main memory available to this process.
        offload: `JOB_TRAIN__OFFLOAD_ACTIVATIONS`; None to choose.
        copies: As in `long_row_bytes`.
        tile: Tokens of a tile.
        divided: (tokens of the longest divided row, processes that compute it together); None if no row is divided.
        attention: The attention kernel that `copies` is about; None in a forecast.
    """
    tried = []
    rows = [row for row in ((tokens, 1), divided) if row is not None and row[0]]
    for offloaded, kept_attention in ((False, True), (True, True), (False, False), (True, False)):
        if offload not in {None, offloaded}:
            continue
        need = max(
            long_row_need(setup, *row, offloaded=offloaded, kept_attention=kept_attention, copies=copies)
            for row in rows
        )
        host = offloaded * max(row_host_bytes(setup, *row, kept_attention=kept_attention) for row in rows)
        tried.append((offloaded, kept_attention, need, host))
        if need <= free_bytes and host <= HOST_SHARE * host_bytes:
            break
    offloaded, kept_attention, need, host = tried[-1]
    longest = max(rows)[0]
    why = f"rows of up to {longest:,} tokens need {need / GIB:.1f} of {free_bytes / GIB:.1f} GiB"
    if divided is not None:
        why = f"{why} on each of {divided[1]} GPUs, over which the longest are divided"
    if offloaded:
        why += f", and {host / GIB:.1f} of {host_bytes / GIB:.1f} GiB of main memory"
    return replace(
        plan,
        offloaded=offloaded,
        kept_attention=kept_attention,
        tile_tokens=tile,
        attention=attention,
        may_offload=offload is not False,
        reason=f"{plan.reason}; {why}",
    )


def long_row_need(
    setup: Setup, tokens: int, processes: int = 1, *, offloaded: bool, kept_attention: bool, copies: int
) -> int:
    """Bytes of GPU memory that a long row needs in addition to base and adapter.

    Includes the formula's margin of error and CUDA's context.

    Args:
        setup: The model, its adapter, and how they are trained.
        tokens: Tokens of the row.
        processes: Number of processes that compute the row together.
        offloaded: As in `long_row_bytes`.
        kept_attention: As in `long_row_bytes`.
        copies: As in `long_row_bytes`.
    """
    activations = row_bytes(setup, tokens, processes, offloaded=offloaded, kept_attention=kept_attention, copies=copies)
    return int((1 + MARGIN) * activations) + _beside(setup) + CONTEXT_BYTES


def held_bytes(setup: Setup, plan: ExecutionPlan, tokens: int) -> int:
    """Bytes of GPU memory that a plan keeps between micro-batches: the dequantized base, and the pool of CUDA graphs.

    Args:
        setup: The model, its adapter, and how they are trained.
        plan: A plan from `choose_plan`.
        tokens: Tokens of the longest padded sequence.
    """
    base = 2 * setup.architecture.linear_parameters * plan.kept_base
    if not plan.recorded:
        return base
    activations = kept_activation_bytes if plan.kept_activations else activation_bytes
    return base + int((1 + MARGIN) * activations(setup, tokens))


def choose_placement(
    setup: Setup, *, memory_bytes: int, placements: Sequence[str], needs: Callable[[Setup], int]
) -> str:
    """The first placement of the base's quantized weights with which the run fits on the GPU, else the last.

    Args:
        setup: The model, its adapter, and how they are trained.
        memory_bytes: Usable GPU memory before anything is loaded.
        placements: Keys of `memory_model.PLACEMENTS` to choose from, the fastest first.
        needs: Gives the run's peak of GPU memory in bytes for a setup with a `placement`.
    """
    usable = usable_bytes(memory_bytes)
    return next((one for one in placements if needs(replace(setup, placement=one)) <= usable), placements[-1])


def _beside(setup: Setup) -> int:
    """Bytes that training needs besides weights, the adapter's fp32 values, activations and CUDA graphs."""
    memory = training_memory(setup, 0)
    return memory.total - memory.weights - memory.activations - FP32 * setup.adapter
