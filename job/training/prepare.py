"""Chooses the execution plan on this machine, logs it with its reasons, and prepares the model accordingly.

On a GPU, the job's fused layers train more than twice as fast as PEFT's layers. If they cannot be used (fp32, an old
GPU, a model with unknown layers), PEFT's layers are used, and a warning and `training.execution` of the manifest give
the reason. On a CPU, PEFT's layers are always used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from job import log
from job.common.resources import available_bytes
from job.distributed.processes import ALONE, Processes
from job.model.fused.frozen_weights import fuse_layers
from job.model.placed_weights import placement_of
from job.records import FP8, FUSED, PEFT, ExecutionPlan
from job.training.config import CPU_MICRO_BATCH_TOKENS
from job.training.cpu_plan import plan_activations
from job.training.execution_plan import (
    choose_budget,
    choose_long_rows,
    choose_plan,
    held_bytes,
    long_row_need,
    why_not_recorded,
)
from job.training.fp8_check import require_fp8_layers, require_fp8_model
from job.training.gpu_capability import compute_capability, dtype_name, fast_kernels, why_not_fused
from job.training.gpu_memory import gpu_memory
from job.training.long_row_plan import Rows, plan_rows, sharing_of
from job.training.memory_check import Sharing, refuse_rows
from job.training.memory_model import LONG_ROW, TILE_TOKENS, Setup
from job.training.setup_of_model import setup_of


def token_budget(device: Any, micro_batch_tokens: int | None, gigabytes: float | None) -> int:
    """The token budget of a micro-batch: the setting, or a value chosen by this machine's memory.

    Args:
        device: The model's device.
        micro_batch_tokens: `JOB_TRAIN__MICRO_BATCH_TOKENS`; None to choose.
        gigabytes: `JOB_TRAIN__GPU_MEMORY_GB`: usable GPU memory in units of 1e9 bytes; None for all.
    """
    if device.type != "cuda":
        return micro_batch_tokens or CPU_MICRO_BATCH_TOKENS
    return micro_batch_tokens or choose_budget(gpu_memory(gigabytes)[0])


def prepare(
    model: Any,
    lengths: Sequence[int],
    *,
    global_batch_size: int,
    quantization: str,
    optimizer: str,
    budget: int,
    keep_base: bool | Literal["auto"],
    recompute: bool | Literal["auto"],
    gigabytes: float | None,
    processes: int = 1,
    random: bool = False,
    slow: str | None = None,
    offload: bool | Literal["auto"] = "auto",
    method: str = "sft",
    longest_at: str = "",
    validation: Sequence[int] = (),
    compute: Literal["dtype", "fp8"] = "dtype",
    sequence_parallel: Literal["auto", "off"] = "off",
    trains: bool = True,
    group: Processes = ALONE,
) -> ExecutionPlan:
    """Chooses how this machine trains the model, and prepares the model for it.

    Args:
        model: The base with its adapter.
        lengths: Tokens of each example.
        global_batch_size: Examples in a step.
        quantization: `nf4` or `none`.
        optimizer: A key of `OPTIMIZERS`.
        budget: The token budget of a micro-batch.
        keep_base: `JOB_MODEL__KEEP_DEQUANTIZED`.
        recompute: `JOB_TRAIN__GRADIENT_CHECKPOINTING`.
        gigabytes: `JOB_TRAIN__GPU_MEMORY_GB`: usable GPU memory in units of 1e9 bytes; None for all.
        processes: Number of training processes on this machine.
        random: Whether the embeddings get noise (NEFTune), which a CUDA graph would repeat unchanged.
        slow: Why this adapter requires PEFT's own layers, which are slower; None if it does not.
        offload: `JOB_TRAIN__OFFLOAD_ACTIVATIONS`.
        method: A key of `METHODS`; only `sft` computes long rows layer by layer.
        longest_at: File and line of the longest row, for messages; empty if they are not known.
        validation: Tokens of each validation row.
        compute: `JOB_TRAIN__COMPUTE`.
        sequence_parallel: `JOB_TRAIN__SEQUENCE_PARALLEL`.
        trains: Whether steps are left to do; if not, rows that are too long to train on here are not refused.
        group: All processes of the run; they agree on which rows they compute together, and with which kernel.

    Returns:
        The plan. The model's layers are already fused according to its `forward`.

    Raises:
        SettingsError: The longest row cannot fit into memory; or `compute` is fp8, but PEFT's own layers are needed,
            or the size of a layer is not a multiple of what FP8 products require.
    """
    setup = setup_of(model, quantization, optimizer)
    setup = setup and replace(setup, placement=placement_of(model), processes=group.place.world_size)
    allowed = None if offload == "auto" else offload
    slow = why_not_fused(model) or slow
    dtype = dtype_name(model)
    if compute == FP8:
        require_fp8_model(setup, dtype if slow is None else None)
    if slow is None and setup is None:
        slow = f"the sizes of a {model.get_base_model().config.model_type} model are not known"
    longest = max(lengths)  # without validation rows: they have no backward pass, whose memory the formula counts
    lengths = [*lengths, *sorted(validation, reverse=True)[:1]]
    never = "JOB_TRAIN__NEFTUNE_NOISE_ALPHA draws noise that depends on the length of the whole row" if random else ""
    rows = plan_rows(
        model,
        setup,
        lengths,
        fused=slow is None,
        budget=budget,
        global_batch_size=global_batch_size,
        method=method,
        sequence_parallel=sequence_parallel,
        never=never,
        gigabytes=gigabytes,
        offload=allowed,
        group=group,
    )
    if compute == FP8:
        require_fp8_layers(setup, slow)
    how: dict[str, Any] = {
        "gigabytes": gigabytes,
        "offload": allowed,
        "host_bytes": available_bytes() // processes,
    }
    if setup is not None and trains:
        sharing = sharing_of(setup, longest, rows, group.place.world_size, never)
        _refuse(model, setup, longest, rows, sharing=sharing, where=longest_at, **how)
    if rows is not None and setup is not None:
        plan = _fuse(
            model,
            setup,
            rows=rows,
            keep_base=None if keep_base == "auto" else keep_base,
            keep_activations=None if recompute == "auto" else not recompute,
            fp8=compute == FP8,
            **how,
        )
        if plan is not None:
            if random and plan.recorded:
                why = "no CUDA graphs: JOB_TRAIN__NEFTUNE_NOISE_ALPHA draws new noise in every step"
                plan = replace(plan, recorded=False, reason=f"{plan.reason}; {why}")
            log.get_logger().info("execution plan", micro_batch_tokens=budget, **asdict(plan))
            _note_unused(plan, lengths, offload=offload)
            return plan
        slow = "this adapter's PEFT layers are of a kind for which there are no fused layers"
        if compute == FP8:
            require_fp8_layers(setup, slow)
    _note_unused(None, lengths, offload=offload)
    return _by_peft(model, setup, budget, max(lengths), slow=slow or "", processes=processes, recompute=recompute)


def _note_unused(plan: ExecutionPlan | None, lengths: Sequence[int], *, offload: bool | Literal["auto"]) -> None:
    """Warns that activations are not offloaded although the setting says so."""
    if offload is not True or (plan is not None and plan.tile_tokens is not None):
        return
    why = "this machine, model or method does not compute long rows layer by layer"
    if (longest := max(lengths)) <= LONG_ROW:
        why = f"the longest row has {longest:,} tokens, and only rows of more than {LONG_ROW:,} are offloaded"
    log.get_logger().warning("JOB_TRAIN__OFFLOAD_ACTIVATIONS has no effect", why=why, change="remove it, or set auto")


def _fuse(
    model: Any,
    setup: Setup,
    *,
    rows: Rows,
    keep_base: bool | None,
    keep_activations: bool | None,
    gigabytes: float | None,
    offload: bool | None,
    host_bytes: int,
    fp8: bool,
) -> ExecutionPlan | None:
    """Chooses a plan by free memory and replaces the layers' forward by fused ones; None if no layer can be fused."""
    import torch

    from job.model.fused import fused_decoder
    from job.model.fused.long_attention import FLASH, copies_of

    _, free = gpu_memory(gigabytes)
    copies, reserved = copies_of(setup.architecture, model.device, rows.kernel or FLASH), 0
    if rows.long is not None:
        reserved = max(
            long_row_need(setup, tokens, over, offloaded=offload is not False, kept_attention=False, copies=copies)
            for tokens, over in ((rows.long, 1), (rows.divided, rows.processes))
            if tokens
        )
    plan = choose_plan(
        setup,
        free_bytes=max(0, free - reserved),
        sequence_tokens=rows.padded,
        # With long rows only, dequantizing takes no noticeable share of the time; quantizing to FP8, twice, does.
        keep_base=False if keep_base is None and rows.padded == 0 and not fp8 else keep_base,
        keep_activations=keep_activations if rows.padded else False,  # long rows are always recomputed layer by layer
        recorded=fused_decoder.knows(model.get_base_model()),
        not_recorded=why_not_recorded(setup, compute_capability(), half=dtype_name(model)),
        fp8=fp8,
    )
    if rows.long is not None:
        plan = choose_long_rows(
            replace(plan, recorded=plan.recorded and rows.padded > 0),
            setup,
            tokens=rows.long,
            free_bytes=free - held_bytes(setup, plan, rows.padded),
            host_bytes=host_bytes,
            offload=offload,
            copies=copies,
            tile=TILE_TOKENS,
            divided=(rows.divided, rows.processes) if rows.divided else None,
            attention=rows.kernel,
        )
        plan = replace(plan, sequence_parallel=rows.processes, divided_above=rows.above)
    kernels, name = fast_kernels(model.device, dtype_name(model))
    try:
        fused = fuse_layers(model, keep_dequantized=plan.kept_base, kernels=kernels, fp8=fp8)
    except torch.OutOfMemoryError:  # another process took the free memory, or the setting needs too much
        plan = replace(plan, kept_base=False, reason=f"{plan.reason}, and ran out while keeping the base")
        fused = fuse_layers(model, keep_dequantized=False, kernels=kernels, fp8=fp8)
    if fused == "nothing":
        return None
    forward = ", ".join((f"{FUSED} {fused}", name, *([FP8] if fp8 else [])))
    return replace(plan, recorded=plan.recorded and fused == "all", forward=forward)


