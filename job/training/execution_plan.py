"""Chooses the execution plan on a GPU: the token budget, where the base lies, and what is kept instead of recomputed.

Whether something is kept or recomputed does not change the result's bits; the token budget of a micro-batch does. So
the budget depends only on the GPU's total memory, which is the same on every machine of this kind, and the other
choices depend on the free memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, pstdev

from job.records import ExecutionPlan
from job.training.memory_model import (
    CONTEXT_BYTES,
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
"""The lowest compute capabilities: with bf16 and the attention kernel for variable-length segments; with fast fp16."""
BUDGETS = ((40 * GIB, 16384), (11 * GIB, 4096), (0, 1024))
"""(least bytes of the GPU, token budget of a micro-batch)."""
GROUPED = (9, 10)
"""The major compute capabilities (Hopper, Blackwell's data-centre GPUs) for which torch has a kernel of grouped
products, in bf16. Elsewhere it takes one product for each group, and reads on the host how long each is.
Source: torch 2.11, `aten/src/ATen/native/cuda/GroupedBlas.cpp`, `_grouped_mm_cuda`."""
FP8_CAPABILITY = (8, 9)
"""The lowest compute capability of a GPU with FP8 products: Ada; then Hopper, Blackwell."""
_REST_BYTES = 4 * GIB
"""What the formulas leave out: tiles of the loss, CUDA graphs, the adapter's copies. 4.1 GiB in the run named below."""


def why_not_recorded(setup: Setup, capability: tuple[int, int], *, half: str = "bfloat16") -> str | None:
    """Why a decoder that is fused throughout cannot be recorded on a GPU; None if it can.

    Args:
        setup: Of it, the architecture.
        capability: The GPU's compute capability.
        half: The compute dtype, by its name in torch.
    """
    if capability < AMPERE:
        return "attention goes segment by segment on a GPU of compute capability {}.{}".format(*capability)
    if setup.architecture.experts and (half != "bfloat16" or capability[0] not in GROUPED):
        what = "torch reads the sizes of a mixture's grouped products on the host"
        return "{} in {} on a GPU of compute capability {}.{}".format(what, half, *capability)
    return setup.architecture.not_recorded


def choose_budget(total_bytes: int) -> int:
    """The token budget of a micro-batch, by the size of the GPU or of the part that the job may use."""
    return next(budget for least, budget in BUDGETS if total_bytes >= least)


def longest_sequence(lengths: Sequence[int], global_batch_size: int, budget: int) -> int:
    """Tokens of the longest packed sequence of any step, with a negligible probability of an underestimate.

    The estimate is the mean of a step's tokens plus six standard deviations. If a step exceeds it and memory runs out,
    the step is repeated with less memory (`step.py`).
    """
    tokens = global_batch_size * fmean(lengths) + 6 * global_batch_size**0.5 * pstdev(lengths)
    return max(*lengths, min(budget, int(tokens)))


def kept_activation_bytes(setup: Setup, tokens: int) -> int:
    """Bytes that all layers keep of a sequence of so many tokens for the backward pass, with fused layers.

    In the compute dtype, for each layer and token: the inputs of the norms, and the outputs of two of them, which the
    linear layers read (where norms come only behind these, they read the stream, which is counted as an input); the
    queries and attention's output; queries and keys once more where they have norms; gate, up and their product, which
    a mixture computes again.

    Source: counted in `model/fused`. On an H100, Mistral-7B's shape, 3,722 tokens a sequence on average: 15.0 GiB by
    this, and a peak of 36.2 GiB in all, of which 4.0 are NF4 weights and 13.0 kept ones.
    """
    a = setup.architecture
    stream = (2 + a.norms) * a.hidden
    heads = 2 * a.queries + (a.queries + a.keys if a.query_norm else 0)
    kept = setup.value_bytes * a.layers * (stream + heads + (2 if a.experts else 3) * a.intermediate) * tokens
    # Beside what is kept, a mixture's layer needs its experts' weights and copies of the tokens while it computes.
    now = a.largest_matrix + (EXPERT_COPIES * a.copies + EXPERT_WIDTHS * a.intermediate) * tokens
    return kept + setup.value_bytes * now * bool(a.experts)


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
    """The fastest plan that fits, where fused layers compute; `forward` is set by the caller, which fuses them.

    Activations, the base's dequantized weights, both or neither are kept. If only one fits, activations are preferred:
    on an H100 keeping only them gave 13,960 target tokens/s, the base alone 10,714, both 15,067, neither 9,861.

    Of a base that is not on the GPU (`choose_placement`) nothing is kept dequantized, and no CUDA graph is recorded: it
    would hold none of the copies by which the layers' weights come.

    Args:
        setup: What is trained.
        free_bytes: Of the GPU, with the quantized model in it, as far as `setup.placement` has it there.
        sequence_tokens: Of the longest packed sequence that a step will have.
        keep_base: Whether to keep the dequantized base; None to choose. True only where `setup.placement` is `gpu`.
        keep_activations: Whether to keep activations; None to choose.
        recorded: Whether the decoder is fused throughout, so that its kernels can be recorded. Else transformers' own
            code runs between the fused layers, and keeps more activations.
        not_recorded: Why they cannot be recorded, although it is.
        fp8: Whether training computes in FP8: what is kept of the base are its two copies in that format.
    """
    on_gpu = setup.placement == "gpu"
    known, recorded, rest = recorded, recorded and on_gpu, _REST_BYTES if on_gpu else _beside(setup)
    # Two bytes a weight either way: once in bf16, or twice in FP8 (`model/fused/fp8.py`).
    base = 2 * setup.architecture.linear_parameters if setup.quantization != "none" or fp8 else 0
    again = activation_bytes(setup, sequence_tokens)
    tried = []
    for kept_base, kept in ((True, True), (False, True), (True, False), (False, False)):
        if keep_base not in {None, kept_base} or keep_activations not in {None, kept} or (kept_base and not on_gpu):
            continue
        activations = again
        if kept and known:
            activations = kept_activation_bytes(setup, sequence_tokens)
        elif kept:
            activations = activation_bytes(replace(setup, recompute=False), sequence_tokens)
        need = int((1 + MARGIN) * (activations + base * kept_base) + rest + CONTEXT_BYTES)
        tried.append((kept_base, kept, need))
        if need <= free_bytes:
            break
    kept_base, kept, need = tried[-1]
    why = f"needs {need / GIB:.1f} of {free_bytes / GIB:.1f} GiB that are free"
    forced = "" if keep_base is None and keep_activations is None else "; partly as set"
    graphs = f"; no CUDA graphs: {not_recorded}" if recorded and not_recorded else ""
    where = {"sharded": "; the base is sharded over the processes", "host": "; the base is in main memory"}
    kept_base &= setup.quantization != "none" or fp8
    recorded &= not_recorded is None
    return ExecutionPlan(
        kept_base=kept_base,
        kept_activations=kept,
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
    """The plan with the fastest way that fits to compute rows of up to `tokens` tokens layer by layer.

    Attention's output is kept rather than computed again, and what waits lies on the GPU rather than in main memory.
    The first saves a third of attention's time at most, the second nothing where the copies keep up.

    Args:
        plan: For the other rows.
        setup: What is trained.
        tokens: Of the longest micro-batch with such a row that one process computes; 0 where there is none.
        free_bytes: Of the GPU, with all that the plan keeps for other rows in it.
        host_bytes: Of main memory that is available to this process.
        offload: `JOB_TRAIN__OFFLOAD_ACTIVATIONS`; None to choose.
        copies: As in `long_row_bytes`.
        tile: Tokens of a tile.
        divided: Tokens of the longest row that is divided, and over how many processes.
        attention: The kernel, whose `copies` these are; None in a forecast.
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
    """Bytes that a long row needs beside the base and the adapter, with the formula's error and the context.

    Args:
        setup: What is trained.
        tokens: Of the row.
        processes: How many compute it together.
        offloaded: As in `long_row_bytes`.
        kept_attention: As in `long_row_bytes`.
        copies: As in `long_row_bytes`.
    """
    activations = row_bytes(setup, tokens, processes, offloaded=offloaded, kept_attention=kept_attention, copies=copies)
    return int((1 + MARGIN) * activations) + _beside(setup) + CONTEXT_BYTES


def held_bytes(setup: Setup, plan: ExecutionPlan, tokens: int) -> int:
    """Bytes that a plan holds between micro-batches: the dequantized base, and the memory of CUDA graphs.

    Args:
        setup: What is trained.
        plan: As `choose_plan` made it.
        tokens: Of the longest padded sequence.
    """
    base = 2 * setup.architecture.linear_parameters * plan.kept_base
    if not plan.recorded:
        return base
    activations = kept_activation_bytes if plan.kept_activations else activation_bytes
    return base + int((1 + MARGIN) * activations(setup, tokens))


def choose_placement(
    setup: Setup, *, memory_bytes: int, placements: Sequence[str], needs: Callable[[Setup], int]
) -> str:
    """Where the base's quantized weights lie: the first placement with which all fits on the GPU, or else the last.

    Args:
        setup: What is trained.
        memory_bytes: Of the GPU, or the part of it that may be used, with nothing in it yet.
        placements: Of `memory_model.PLACEMENTS`, the fastest first.
        needs: Bytes on the GPU that all of a run needs at its peak with the base held as a setup says.
    """
    usable = usable_bytes(memory_bytes)
    return next((one for one in placements if needs(replace(setup, placement=one)) <= usable), placements[-1])


def _beside(setup: Setup) -> int:
    """Bytes of training beside the weights, the adapter's fp32 values and the activations: all but CUDA graphs."""
    memory = training_memory(setup, 0)
    return memory.total - memory.weights - memory.activations - FP32 * setup.adapter
