"""AdaLoRA's part of a training step: PEFT's allocator of ranks, its state for checkpoints, and its penalty.

PEFT computes the forward pass, the importance of ranks, and which of them are taken away. What the trainer has to do
around it: add the gradient of the penalty to that of the loss, call the allocator after every optimizer step, and keep
what the allocator remembers of earlier steps in the checkpoint.

Source: Zhang et al. 2023, AdaLoRA (arXiv:2303.10512), sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from job.errors import TrainingFailed

_MEANS = ("exp_avg_ipt", "exp_avg_unc")
"""What PEFT's allocator remembers: running means of each number's importance, and of how much that changes."""
_PATTERN = "rank_pattern"


def is_adalora(model: Any) -> bool:
    """Whether a PEFT model has an adapter of this kind."""
    config = getattr(model, "peft_config", {}).get("default")
    return config is not None and config.peft_type == "ADALORA"


def add_penalty_gradient(model: Any, scale: float = 1.0) -> None:
    """Adds to the parameters' gradients, in place, that of the penalty on matrices that are not orthogonal.

    The penalty is the mean of ||A A' - I|| and ||B' B - I|| (Frobenius) over all layers, times `orth_reg_weight`. To be
    called once in an optimizer step, after the sum over processes: PEFT adds it to the loss of every forward pass,
    whose number is no property of the step here.

    Args:
        model: A PEFT model whose parameters have gradients.
        scale: What the loss was multiplied by before its backward pass (fp16's loss scale).
    """
    weight = scale * model.peft_config["default"].orth_reg_weight
    matrices = [
        (parameter, parameter if ".lora_A." in name else parameter.T)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (".lora_A." in name or ".lora_B." in name)
    ]
    if not weight or not matrices:
        return
    for parameter, rows in matrices:  # (rank, inputs), or B as (rank, outputs)
        with torch.enable_grad():
            identity = torch.eye(rows.shape[0], device=rows.device)
            norm = torch.linalg.matrix_norm(rows @ rows.T - identity)
        (gradient,) = torch.autograd.grad(norm, parameter)
        parameter.grad.add_(gradient, alpha=weight / len(matrices))


def allocate(model: Any, step: int) -> None:
    """Lets PEFT take ranks away, after `step` optimizer steps, while the parameters have the last step's gradients.

    A step that was skipped because fp16 overflowed has no information on importance, and is left out. The last ranks
    are taken away in their step all the same, by the importance in the steps before.

    Raises:
        TrainingFailed: All of those were skipped.
    """
    config = model.peft_config["default"]
    last = config.total_step - config.tfinal
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    if step < last and not torch.stack([gradient.isfinite().all() for gradient in gradients]).all():
        return
    if step == last and not model.base_model.rankallocator.exp_avg_ipt:
        what = "fp16 overflowed in every step before AdaLoRA takes the last ranks away"
        raise TrainingFailed(f"{what}; set JOB_MODEL__DTYPE=bf16, or train for more steps")
    # PEFT's threshold is the value that torch.kthvalue finds. On a GPU torch refuses it as not deterministic: of equal
    # values it may return the place of another one, which is not used.
    exact = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=False)
    try:
        model.base_model.update_and_allocate(step)
    finally:
        torch.use_deterministic_algorithms(mode=exact)


def allocator_state(model: Any) -> dict[str, torch.Tensor]:
    """What the allocator remembers, as named tensors."""
    allocator, pattern = model.base_model.rankallocator, model.peft_config["default"].rank_pattern or {}
    means = {f"{kind}/{name}": t.cpu().contiguous() for kind in _MEANS for name, t in getattr(allocator, kind).items()}
    return means | {f"{_PATTERN}/{name}": torch.tensor(kept) for name, kept in pattern.items()}


def restore_allocator(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `allocator_state`.

    Raises:
        ValueError: A tensor is not of this model; nothing was restored.
    """
    parameters = dict(model.base_model.model.named_parameters())
    state: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in (*_MEANS, _PATTERN)}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters.get(name)
        shape = None if parameter is None else parameter.shape if kind in _MEANS else parameter.shape[:1]
        if kind not in state or tensor.shape != shape:
            raise ValueError(f"AdaLoRA's {key} belongs to another model")
        state[kind][name] = tensor
    allocator = model.base_model.rankallocator
    for kind in _MEANS:
        setattr(allocator, kind, {n: tensor.to(parameters[n].device) for n, tensor in state[kind].items()})
    # PEFT computes these again in every step, and only needs the names to exist.
    allocator.ipt = dict(allocator.exp_avg_ipt)
    pattern = {name: kept.tolist() for name, kept in state[_PATTERN].items()}
    model.peft_config["default"].rank_pattern = pattern or None
