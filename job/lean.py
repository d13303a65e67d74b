"""The frozen base with its adapter in fewer and larger operations: the same numbers up to rounding, sooner.

PEFT's forward casts, multiplies, scales and adds one after the other, and autograd keeps what lies between. Here an
adapted layer is one operation that knows what is frozen. The base's weights come from a function, so that they can be
kept dequantized or dequantized for each use: the products are the same, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn import functional

from job.attention import Layout, flat_attention

Weight = Callable[[], torch.Tensor]

FAMILIES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}
"""Decoders of one build: RMS norms, rotary positions, SwiGLU. Others keep their own code around the adapted layers."""


@dataclass(frozen=True)
class Kernels:
    """How what lies between the matrix products is computed."""

    norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """(input, weight, epsilon) -> RMS norm over the last dimension."""
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(gate, up) -> silu(gate) * up."""
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """(query, key, cosine, sine) -> query and key with their positions; both (1, tokens, heads, head size)."""


class _Adapted(torch.autograd.Function):
    """y = x W' + bias + scale (x A') B', with gradients for x, A and B alone.

    A and B are the trained fp32 weights; what is multiplied are their copies in the dtype of the computation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        _a: torch.Tensor,
        _b: torch.Tensor,
        layer: Layer,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ layer.a.T
        y = functional.linear(rows, layer.weight(), layer.bias)
        y.addmm_(low, layer.b.T)
        ctx.save_for_backward(rows, low, layer.a, layer.b)
        ctx.layer, ctx.shape = layer, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, low, a, b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        low_gradient = gradient @ b
        a_gradient = _product_in_fp32(low_gradient.T, rows)
        b_gradient = _product_in_fp32(gradient.T, low)
        if ctx.layer.scale != 1:
            b_gradient *= ctx.layer.scale
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (gradient @ ctx.layer.weight()).addmm_(low_gradient, a).view(ctx.shape)
        return x_gradient, a_gradient, b_gradient, None


def _product_in_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The matrix product, not rounded to the dtype of its factors where the machine can leave it so."""
    if left.is_cuda and left.dtype is not torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


class Layer:
    """What an adapted layer computes with; `a` and `b` are copies that `refresh` renews, `b` with the scale in it."""

    def __init__(self, module: Any, weight: Weight, dtype: torch.dtype) -> None:
        (name,) = module.active_adapters
        self.weight, self.bias, self.scale = weight, module.get_base_layer().bias, module.scaling[name]
        self.trained_a, self.trained_b = module.lora_A[name].weight, module.lora_B[name].weight
        self.a = self.trained_a.detach().to(dtype, copy=True)
        self.b = self.trained_b.detach().to(dtype, copy=True)

    def forward(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """The layer's output; the base's alone while the adapter is switched off."""
        if module.disable_adapters:
            return functional.linear(x, self.weight(), self.bias)
        y: torch.Tensor = _Adapted.apply(x, self.trained_a, self.trained_b, self)  # type: ignore[no-untyped-call]
        return y


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


def adapt(model: Any, weights: dict[Any, Weight], dtype: torch.dtype) -> None:
    """Puts the forward of this room into adapted layers.

    Args:
        model: The decoder without its head. At every call its adapted layers get fresh copies of the trained weights.
        weights: Adapted layer of PEFT -> its frozen weight in `dtype`.
        dtype: What is computed in.
    """
    layers = []
    for module, weight in weights.items():
        layer = Layer(module, weight, dtype)
        module.forward = MethodType(_call, module)
        module.lean = layer
        layers.append(layer)
    model.register_forward_pre_hook(partial(_refresh, layers))


def _call(module: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = module.lean.forward(module, x)
    return y


def _refresh(layers: list[Layer], *_: Any) -> None:
    """Copies the trained weights; one operation for all of them, which is why it needs no record of what changed."""
    with torch.no_grad():
        torch._foreach_copy_(
            [x for layer in layers for x in (layer.a, layer.b)],
            [x for layer in layers for x in (layer.trained_a, layer.trained_b)],
        )
        if scaled := [layer.b for layer in layers if layer.scale != 1]:
            torch._foreach_mul_(scaled, [layer.scale for layer in layers if layer.scale != 1])


def fuse(base: Any, kernels: Kernels) -> bool:
    """Puts `kernels` between the matrix products of a decoder; False, and nothing done, if it is of another build."""
    if type(base).__name__ not in FAMILIES or base.config.hidden_act != "silu":
        return False
    for module, forward in _forwards(base):
        module.forward = MethodType(partial(forward, kernels), module)
    return True


def _forwards(base: Any) -> Iterator[tuple[Any, Callable[..., Any]]]:
    forwards: dict[str, Callable[..., Any]] = {"RMSNorm": _norm, "MLP": _mlp, "Attention": _attention}
    for module in base.modules():
        for ending, forward in forwards.items():
            if type(module).__name__.endswith(ending):
                yield module, forward


def _norm(kernels: Kernels, module: Any, x: torch.Tensor) -> torch.Tensor:
    return kernels.norm(x, module.weight, module.variance_epsilon)


def _mlp(kernels: Kernels, module: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = module.down_proj(kernels.swiglu(module.gate_proj(x), module.up_proj(x)))
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
    query, key, value = (f(hidden_states).view(shape) for f in (module.q_proj, module.k_proj, module.v_proj))
    query, key = kernels.rotate(query, key, *position_embeddings)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out, _weights = flat_attention(module, query, key, value, None, layout=layout, scaling=module.scaling)
    return module.o_proj(out.reshape(*shape[:-2], -1)), None


def _torch_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)


def _torch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


def _torch_rotate(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    half = query.shape[-1] // 2
    cosine, sine = cosine[..., None, :half], sine[..., None, :half]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [torch.addcmul(first * cosine, second, sine, value=-1), torch.addcmul(second * cosine, first, sine)], dim=-1
        )

    return rotated(query), rotated(key)


TORCH = Kernels(_torch_norm, _torch_swiglu, _torch_rotate)
"""By torch's own operations; runs anywhere."""


def liger() -> Kernels:
    """By Liger's Triton kernels, a pass over memory each.

    Raises:
        ImportError: They are not installed, or the machine has no compiler for them.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        y: torch.Tensor = LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "llama", False)  # noqa: FBT003
        return y

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = LigerSiLUMulFunction.apply(gate, up)
        return y

    def rotate(
        query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = LigerRopeFunction.apply(query.transpose(1, 2), key.transpose(1, 2), cosine, sine)
        return q.transpose(1, 2), k.transpose(1, 2)

    return Kernels(norm, swiglu, rotate)
