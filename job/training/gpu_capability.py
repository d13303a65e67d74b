"""What the GPU of a process can compute: fused layers, FP8, Triton's kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

from job import log
from job.errors import Problem, SettingsError
from job.model.packed_attention import is_packed
from job.training.execution_plan import (
    AMPERE,
    FP8_CAPABILITY,
    VOLTA,
)

_LONGEST_REASON = 300
"""Characters of an error's text in the log."""


def compute_capability() -> tuple[int, int]:
    """The compute capability of this process's GPU, such as (9, 0)."""
    import torch

    return torch.cuda.get_device_capability()


def dtype_name(model: Any) -> str:
    """The compute dtype of a PEFT model's base, by its name in torch, such as `bfloat16`."""
    return str(model.get_base_model().dtype).removeprefix("torch.")


def why_not_fused(model: Any) -> str | None:
    """Why PEFT's own layers have to train this model on this machine; None if the fused ones can be used."""
    device, dtype = model.device.type, dtype_name(model)
    lowest = {"bfloat16": AMPERE, "float16": VOLTA}
    if not is_packed(model.get_base_model()):
        return "examples are computed one at a time"
    if device != "cuda":
        return "on a CPU PEFT's own layers are used"
    if dtype not in lowest:
        return f"the compute dtype is {dtype}; fused layers need bf16 or fp16 (JOB_MODEL__DTYPE)"
    if (found := compute_capability()) < lowest[dtype]:
        numbers = "the GPU's compute capability is {}.{}; fused layers need {}.{}".format(*found, *lowest[dtype])
        return f"{numbers} in {'bf16' if dtype == 'bfloat16' else 'fp16'}"
    return None


def require_fp8(device: Any) -> None:
    """Refuses a machine that cannot train in FP8.

    Args:
        device: Where the model will be.

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
        raise SettingsError([Problem("JOB_TRAIN__COMPUTE", what)])


@cache  # each kind of scoring calls it, and its test launch may compile C code
def fast_kernels(device: Any, dtype: str) -> tuple[Any, str]:
    """The kernels to use: Triton's if it is installed (it comes with torch for GPUs) and runs, else torch's.

    Args:
        device: Where they have to run.
        dtype: The compute dtype by its name in torch; older GPUs have no `bfloat16`.

    Returns:
        The kernels (`fused.kernels.Kernels`) and their name, `triton` or `torch`. They are chosen by one test launch
        for each device and dtype in the life of the process.
    """
    import torch

    from job.model.fused import kernels

    try:
        fast = kernels.triton()
    except ImportError:
        if device.type == "cuda":
            what = "Triton is not installed; torch's own operations are used, which is slower"
            log.get_logger().warning(what, change="pip install triton (on Linux it is a dependency of torch for GPUs)")
        return kernels.TORCH, "torch"
    try:
        # Only a launch shows whether Triton can use the driver: it compiles and loads a C library then.
        probe = torch.ones(8, dtype=getattr(torch, dtype), device=device)
        fast.swiglu(probe, probe).sum().item()
    except Exception as error:  # noqa: BLE001 - whatever Triton, its compiler or the loader raises
        why = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
        what = "Triton cannot run here; torch's own operations are used, which is slower"
        change = (
            "use the project's image, or install gcc and Python's headers (python3-dev), which Triton needs to compile"
        )
        log.get_logger().warning(what, why=why, change=change)
        return kernels.TORCH, "torch"
    return fast, "triton"
