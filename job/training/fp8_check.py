"""Checks that machine, compute dtype, architecture and layer sizes allow training in FP8.

The model's configuration is checked before its weights are fetched (`fp8_problems_of`), the machine when the job starts
on it (`require_fp8`), and the loaded model before training (`require_fp8_model`, `require_fp8_layers`). Importing this
module does not import torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from job.errors import Problem, SettingsError
from job.model.architecture import Architecture, read_config
from job.training.execution_plan import FP8_CAPABILITY

if TYPE_CHECKING:
    from job.training.memory_model import Setup

SETTING = "JOB_TRAIN__COMPUTE"


def fp8_problems_of(config: Any, named: Collection[str]) -> Iterator[Problem]:
    """Why a model cannot train in FP8 on any GPU.

    Args:
        config: The model's configuration, of transformers.
        named: Names of the layers that get an adapter, as in PEFT's `target_modules`.
    """
    try:
        architecture = read_config(config.to_dict())
    except ValueError:
        yield _only_fused(f"the sizes of a {config.model_type} model are not known; remove it")
        return
    yield from _experts(architecture)
    yield from _sizes(architecture, named)


def require_fp8(device: Any) -> None:
    """Checks that this machine can train in FP8.

    Args:
        device: The device of training.

    Raises:
        SettingsError: There is no GPU, or the GPU or torch cannot multiply FP8 matrices with a scale for each row.
    """
    from job.model.fused import fp8
    from job.training import gpu_capability

    if device.type != "cuda":
        why: str | None = "there is no GPU"
    elif (capability := gpu_capability.compute_capability()) < FP8_CAPABILITY:
        least = "{}.{}".format(*FP8_CAPABILITY)
        why = "the GPU's compute capability is {}.{}, less than {} (Ada, Hopper)".format(*capability, least)
    else:
        why = fp8.why_not_here(device)
    if why is not None:
        what = f"is fp8, which cannot be computed here: {why}; remove it, or use a GPU with FP8"
        raise SettingsError([Problem(SETTING, what)])


def require_fp8_model(setup: Setup | None, dtype: str | None) -> None:
    """Checks that compute dtype and architecture allow FP8.

    Args:
        setup: The model and its training; None if the architecture is not known.
        dtype: The compute dtype by its name in torch; None if PEFT's own layers compute.

    Raises:
        SettingsError: The dtype is not bf16, or the model is a mixture of experts.
    """
    problems = [] if setup is None else [*_experts(setup.architecture)]
    if dtype not in {None, "bfloat16"}:
        what = (
            f"is fp8, which needs bf16 for all other operations, but the compute dtype is {dtype}; set "
            "JOB_MODEL__DTYPE=bf16"
        )
        problems.append(Problem(SETTING, what))
    if problems:
        raise SettingsError(problems)


def require_fp8_layers(setup: Setup | None, slow: str | None) -> None:
    """Checks that the adapted layers can be computed in FP8.

    Args:
        setup: The model and its training; None if the architecture is not known.
        slow: Why PEFT's own layers compute; None if the fused ones do.

    Raises:
        SettingsError: PEFT's own layers compute; or the number of inputs or outputs of an adapted layer is not a
            multiple of `fp8.MULTIPLE`.
    """
    if slow is not None:
        raise SettingsError([_only_fused(slow)])
    if problems := [] if setup is None else [*_sizes(setup.architecture, setup.targets)]:
        raise SettingsError(problems)


def _only_fused(why: str) -> Problem:
    return Problem(SETTING, f"is fp8, which only the job's fused layers compute: {why}")


def _experts(architecture: Architecture) -> Iterator[Problem]:
    if architecture.experts:
        yield Problem(SETTING, "is fp8, which does not support a mixture's experts; remove it")


def _sizes(architecture: Architecture, named: Collection[str]) -> Iterator[Problem]:
    """A problem if the size of a layer that gets an adapter is not a multiple of `fp8.MULTIPLE`."""
    from job.model.fused.fp8 import MULTIPLE

    odd = ", ".join(
        f"{name} of {inputs} x {outputs}"
        for name, (inputs, outputs) in architecture.linear.items()
        if name in named and (inputs % MULTIPLE or outputs % MULTIPLE)
    )
    if odd:
        what = f"is fp8, whose products need sizes that are multiples of {MULTIPLE}; this model has {odd}; remove it"
        yield Problem(SETTING, what)
