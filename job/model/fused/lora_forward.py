"""The frozen base with its adapter in fewer and larger operations: the same numbers up to rounding, sooner.

PEFT's forward casts, multiplies, scales and adds one after the other, and autograd keeps what lies between. Here an
adapted layer is one operation that knows what is frozen. The base's weights come from a function, so that they can be
kept dequantized or dequantized for each use: the products are the same, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn import functional

from job.model.architecture import has_fused_decoder
from job.model.fused.kernels import Kernels
from job.model.packed_attention import Layout, packed_attention

Weight = Callable[[], torch.Tensor]


class _Adapted(torch.autograd.Function):
    """y = x W' + bias + scale (x A') B' for each layer of a group, with gradients for x, A and B alone.

    A and B are the trained fp32 weights; what is multiplied are their copies in the dtype of the computation.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, *_trained: torch.Tensor) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ group.a.T
        outputs = []
        for layer, part in zip(group.layers, low.split_with_sizes(group.ranks, dim=1), strict=True):
            y = functional.linear(rows, layer.weight(), layer.bias)
            outputs.append(y.addmm_(part, layer.b.T).view(*x.shape[:-1], -1))
        ctx.save_for_backward(rows, low, group.a, *(layer.b for layer in group.layers))
        ctx.group, ctx.shape = group, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rows, low, a, *bs = ctx.saved_tensors
        layers, ranks = ctx.group.layers, ctx.group.ranks
        gradients = tuple(gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients)
        low_gradient = torch.empty_like(low)
        parts, outs = (x.split_with_sizes(ranks, dim=1) for x in (low, low_gradient))
        b_gradients = []
        for gradient, layer, b, part, out in zip(gradients, layers, bs, parts, outs, strict=True):
            torch.mm(gradient, b, out=out)
            b_gradient = _product_in_fp32(gradient.T, part)
            b_gradients.append(b_gradient if layer.scale == 1 else b_gradient.mul_(layer.scale))
        a_gradients = _product_in_fp32(low_gradient.T, rows).split_with_sizes(ranks)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradients[0] @ layers[0].weight()
            for gradient, layer in zip(gradients[1:], layers[1:], strict=True):
                x_gradient.addmm_(gradient, layer.weight())
            x_gradient = x_gradient.addmm_(low_gradient, a).view(ctx.shape)
        return x_gradient, None, *a_gradients, *b_gradients


def _product_in_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The matrix product, not rounded to the dtype of its factors where the machine can leave it so."""
    if left.is_cuda and left.dtype is not torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


@dataclass(frozen=True, eq=False)
class Layer:
    """What one adapted layer computes with."""

    weight: Weight
    bias: torch.Tensor | None
    scale: float
    trained_a: torch.Tensor
    trained_b: torch.Tensor
    b: torch.Tensor
    """A copy of the trained one in the dtype of the computation, with the scale in it."""


class Group:
    """Adapted layers with a common input, which is read once for all of them."""

    def __init__(self, modules: Sequence[Any], weights: Mapping[Any, Weight], dtype: torch.dtype) -> None:
        self.modules = modules
        self.layers = []
        for module in modules:
            (name,) = module.active_adapters
            bias, scale = module.get_base_layer().bias, module.scaling[name]
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            self.layers.append(Layer(weights[module], bias, scale, a, b, b.detach().to(dtype, copy=True)))
        self.ranks = [layer.trained_a.shape[0] for layer in self.layers]
        self.a = torch.cat([layer.trained_a.detach().to(dtype) for layer in self.layers])
        """Copies of the trained ones, one below the other."""

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs of all layers; those of the base alone while the adapter is switched off."""
        if self.modules[0].disable_adapters:
            return tuple(functional.linear(x, layer.weight(), layer.bias) for layer in self.layers)
        trained = [layer.trained_a for layer in self.layers] + [layer.trained_b for layer in self.layers]
        outputs: tuple[torch.Tensor, ...] = _Adapted.apply(x, self, *trained)  # type: ignore[no-untyped-call]
        return outputs


def fits(module: Any) -> bool:
    """Whether an adapted layer of PEFT is of the plain kind that is computed here: one adapter, without dropout."""
    names = module.active_adapters
    return (
        len(names) == 1
        and isinstance(module.lora_dropout[names[0]], torch.nn.Identity)
        and not module.lora_variant
        and not module.lora_bias[names[0]]
        and not module.merged
    )


def knows(base: Any) -> bool:
    """Whether a causal language model is a decoder of the build that is computed here."""
    return has_fused_decoder(base.config.model_type, getattr(base.config, "hidden_act", None))


def adapt(base: Any, weights: Mapping[Any, Weight], dtype: torch.dtype, kernels: Kernels | None) -> bool:
    """Puts the forward of this room into adapted layers, and into what lies between them where it knows the decoder.

    Args:
        base: A causal language model; its adapted layers get fresh copies of the trained weights at every call.
        weights: Adapted layer of PEFT -> its frozen weight in `dtype`.
        dtype: What is computed in.
        kernels: How what lies between is computed; None leaves it as it is.

    Returns:
        Whether it knows the decoder.
    """
    known = kernels is not None and knows(base)
    groups, grouped = [], set()
    if known:
        for module, forward, names in _parts(base):
            module.forward = MethodType(partial(forward, kernels), module)
            inner = [getattr(module, name) for name in names]
            if inner and all(layer in weights for layer in inner):
                module.lean = Group(inner, weights, dtype)
                groups.append(module.lean)
                grouped.update(inner)
    for module in (layer for layer in weights if layer not in grouped):
        module.lean = Group([module], weights, dtype)
        module.forward = MethodType(_alone, module)
        groups.append(module.lean)
    layers = [layer for group in groups for layer in group.layers]
    copies = [part for group in groups for part in group.a.split_with_sizes(group.ranks)] + [
        layer.b for layer in layers
    ]
    trained = [layer.trained_a for layer in layers] + [layer.trained_b for layer in layers]
    scaled = [layer for layer in layers if layer.scale != 1]
    base.base_model.register_forward_pre_hook(partial(_refresh, copies, trained, scaled))
    return known


def _alone(module: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = module.lean(x)[0]
    return y


def _refresh(copies: list[torch.Tensor], trained: list[torch.Tensor], scaled: list[Layer], *_: Any) -> None:
    """Copies the trained weights; one operation for all of them, which is why it needs no record of what changed."""
    with torch.no_grad():
        torch._foreach_copy_(copies, trained)
        if scaled:
            torch._foreach_mul_([layer.b for layer in scaled], [layer.scale for layer in scaled])


def _parts(base: Any) -> Iterator[tuple[Any, Callable[..., Any], tuple[str, ...]]]:
    """Parts of a decoder, their forward, and the names of their layers with a common input."""
    forwards: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
        "RMSNorm": (_norm, ()),
        "MLP": (_mlp, ("gate_proj", "up_proj")),
        "Attention": (_attention, ("q_proj", "k_proj", "v_proj")),
    }
    for module in base.modules():
        for ending, (forward, names) in forwards.items():
            if type(module).__name__.endswith(ending):
                yield module, forward, names


def _together(module: Any, x: torch.Tensor, *names: str) -> tuple[torch.Tensor, ...]:
    """The outputs of layers with a common input; one by one where not all of them are adapted."""
    group = module.__dict__.get("lean")
    return group(x) if group else tuple(getattr(module, name)(x) for name in names)


def _norm(kernels: Kernels, module: Any, x: torch.Tensor) -> torch.Tensor:
    return kernels.norm(x, module.weight, module.variance_epsilon)


def _mlp(kernels: Kernels, module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = _together(module, x, "gate_proj", "up_proj")
    y: torch.Tensor = module.down_proj(kernels.swiglu(gate, up))
    return y


def _attention(
    kernels: Kernels,
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    *,
    layout: Layout,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    query, key, value = (y.view(shape) for y in _together(module, hidden_states, "q_proj", "k_proj", "v_proj"))
    query, key = kernels.rotate(query, key, *position_embeddings)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    # Where transformers' own code of these families takes it from: Qwen2 knows it by layer, Mistral for all of them.
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    out, _weights = packed_attention(
        module, query, key, value, None, layout=layout, scaling=module.scaling, sliding_window=window
    )
    return module.o_proj(out.reshape(*shape[:-2], -1)), None
