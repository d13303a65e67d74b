"""Faster forward and backward passes of the frozen base with its adapter, with the same results up to rounding.

PEFT's forward casts, multiplies, scales and adds in separate operations, and autograd keeps the intermediate tensors.
Here a layer with an adapter is one autograd function, which needs no gradients of frozen tensors. For an input x of
(tokens, inputs), a frozen weight W of (outputs, inputs) and an adapter A of (rank, inputs), B of (outputs, rank) and
scale s = alpha / rank:

    y = x W' + bias + s (x A') B'

With g the gradient of y, and writing h = x A' (kept) and k = s g B, both (tokens, rank):

    dB = s g' h        dA = k' x        dx = g W + k A

W, the bias and s are frozen, so nothing else is computed, and of the forward pass only x and h are kept: x is one
tensor for all layers that read it. Layers with a common input (queries, keys and values; gate and up) are one
operation: their A's lie one below the other in one matrix, so that x is read once for all of them, forward and back.

The base's weights come from a function, so that they can be kept dequantized or dequantized for each use: the products
are the same, bit by bit.

Source of the formula: Hu et al. 2021, LoRA (arXiv:2106.09685), section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from job.model.architecture import has_fused_decoder
from job.model.fused.kernels import Kernels
from job.model.packed_attention import Layout, packed_attention

Weight = Callable[[], torch.Tensor]
"""Gives a frozen weight: (outputs, inputs) in the compute dtype."""


class _Adapted(torch.autograd.Function):
    """The formula above for all layers with a common input, with gradients for x, A and B alone.

    `trained` are the fp32 A's and then the B's: autograd has to see them to give them their gradients. What is
    multiplied are their copies in the compute dtype, which `inputs` holds; those of B have the scale in them, s B, so
    that the forward pass needs no multiplication of its own for it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, common: CommonInput, *_trained: torch.Tensor) -> Any:
        """(..., inputs) in the compute dtype -> for each layer (..., its outputs)."""
        tokens = x.reshape(-1, x.shape[-1])  # (tokens, inputs)
        low = tokens @ common.a.T  # h of all layers side by side: (tokens, sum of ranks)
        outputs = []
        for layer, part in zip(common.layers, low.split_with_sizes(common.ranks, dim=1), strict=True):
            y = functional.linear(tokens, layer.weight(), layer.bias)
            # In place: y was made on the line above, and nothing else refers to it.
            outputs.append(y.addmm_(part, layer.b.T).view(*x.shape[:-1], -1))
        # The copies of A and B too: should they change before the backward pass, autograd would find it out.
        ctx.save_for_backward(tokens, low, common.a, *(layer.b for layer in common.layers))
        ctx.common, ctx.shape = common, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The outputs' gradients -> those of x in the compute dtype, and of all A's and B's in fp32."""
        tokens, low, a, *bs = ctx.saved_tensors
        layers, ranks = ctx.common.layers, ctx.common.ranks
        gradients = tuple(gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients)
        # k of all layers side by side, each written into its own columns: dA is then one product for all of them.
        low_gradient = torch.empty_like(low)
        parts, outs = (x.split_with_sizes(ranks, dim=1) for x in (low, low_gradient))
        b_gradients = []
        for gradient, layer, b, part, out in zip(gradients, layers, bs, parts, outs, strict=True):
            torch.mm(gradient, b, out=out)  # b is s B, so this is s g B
            b_gradient = _product_in_fp32(gradient.T, part)
            # h has no scale in it, so dB gets it here; a multiplication by 1 would be a pass over memory for nothing.
            b_gradients.append(b_gradient if layer.scale == 1 else b_gradient.mul_(layer.scale))
        a_gradients = _product_in_fp32(low_gradient.T, tokens).split_with_sizes(ranks)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            # Summed in place, one weight after the other: kept for each use, only one is dequantized at a time.
            x_gradient = gradients[0] @ layers[0].weight()
            for gradient, layer in zip(gradients[1:], layers[1:], strict=True):
                x_gradient.addmm_(gradient, layer.weight())
            x_gradient = x_gradient.addmm_(low_gradient, a).view(ctx.shape)
        return x_gradient, None, *a_gradients, *b_gradients


def _product_in_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The matrix product in fp32, without rounding to the dtype of its factors where the machine supports that.

    A gradient is summed in fp32 over micro-batches: rounded to bf16 each time, small parts of it would be lost.
    """
    if left.is_cuda and left.dtype is not torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """What one layer with an adapter computes with."""

    weight: Weight
    bias: torch.Tensor | None
    """(outputs,) in the compute dtype."""
    scale: float
    """alpha / rank."""
    trained_a: torch.Tensor
    """(rank, inputs) float32."""
    trained_b: torch.Tensor
    """(outputs, rank) float32."""
    b: torch.Tensor
    """(outputs, rank): a copy of the trained one in the compute dtype, times the scale."""


class CommonInput:
    """Layers with an adapter that have a common input, which is read once for all of them."""

    def __init__(self, modules: Sequence[Any], weights: Mapping[Any, Weight], dtype: torch.dtype) -> None:
        self.modules = modules
        self.layers = []
        for module in modules:
            (name,) = module.active_adapters
            bias, scale = module.get_base_layer().bias, module.scaling[name]
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            self.layers.append(AdaptedLayer(weights[module], bias, scale, a, b, b.detach().to(dtype, copy=True)))
        self.ranks = [layer.trained_a.shape[0] for layer in self.layers]
        self.a = torch.cat([layer.trained_a.detach().to(dtype) for layer in self.layers])
        """(sum of ranks, inputs): copies of the trained ones in the compute dtype, one below the other."""

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(..., inputs) -> for each layer (..., its outputs); those of the base while the adapter is switched off."""
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
        and isinstance(module.lora_A, torch.nn.ModuleDict)  # AdaLoRA holds bare matrices
        and isinstance(module.lora_dropout[names[0]], torch.nn.Identity)
        and not module.lora_variant
        and not module.lora_bias[names[0]]
        and not module.merged
    )


