"""A mixture's experts as products of groups of tokens, with frozen weights that are dequantized for each use.

Each token goes to a few of a layer's experts. Copies of the tokens are sorted by expert, so that one grouped product
multiplies each expert's tokens by its weights; for a token x, its experts e with the router's weights p:

    y = sum over e of p_e down_e(act(gate_e(x)) * up_e(x))

Autograd keeps the tokens and not the weights: the backward pass requests these again, so that no more than one layer's
experts are ever in 16 bits. Sums over a token's experts are made in the order in which the router chose them, forward
and backward, from a permutation and not by adding at indices: no atomic operation, the same bits each time.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import grouped_mm

from job.model.experts import expert_tensors, packed
from job.model.fused.frozen_weights import dequantized_weight


class _Permuted(torch.autograd.Function):
    """Rows in another order: (rows, ...) -> the same, with the gradient by the inverse order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        return gradient[inverse], None, None


class _Copied(torch.autograd.Function):
    """(tokens, width) -> (tokens * count, width) sorted by expert; the gradient adds a token's copies."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, count: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.count = count
        return x[order // count]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        return gradient[inverse].view(-1, ctx.count, gradient.shape[-1]).sum(1), None, None, None


class _Grouped(torch.autograd.Function):
    """(rows, inputs) sorted by expert -> (rows, outputs), each by its expert's frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Callable[[], torch.Tensor], offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(offsets)
        ctx.weight = weight
        return grouped_mm(x, weight().transpose(1, 2), offs=offsets)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (offsets,) = ctx.saved_tensors
        return grouped_mm(gradient.contiguous(), ctx.weight(), offs=offsets), None, None


def use_frozen(model: Any) -> None:
    """Has the quantized experts of a model be computed here, but for what a family's experts have that is not here."""
    for module in {module for _, module, name in expert_tensors(model) if packed(module, name) is not None}:
        plain = module.has_gate and not module.has_bias and not getattr(module, "has_post_expert_norm", False)
        if plain and packed(module, "gate_up_proj") is not None and packed(module, "down_proj") is not None:
            module.forward = MethodType(_forward, module)


def _forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As transformers' experts: (tokens, hidden), and for each token (tokens, count) experts and weights."""
    if any(len(module.parametrizations[name]) > 1 for name in ("gate_up_proj", "down_proj")):
        # PEFT's own layer adds its adapter to the weights within; only reading them gives the sum.
        found: torch.Tensor = type(module).forward(module, hidden_states, top_k_index, top_k_weights)
        return found
    return experts_forward(module, hidden_states, top_k_index, top_k_weights)


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The sum of a token's experts, (tokens, hidden) in the dtype of `hidden_states`."""
    count = top_k_index.shape[-1]
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    inverse = order.argsort()
    experts = torch.arange(module.num_experts, device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(ids, experts, right=True, out_int32=True)
    x = _Copied.apply(hidden_states, order, inverse, count)  # type: ignore[no-untyped-call]
    x = module._apply_gate(_product(module, "gate_up_proj", x, offsets))  # noqa: SLF001 - the family's own
    x = _product(module, "down_proj", x, offsets)
    x = _Permuted.apply(x, inverse, order).view(-1, count, x.shape[-1])  # type: ignore[no-untyped-call]
    return (x * top_k_weights.to(x.dtype)[..., None]).sum(1).to(hidden_states.dtype)


def _product(module: Any, name: str, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    def weight() -> torch.Tensor:
        """(experts, outputs, inputs) in the dtype of the tokens."""
        found = dequantized_weight(packed(module, name), x.dtype)
        return found.transpose(1, 2) if module.is_transposed else found

    made: torch.Tensor = _Grouped.apply(x, weight, offsets)  # type: ignore[no-untyped-call]
    return made