def _refuse(
    model: Any,
    setup: Setup,
    longest: int,
    rows: Rows | None,
    *,
    gigabytes: float | None,
    offload: bool | None,
    host_bytes: int,
    where: str,
    sharing: Sharing,
) -> None:
    """Refuses rows that certainly do not fit into the GPU's memory, or, on a CPU, into the machine's memory.

    Raises:
        SettingsError: The longest row does not fit.
    """
    from job.model.fused.long_attention import copies_of

    on_gpu = model.device.type == "cuda"
    kernel = None if rows is None else rows.kernel
    refuse_rows(
        setup,
        longest,
        free_bytes=gpu_memory(gigabytes)[1] if on_gpu else host_bytes,
        host_bytes=host_bytes if on_gpu else None,
        offload=offload,
        copies=None if kernel is None else copies_of(setup.architecture, model.device, kernel),
        where=where,
        sharing=sharing,
    )


def _by_peft(
    model: Any,
    setup: Setup | None,
    budget: int,
    longest: int,
    *,
    slow: str,
    processes: int,
    recompute: bool | Literal["auto"],
) -> ExecutionPlan:
    """The plan with PEFT's own layers; `slow` is the reason for them."""
    kept_activations, memory = plan_activations(model, setup, max(budget, longest), processes, recompute=recompute)
    plan = ExecutionPlan(
        kept_base=False,
        kept_activations=kept_activations,
        recorded=False,
        reason="; ".join(filter(None, (slow, memory))),
        forward=PEFT,
        base_held=placement_of(model),
    )
    if model.device.type == "cuda":
        log.get_logger().warning(
            "training runs at less than half speed: PEFT's own layers compute instead of this job's fused ones",
            micro_batch_tokens=budget,
            **asdict(plan),
        )
    else:
        log.get_logger().info("execution plan", micro_batch_tokens=budget, **asdict(plan))
    return plan
