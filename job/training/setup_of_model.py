"""The input of the memory formulas (`memory_model.Setup`), read from a loaded model with its adapter."""

from __future__ import annotations

from typing import Any

from job.model.architecture import read_config
from job.model.experts import quantized_experts
from job.model.fused.experts import adapter_of_experts
from job.model.lora import trainable
from job.training.memory_model import Setup


def setup_of(model: Any, quantization: str, optimizer: str) -> Setup | None:
    """The input of the memory formulas; None if they do not cover the model's architecture.

    Args:
        model: The base with its adapter.
        quantization: `nf4` or `none`.
        optimizer: A key of `OPTIMIZERS`.
    """
    base, adapter = model.get_base_model(), model.peft_config["default"]
    try:
        architecture = read_config(base.config.to_dict())
    except ValueError:
        return None
    return Setup(
        architecture=architecture,
        rank=getattr(adapter, "init_r", adapter.r),
        targets=tuple(sorted(adapter.target_modules)),
        quantization=quantization,
        double_quantization=True,
        value_bytes=base.dtype.itemsize,
        optimizer=optimizer,
        recompute=True,
        counted=sum(p.numel() for p in trainable(model).values()) if _is_uneven(adapter) else None,
        plain_experts=quantization != "none" and architecture.experts > 0 and quantized_experts(base) == 0,
        expert_adapter=adapter_of_experts(model) if getattr(adapter, "target_parameters", None) else 0,
        dora=getattr(adapter, "use_dora", False),
        merged_rows=2 * architecture.vocabulary if adapter.trainable_token_indices else 0,
    )


def _is_uneven(adapter: Any) -> bool:
    """Whether the number of an adapter's parameters does not follow from rank and targets alone."""
    options = (
        *("use_dora", "layers_to_transform", "rank_pattern", "init_r"),
        *("modules_to_save", "trainable_token_indices", "target_parameters"),
    )
    return any(getattr(adapter, name, None) for name in options)
