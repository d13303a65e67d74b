"""What is trained, read off a model in memory, for the formulas of `estimate`."""

from __future__ import annotations

from typing import Any

from job.model.architecture import read_config
from job.training.memory_model import Setup


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
