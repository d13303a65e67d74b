"""Whether this process's GPU can run the fused layers and Triton's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from job import log
from job.distributed.processes import Processes
from job.model.packed_attention import is_packed
from job.training.execution_plan import (
    AMPERE,
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
    """Why this model must be trained with PEFT's own layers on this machine; None if fused layers can be used."""
    device, dtype = model.device.type, dtype_name(model)
    lowest = {"bfloat16": AMPERE, "float16": VOLTA}
    if not is_packed(model.get_base_model()):
        return "examples are computed one at a time"
    if device != "cuda":
        return "on a CPU PEFT's own layers are used"
    if dtype not in lowest:
        return f"the compute dtype is {dtype}; fused layers need bf16 or fp16 (JOB_MODEL__DTYPE)"
    if (capability := compute_capability()) < lowest[dtype]:
        numbers = "the GPU's compute capability is {}.{}; fused layers need {}.{}".format(*capability, *lowest[dtype])
        return f"{numbers} in {'bf16' if dtype == 'bfloat16' else 'fp16'}"
    return None


@cache  # each kind of scoring calls it, and its test launch may compile C code
def fast_kernels(device: Any, dtype: str) -> tuple[Any, str]:
    """The kernels to use: Triton's if it is installed (it comes with torch for GPUs) and works, else torch's.

    Triton is tested by one launch for each device and dtype in the life of the process.

    Args:
        device: Where the kernels run.
        dtype: The compute dtype by its name in torch; older GPUs have no `bfloat16`.

    Returns:
        The kernels (`fused.kernels.Kernels`) and their name, `triton` or `torch`. Also torch's after
        `agree_on_kernels` has found a process that cannot use Triton.
    """
    import torch

    from job.model.fused import kernels

    if (device.type, dtype) in _TORCH_IN_ALL:
        return kernels.TORCH, "torch"
    try:
        fast = kernels.triton()
    except ImportError:
        if device.type == "cuda":
            message = "Triton is not installed; torch's own operations are used, which is slower"
            log.get_logger().warning(
                message, change="pip install triton (on Linux it is a dependency of torch for GPUs)"
            )
        return kernels.TORCH, "torch"
    try:
        # Only a launch shows whether Triton can use the driver: it compiles and loads a C library then.
        probe = torch.ones(8, dtype=getattr(torch, dtype), device=device)
        fast.swiglu(probe, probe).sum().item()
    except Exception as error:  # noqa: BLE001 - whatever Triton, its compiler or the loader raises
        why = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
        message = "Triton cannot run here; torch's own operations are used, which is slower"
        change = (
            "use the project's image, or install gcc and Python's headers (python3-dev), which Triton needs to compile"
        )
        log.get_logger().warning(message, why=why, change=change)
        return kernels.TORCH, "torch"
    return fast, "triton"


_TORCH_IN_ALL: set[tuple[str, str]] = set()
"""(type of device, dtype) for which another process of the run cannot use Triton. A global like the cache of
`fast_kernels`, because training and each kind of scoring call that independently."""


def agree_on_kernels(processes: Processes, device: Any, dtypes: Sequence[str]) -> None:
    """Makes all processes use torch's operations if one of them cannot use Triton's kernels.

    Triton's results differ from torch's in the last bits, so processes would compute different gradients and scores.
    All processes call this before they use kernels from `fast_kernels`.

    Args:
        processes: All processes of the run.
        device: Device of this process.
        dtypes: All dtypes that `fast_kernels` will be called with.
    """
    if processes.place.world_size == 1:
        return
    own = {dtype: fast_kernels(device, dtype)[1] for dtype in dtypes} if device.type == "cuda" else {}
    by_process = processes.gather("elementwise kernels", own)
    without = {dtype for names in by_process for dtype, name in names.items() if name != "triton"}
    if slower := sorted(dtype for dtype, name in own.items() if name == "triton" and dtype in without):
        _TORCH_IN_ALL.update((device.type, dtype) for dtype in slower)
        fast_kernels.cache_clear()
        message = "torch's own operations are used, which is slower, since another process cannot use Triton"
        change = "that process's log says why it cannot"
        log.get_logger().warning(message, dtypes=slower, change=change)
