"""The device and the compute dtype of a process, and results that are the same every time on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.errors import Problem, SettingsError

if TYPE_CHECKING:
    import torch


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Name in the settings -> torch's name."""


def short_name(dtype: torch.dtype) -> str:
    """A dtype as the settings write it, such as `bf16`; torch's name of one that no setting has."""
    long = str(dtype).removeprefix("torch.")
    return next((short for short, name in DTYPES.items() if name == long), long)


def make_deterministic() -> None:
    """Makes a GPU's results bit-for-bit reproducible; an operation that cannot be raises an error.

    `warn_only` does not suffice: torch's flash attention uses its deterministic algorithm only without it. cuBLAS also
    needs CUBLAS_WORKSPACE_CONFIG, which has to be set before CUDA starts. By default torch would also fill new memory,
    to reveal reads of uninitialized memory; that takes 6 % of a step's time and changes no bit, so it is off.
    """
    import torch

    torch.use_deterministic_algorithms(mode=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def choose_device(wanted: str = "auto") -> torch.device:
    """The GPU of this process, which sees no other (`cli` sees to that), else the CPU.

    Raises:
        SettingsError: A GPU is required by the settings, and there is none.
    """
    import torch

    if wanted != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if wanted == "gpu":
        what = "is gpu, but torch finds no GPU; give the job a GPU, or set JOB_RUN__DEVICE=cpu to run without one"
        raise SettingsError([Problem("JOB_RUN__DEVICE", what)])
    return torch.device("cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype: the setting, or for `auto` bf16 on a GPU that has it, else fp16; fp32 on a CPU."""
    import torch

    if name == "auto":
        if device.type != "cuda":
            name = "fp32"
        else:
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype
