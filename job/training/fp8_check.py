"""Checks that machine, compute dtype, architecture and layer sizes allow training in FP8."""

from __future__ import annotations

from typing import Any

from job.errors import Problem, SettingsError
from job.training.execution_plan import FP8_CAPABILITY
from job.training.gpu_capability import compute_capability
from job.training.memory_model import Setup

SETTING = "JOB_TRAIN__COMPUTE"


def require_fp8(device: Any) -> None:
    """Checks that this machine can train in FP8.

    Args:
        device: The device of training.

    Raises:
        SettingsError: There is no GPU, or the GPU or torch cannot multiply FP8 matrices with a scale for each row.
    """
    from job.model.fused import fp8

    if device.type != "cuda":
        why: str | None = "there is no GPU"
    elif (found := compute_capability()) < FP8_CAPABILITY:
        least = "{}.{}".format(*FP8_CAPABILITY)
        why = "the GPU's compute capability is {}.{}, less than {} (Ada, Hopper)".format(*found, least)
    else:
        why = fp8.why_not_here(device)
    if why is not None:
        what = f"is fp8, which cannot be computed here: {why}; remove it, or use a GPU with FP8"
        raise SettingsError([Problem(SETTING, what)])


def require_fp8_model(setup: Setup | None, dtype: str | None) -> None:
    """Checks that compute dtype and architecture allow FP8.

    Args:
        setup: What is trained; None if the architecture is not known.
        dtype: The compute dtype by its name in torch; None if PEFT's own layers compute.

    Raises:
        SettingsError: The dtype is not bf16, or the model is a mixture of experts.
    """
    if dtype not in {None, "bfloat16"}:
        what = (
            f"is fp8, which needs bf16 for all other operations, but the compute dtype is {dtype}; set "
            "JOB_MODEL__DTYPE=bf16"
        )
        raise SettingsError([Problem(SETTING, what)])
    if setup is not None and setup.architecture.experts:
        raise SettingsError([Problem(SETTING, "is fp8, which does not support a mixture's experts; remove it")])


def require_fp8_layers(setup: Setup | None, slow: str | None) -> None:
    """Checks that the adapted layers can be computed in FP8.

    Args:
        setup: What is trained; None if the architecture is not known.
        slow: Why PEFT's own layers compute; None if the fused ones do.

    Raises:
        SettingsError: PEFT's own layers compute; or the number of inputs or outputs of an adapted layer is not a
            multiple of `fp8.MULTIPLE`.
    """
    from job.model.fused.fp8 import MULTIPLE

    if slow is not None:
        raise SettingsError([Problem(SETTING, f"is fp8, which only the job's fused layers compute: {slow}")])
    if setup is None:
        return
    sizes = {name: setup.architecture.linear[name] for name in setup.targets if name in setup.architecture.linear}
    odd = ", ".join(
        f"{name} of {inputs} x {outputs}"
        for name, (inputs, outputs) in sizes.items()
        if inputs % MULTIPLE or outputs % MULTIPLE
    )
    if odd:
        what = f"is fp8, whose products need sizes that are multiples of {MULTIPLE}; this model has {odd}; remove it"
        raise SettingsError([Problem(SETTING, what)])