def knows(base: Any) -> bool:
    """Whether a causal language model is a decoder of the build that is computed here."""
    return has_fused_decoder(base.config.model_type, getattr(base.config, "hidden_act", None))


def adapt(base: Any, weights: Mapping[Any, Weight], dtype: torch.dtype, kernels: Kernels | None) -> bool:
    """Puts the forward of this module into layers with an adapter, and into what lies between them in known decoders.

    Args:
        base: A causal language model; its layers get fresh copies of the trained weights at every call of it.
        weights: PEFT's layer with an adapter -> its frozen weight in `dtype`.
        dtype: The compute dtype.
        kernels: What norms, SwiGLU and rotary positions are computed by; None leaves them as they are.

    Returns:
        Whether the decoder is known.
    """
    known = kernels is not None and knows(base)
    inputs, together = [], set()
    if known:
        for module, forward, names in decoder_parts(base):
            module.forward = MethodType(partial(forward, kernels), module)
            inner = [getattr(module, name) for name in names]
            if inner and all(layer in weights for layer in inner):
                module.fused = CommonInput(inner, weights, dtype)
                inputs.append(module.fused)
                together.update(inner)
    for module in (layer for layer in weights if layer not in together):
        module.fused = CommonInput([module], weights, dtype)
        module.forward = MethodType(_alone, module)
        inputs.append(module.fused)
    layers = [layer for common in inputs for layer in common.layers]
    # Views into the matrix of all A's: filling them fills it.
    copies = [part for common in inputs for part in common.a.split_with_sizes(common.ranks)]
    copies += [layer.b for layer in layers]
    trained = [layer.trained_a for layer in layers] + [layer.trained_b for layer in layers]
    scaled = [layer for layer in layers if layer.scale != 1]
    base.base_model.register_forward_pre_hook(partial(_refresh, copies, trained, scaled))
    return known


def _alone(module: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = module.fused(x)[0]
    return y


def _refresh(copies: list[torch.Tensor], trained: list[torch.Tensor], scaled: list[AdaptedLayer], *_: Any) -> None:
    """Copies the trained weights before a forward pass; in one operation for all, so it need not know what changed.

    In place: the addresses stay, which a CUDA graph has recorded. Without autograd: the copies are no function of the
    trained weights to it, whose gradients `_Adapted` gives by itself.
    """
    with torch.no_grad():
        torch._foreach_copy_(copies, trained)
        if scaled:
            torch._foreach_mul_([layer.b for layer in scaled], [layer.scale for layer in scaled])


def decoder_parts(base: Any) -> Iterator[tuple[Any, Callable[..., Any], tuple[str, ...]]]:
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
    """The outputs of layers with a common input; one by one where not all of them have an adapter."""
    common = module.__dict__.get("fused")
    return common(x) if common else tuple(getattr(module, name)(x) for name in names)


def _norm(kernels: Kernels, module: Any, x: torch.Tensor) -> torch.Tensor:
    """(..., hidden) -> (..., hidden), RMS norm."""
    return kernels.norm(x, module.weight, module.variance_epsilon)


def _mlp(kernels: Kernels, module: Any, x: torch.Tensor) -> torch.Tensor:
    """(..., hidden) -> (..., hidden), by way of (..., intermediate)."""
    gate, up = _together(module, x, "gate_proj", "up_proj")
    y: torch.Tensor = module.down_proj(kernels.swiglu(gate, up))
    return y


def _attention(
    kernels: Kernels,
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    *,
    layout: Layout | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """(rows, tokens, hidden) -> the same; `position_embeddings` are cosine and sine, each (rows, tokens, head size).

    With a layout it is one row, a packed sequence. Without one, texts are generated: the mask, (rows, 1, tokens, keys),
    is the one that transformers makes for torch's kernel, and the cache holds what came before.
    """
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    query, key, value = (y.view(shape) for y in _together(module, hidden_states, "q_proj", "k_proj", "v_proj"))
    query, key = kernels.rotate(query, key, *position_embeddings)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if layout is None:
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, module.layer_idx)
        own, _weights = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=module.scaling)
        return module.o_proj(own.reshape(*shape[:-2], -1)), None
    # Where transformers' own code of these families takes it from: Qwen2 knows it by layer, Mistral for all of them.
    # Llama has no window, and ignores one that a config.json names.
    whole = module.config.sliding_window if module.config.model_type == "mistral" else None
    window = getattr(module, "sliding_window", whole)
    out, _weights = packed_attention(
        module, query, key, value, None, layout=layout, scaling=module.scaling, sliding_window=window
    )
    return module.o_proj(out.reshape(*shape[:-2], -1)), None
