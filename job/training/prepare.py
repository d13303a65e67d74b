"""Prepares a model for the fastest way to train it that fits this GPU, and says which that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import fmean, pstdev
from typing import Any, Literal

from job import log
from job.common.resources import available_bytes
from job.model.architecture import read_config
from job.model.fused.frozen_weights import fuse_layers
from job.records import Execution
from job.training.config import CPU_MICRO_BATCH_TOKENS
from job.training.execution_plan import choose_budget, choose_execution
from job.training.memory_model import Setup, activation_bytes

AMPERE = (8, 0)
PLAIN = "peft"
"""A forward pass by PEFT's own layers."""


def token_budget(device: Any, micro_batch_tokens: int | None, gigabytes: float | None) -> int:
    """The token budget of a micro-batch: what is set, or what this machine's memory suggests.

    Args:
        device: The model's.
        micro_batch_tokens: What is set.
        gigabytes: How much of the GPU may be used; None for all.
    """
    if device.type != "cuda":
        return micro_batch_tokens or CPU_MICRO_BATCH_TOKENS
    return micro_batch_tokens or choose_budget(_gpu_memory(gigabytes)[0])


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
) -> tuple[Execution | None, str]:
    """Chooses how this machine trains the model, and makes the model ready for it.

    Args:
        model: The base with its adapter.
        lengths: Tokens of each example.
        global_batch_size: Examples of a step.
        quantization: The base's.
        optimizer: The adapter's.
        budget: The token budget of a micro-batch.
        keep_base: Whether to keep the dequantized base.
        recompute: Whether to compute activations again.
        gigabytes: How much of the GPU may be used; None for all.

    Returns:
        That, None where PEFT's own layers do the work; and what decides the last bits of a forward pass, in words.
    """
    if not _serves(model) or (setup := setup_of(model, quantization, optimizer)) is None:
        return None, PLAIN
    import torch

    from job.model.fused import lora_forward

    _, free = _gpu_memory(gigabytes)
    # A step's tokens, six standard deviations above their mean; where one has more after all, memory is made then.
    tokens = global_batch_size * fmean(lengths) + 6 * global_batch_size**0.5 * pstdev(lengths)
    execution = choose_execution(
        setup,
        free_bytes=free,
        row_tokens=max(*lengths, min(budget, int(tokens))),
        keep_base=None if keep_base == "auto" else keep_base,
        keep_activations=None if recompute == "auto" else not recompute,
        recorded=lora_forward.knows(model.get_base_model()),
    )
    kernels, name = _fast_kernels()
    try:
        made = fuse_layers(model, keep_dequantized=execution.kept_base, kernels=kernels)
    except torch.OutOfMemoryError:  # a neighbour took what was free, or the setting asks for too much
        execution = replace(
            execution, kept_base=False, reason=f"{execution.reason}, and ran out while keeping the base"
        )
        made = fuse_layers(model, keep_dequantized=False, kernels=kernels)
    if made == "nothing":
        return None, PLAIN
    log.get_logger().info("how training is carried out", micro_batch_tokens=budget, **asdict(execution))
    return execution, f"lean {made}, {name}"


def limit_memory(gigabytes: float | None) -> None:
    """Makes the GPU as small as the job is allowed to see it."""
    import torch

    if gigabytes is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))


def _gpu_memory(gigabytes: float | None) -> tuple[int, int]:
    """Bytes of the GPU, and of these the free ones; `gigabytes` is the limit of `limit_memory`."""
    import torch

    free, total = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if gigabytes is None:
        return total, free
    limit = min(total, int(gigabytes * 1e9))
    return limit, min(free, limit - torch.cuda.memory_allocated())


def _serves(model: Any) -> bool:
    """Whether model and machine are what `lean` is for: bf16, no dropout, and a GPU that has kernels for it."""
    import torch

    if model.device.type != "cuda" or torch.cuda.get_device_capability() < AMPERE:
        return False
    return model.get_base_model().dtype is torch.bfloat16 and not model.peft_config["default"].lora_dropout


def _fast_kernels() -> tuple[Any, str]:
    """Triton's where there is Triton, which comes with torch for GPUs; else torch's own. And what they are called."""
    from job.model.fused import kernels

    try:
        return kernels.triton(), "triton"
    except ImportError:
        return kernels.TORCH, "torch"


SHARE = 0.3
"""Of the memory that is available, what activations may take by the formula. With dropout half as much again is kept,
the adapter's gradients and moments come on top, and neighbours need some."""


def keeps_activations(setup: Setup, tokens: int, processes: int) -> bool:
    """Whether there is room for them.

    Args:
        setup: What is trained.
        tokens: Of the largest micro-batch.
        processes: How many train on this machine.
    """
    return processes * activation_bytes(replace(setup, recompute=False), tokens) <= SHARE * available_bytes()


def setup_of(model: Any, quantization: str, optimizer: str) -> Setup | None:
    """What is trained; None where the formulas do not know the model.

    Args:
        model: The base with its adapter.
        quantization: The base's.
        optimizer: The adapter's.
    """
    base, adapter = model.get_base_model(), model.peft_config["default"]
    try:
        architecture = read_config(base.config.to_dict())
    except ValueError:
        return None
    return Setup(
        architecture=architecture,
        rank=adapter.r,
        targets=tuple(sorted(adapter.target_modules)),
        quantization=quantization,
        double_quantization=True,
        value_bytes=base.dtype.itemsize,
        optimizer=optimizer,
        recompute=True,
    )
