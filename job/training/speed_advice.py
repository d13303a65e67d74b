"""Finds what makes training on this machine slower than necessary, and the setting that would change it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from job.records import PEFT, ExecutionPlan


@dataclass(frozen=True)
class Slower:
    """Something that costs time and does not affect the result.

    Attributes:
        what: What costs time, for the log.
        change: The setting or the hardware that would avoid it.
    """

    what: str
    change: str


_MEMORY = "a GPU with more memory, or a smaller JOB_TRAIN__MICRO_BATCH_TOKENS"


def slower_ways(
    plan: ExecutionPlan,
    *,
    on_gpu: bool,
    quantized: bool,
    keep_base: bool | Literal["auto"],
    recompute: bool | Literal["auto"],
    method: str,
    noise: bool,
    only_long: bool = False,
) -> Iterator[Slower]:
    """What makes this plan slower than the fastest plan. PEFT's layers on a GPU are left to `training.prepare`.

    Args:
        plan: The execution plan.
        on_gpu: Whether a GPU computes.
        quantized: Whether the base is quantized.
        keep_base: `JOB_MODEL__KEEP_DEQUANTIZED`.
        recompute: `JOB_TRAIN__GRADIENT_CHECKPOINTING`.
        method: The last one of `JOB_TRAIN__METHOD`.
        noise: Whether `JOB_TRAIN__NEFTUNE_NOISE_ALPHA` is set.
        only_long: Whether every row is longer than `LONG_ROW`. If such rows are computed layer by layer, CUDA graphs,
            kept activations and a dequantized base do not make them faster; a kept base in FP8 does.
    """
    fused = plan.forward != PEFT
    in_layers = only_long and plan.tile_tokens is not None
    elsewhere = plan.base_held != "gpu"
    if elsewhere:
        link = "main memory" if plan.base_held == "host" else "the other GPUs"
        change = "JOB_MODEL__PLACEMENT=gpu, if the GPU has enough memory"
        yield Slower(f"the base's layers are fetched from {link} in every pass", change)
    converted = plan.fp8 or (quantized and not in_layers)
    if fused and converted and not plan.kept_base and not elsewhere:
        change = "JOB_MODEL__KEEP_DEQUANTIZED=auto" if keep_base is False else _MEMORY
        how = "quantized to FP8" if plan.fp8 else "dequantized"
        yield Slower(f"the base's weights are {how} for each use", change)
    if not plan.kept_activations and not in_layers:
        memory = _MEMORY if on_gpu else "a machine with more memory, or a smaller JOB_TRAIN__MICRO_BATCH_TOKENS"
        change = "JOB_TRAIN__GRADIENT_CHECKPOINTING=auto" if recompute is True else memory
        yield Slower("activations are recomputed in the backward pass", change)
    if plan.offloaded:
        change = "JOB_TRAIN__OFFLOAD_ACTIVATIONS=false, if the GPU has enough memory"
        yield Slower("activations of long rows are copied to main memory and back", change)
    if on_gpu and fused and not plan.recorded and not in_layers:
        if noise:
            change = "JOB_TRAIN__NEFTUNE_NOISE_ALPHA=0, which trains without noise"
        elif method != "sft":
            change = f"none: JOB_TRAIN__METHOD={method} never uses CUDA graphs"
        elif elsewhere:
            change = "JOB_MODEL__PLACEMENT=gpu, if the GPU has enough memory"
        elif not plan.padded:
            change = "a JOB_MODEL__ID of a family whose whole decoder is fused (job/model/families.py)"
        else:
            change = "no setting; the execution plan's reason says why"
        yield Slower("kernels are launched one by one, without CUDA graphs", change)
