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
With dropout each layer's adapter reads a d(x) of its own, which the backward pass makes again (`dropout.py`):

    h = d(x) A'        dA = k' d(x)        dx = g W + d(k A)

The base's weights come from a function, so that they can be kept dequantized or dequantized for each use: the products
are the same, bit by bit.

Source of the formula: Hu et al. 2021, LoRA (arXiv:2106.09685), section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import MethodType
from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from job.model.families import Family, fused_family
from job.model.fused.dropout import new_state
from job.model.fused.fp8 import FrozenProducts
from job.model.fused.kernels import TORCH, Kernels
from job.model.packed_attention import packed_attention
from job.model.packed_layout import Layout

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
        ctx.drops = common.drops
        low = common.low(tokens, drops=ctx.drops)  # h of all layers side by side: (tokens, sum of ranks)
        outputs = []
        ctx.fp8 = common.products_in_training
        parts = low.split_with_sizes(common.ranks, dim=1)
        for layer, y, part in zip(common.layers, common.frozen(tokens, ctx.fp8), parts, strict=True):
            # In place: y was made for this round, and nothing else refers to it.
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
        a_gradients = ctx.common.a_gradients(low_gradient, tokens, drops=ctx.drops)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            # Summed in place, one weight after the other: kept for each use, only one is dequantized at a time.
            if ctx.fp8 is not None:
                x_gradient = ctx.fp8.input_gradient(gradients)
            else:
                x_gradient = gradients[0] @ layers[0].weight()
                for gradient, layer in zip(gradients[1:], layers[1:], strict=True):
                    x_gradient.addmm_(gradient, layer.weight())
            x_gradient = ctx.common.add_input_gradient(x_gradient, low_gradient, a, drops=ctx.drops).view(ctx.shape)
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
    dropout: float = 0.0
    """The probability that an entry of the adapter's input is dropped in training."""
    number: int = 0
    """Of the layer, by which its masks differ from those of others."""


@dataclass(frozen=True, eq=False)
class Dropout:
    """What masks are made with: the kernel, and the numbers that `dropout.reseed` changes for each micro-batch."""

    drop: Callable[[torch.Tensor, torch.Tensor, int, float], torch.Tensor]
    state: torch.Tensor
    """(2,) int64, `dropout.new_state`."""


class CommonInput:
    """Layers with an adapter that have a common input, which is read once for all of them.

    Args:
        modules: PEFT's layers.
        weights: PEFT's layer -> its frozen weight in `dtype`.
        dtype: The compute dtype.
        dropout: Used where the layers have dropout.
        first: The number of the first layer.
    """

    def __init__(
        self,
        modules: Sequence[Any],
        weights: Mapping[Any, Weight],
        dtype: torch.dtype,
        dropout: Dropout | None = None,
        first: int = 0,
    ) -> None:
        self.modules, self._dropout = modules, dropout
        self.layers = []
        for number, module in enumerate(modules, first):
            (name,) = module.active_adapters
            rate = getattr(module.lora_dropout[name], "p", 0.0)  # PEFT has an Identity where there is none
            bias, scale = module.get_base_layer().bias, module.scaling[name]
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            copy = b.detach().to(dtype, copy=True)
            self.layers.append(AdaptedLayer(weights[module], bias, scale, a, b, copy, rate, number))
        self.ranks = [layer.trained_a.shape[0] for layer in self.layers]
        self.a = torch.cat([layer.trained_a.detach().to(dtype) for layer in self.layers])
        """(sum of ranks, inputs): copies of the trained ones in the compute dtype, one below the other."""
        self.fp8: FrozenProducts | None = None
        """The products with the frozen weights, where training computes them in FP8."""

    @property
    def products_in_training(self) -> FrozenProducts | None:
        """`fp8` while the model is in training mode; a model that is scored computes in its own dtype."""
        return self.fp8 if self.modules[0].training else None

    def frozen(self, tokens: torch.Tensor, fp8: FrozenProducts | None) -> Iterator[torch.Tensor]:
        """(tokens, inputs) -> for each layer (tokens, its outputs) of the base alone, when it is asked for."""
        if fp8 is not None:
            return fp8.outputs(tokens)
        return (functional.linear(tokens, layer.weight(), layer.bias) for layer in self.layers)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(..., inputs) -> for each layer (..., its outputs); those of the base while the adapter is switched off."""
        if self.modules[0].disable_adapters:
            return tuple(functional.linear(x, layer.weight(), layer.bias) for layer in self.layers)
        trained = [layer.trained_a for layer in self.layers] + [layer.trained_b for layer in self.layers]
        outputs: tuple[torch.Tensor, ...] = _Adapted.apply(x, self, *trained)  # type: ignore[no-untyped-call]
        return outputs

    @property
    def drops(self) -> bool:
        """Whether dropout is on: it has a rate, and its modules are in training mode."""
        name = self.modules[0].active_adapters[0]
        return self.modules[0].lora_dropout[name].training and any(layer.dropout for layer in self.layers)

    def low(self, tokens: torch.Tensor, *, drops: bool) -> torch.Tensor:
        """(tokens, inputs) -> h of all layers side by side, (tokens, sum of ranks)."""
        if not drops:
            return tokens @ self.a.T
        low = tokens.new_empty(tokens.shape[0], self.a.shape[0])
        parts = zip(self.layers, self.a.split_with_sizes(self.ranks), low.split_with_sizes(self.ranks, 1), strict=True)
        for layer, a, part in parts:
            torch.mm(self._dropped(tokens, layer), a.T, out=part)
        return low

    def a_gradients(self, low_gradient: torch.Tensor, tokens: torch.Tensor, *, drops: bool) -> tuple[torch.Tensor, ...]:
        """k, (tokens, sum of ranks), and the input -> for each layer its dA, (rank, inputs) fp32."""
        if not drops:
            return _product_in_fp32(low_gradient.T, tokens).split_with_sizes(self.ranks)
        parts = zip(self.layers, low_gradient.split_with_sizes(self.ranks, 1), strict=True)
        return tuple(_product_in_fp32(part.T, self._dropped(tokens, layer)) for layer, part in parts)

    def add_input_gradient(
        self, x_gradient: torch.Tensor, low_gradient: torch.Tensor, a: torch.Tensor, *, drops: bool
    ) -> torch.Tensor:
        """Adds the adapters' part of dx, (tokens, inputs), in place, and returns it."""
        if not drops:
            return x_gradient.addmm_(low_gradient, a)
        parts = zip(
            self.layers, low_gradient.split_with_sizes(self.ranks, 1), a.split_with_sizes(self.ranks), strict=True
        )
        for layer, part, own in parts:
            x_gradient += self._dropped(part @ own, layer)
        return x_gradient

    def _dropped(self, x: torch.Tensor, layer: AdaptedLayer) -> torch.Tensor:
        """(tokens, inputs) -> the same through the layer's mask, whatever the values are."""
        if not layer.dropout:
            return x
        assert self._dropout is not None  # noqa: S101 - `adapt` gives it where there is a rate
        return self._dropout.drop(x, self._dropout.state, layer.number, layer.dropout)


def fits(module: Any) -> bool:
    """Whether an adapted layer of PEFT is of the plain kind that is computed here: one adapter, and plain dropout."""
    names = module.active_adapters
    return (
        len(names) == 1
        and not hasattr(module, "parameter_name")  # of experts: see `experts.py`
        and isinstance(module.lora_A, torch.nn.ModuleDict)  # AdaLoRA holds bare matrices
        and type(module.lora_dropout[names[0]]) in {torch.nn.Identity, torch.nn.Dropout}
        and not module.lora_variant
        and not module.lora_bias[names[0]]
        and not module.merged
    )


def family_of(base: Any) -> Family | None:
    """By what the whole decoder of a causal language model is computed here; None if it is of no known family."""
    return fused_family(base.config.to_dict())


def knows(base: Any) -> bool:
    """Whether a causal language model is of a family whose decoder is computed here."""
    return family_of(base) is not None


def decoder_of(base: Any) -> Any:
    """The part of a causal language model between token ids and the output layer, without what reads images."""
    inner = base.base_model
    return getattr(inner, "language_model", inner)


def attention_with_cache(base: Any) -> str | None:
    """The attention, by transformers' name, by which texts are generated here; None where the decoder is not known."""
    if (family := family_of(base)) is None:
        return None
    return "eager" if family.caps_scores else "sdpa"  # torch's kernel has no soft cap


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
    family = None if kernels is None else family_of(base)
    inputs: list[CommonInput] = []
    together: set[Any] = set()
    state = new_state(base.device)
    dropout = Dropout((TORCH if kernels is None else kernels).drop, state)

    def share(layers: Sequence[Any]) -> CommonInput:
        inputs.append(CommonInput(layers, weights, dtype, dropout, len(together)))
        together.update(layers)
        return inputs[-1]

    if kernels is not None and family is not None:
        for module, forward, names in decoder_parts(base, family):
            module.forward = MethodType(partial(forward, kernels, family), module)
            inner = [getattr(module, name) for name in names]
            if inner and all(layer in weights for layer in inner):
                module.fused = share(inner)
    for module in [layer for layer in weights if layer not in together]:
        module.fused = share([module])
        module.forward = MethodType(_alone, module)
    layers = [layer for common in inputs for layer in common.layers]
    if any(layer.dropout for layer in layers):
        base.dropout_state = state
    # Views into the matrix of all A's: filling them fills it.
    copies = [part for common in inputs for part in common.a.split_with_sizes(common.ranks)]
    copies += [layer.b for layer in layers]
    trained = [layer.trained_a for layer in layers] + [layer.trained_b for layer in layers]
    scaled = [layer for layer in layers if layer.scale != 1]
    if (earlier := base.__dict__.get("refresh_hook")) is not None:
        earlier.remove()  # of a first try for which memory was too small
    base.refresh_hook = decoder_of(base).register_forward_pre_hook(partial(_refresh, copies, trained, scaled))
    return family is not None


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


def decoder_parts(base: Any, family: Family) -> Iterator[tuple[Any, Callable[..., Any], tuple[str, ...]]]:
    """Parts of a decoder, their forward, and the names of their layers with a common input."""
    forwards: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
        "RMSNorm": (_norm, ()),
        "MLP": (_mlp, ("gate_up_proj",) if family.joined else ("gate_proj", "up_proj")),
        "Attention": (_attention, ("qkv_proj",) if family.joined else ("q_proj", "k_proj", "v_proj")),
    }
    for module in decoder_of(base).modules():
        if getattr(module, "rope_type", None) == "longrope":
            yield module, _rotary, ()
        for ending, (forward, names) in forwards.items():
            if type(module).__name__.endswith(ending):
                yield module, forward, names


def _together(module: Any, x: torch.Tensor, *names: str) -> tuple[torch.Tensor, ...]:
    """The outputs of layers with a common input; one by one where not all of them have an adapter."""
    common = module.__dict__.get("fused")
    return common(x) if common else tuple(getattr(module, name)(x) for name in names)


def _norm(kernels: Kernels, family: Family, module: Any, x: torch.Tensor) -> torch.Tensor:
    """(..., hidden) -> (..., hidden), RMS norm."""
    if family.norm == "1 + weight":
        return kernels.norm_around_one(x, module.weight, module.eps)
    return kernels.norm(x, module.weight, module.variance_epsilon)


def _is_recorded(x: torch.Tensor) -> bool:
    """Whether what is computed with it now becomes part of a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _rotary(
    _kernels: Kernels, _family: Family, module: Any, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of (rows, tokens) positions, each (rows, tokens, width) in the dtype of x, by LongRoPE.

    transformers compares the longest sequence with the length that the model was first trained for, to choose between
    two sets of frequencies, and some versions do so on the host. A recording must not, and need not: of models with
    LongRoPE only sequences within that length are packed (`packing_check`).
    """
    if not _is_recorded(x):
        found: tuple[torch.Tensor, torch.Tensor] = type(module).forward(module, x, position_ids)
        return found
    angles = position_ids[..., None].float() * module.original_inv_freq.to(x.device, torch.float32)
    angles = torch.cat((angles, angles), -1)
    scale = module.attention_scaling
    return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def _mlp(kernels: Kernels, family: Family, module: Any, x: torch.Tensor) -> torch.Tensor:
    """(..., hidden) -> (..., hidden), by way of (..., intermediate)."""
    if family.joined:
        gate, up = _together(module, x, "gate_up_proj")[0].chunk(2, -1)
    else:
        gate, up = _together(module, x, "gate_proj", "up_proj")
    y: torch.Tensor = module.down_proj(kernels.gated(family.activation)(gate, up))
    return y


def _attention(
    kernels: Kernels,
    family: Family,
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
    is the one that transformers makes for `attention_with_cache`, and the cache holds what came before.
    """
    query, key, value = _heads(family, module, hidden_states)
    if not family.some_rotate or module.use_rope:
        query, key = kernels.rotate(query, key, *position_embeddings)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    cap = {"softcap": module.attn_logit_softcapping} if family.caps_scores else {}
    if layout is None:
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, module.layer_idx)
        attend = sdpa_attention_forward
        if family.caps_scores:  # the model's own code, of the file of its class
            attend = import_module(type(module).__module__).eager_attention_forward
        out, _weights = attend(module, query, key, value, attention_mask, scaling=module.scaling, **cap)
    else:
        # Qwen2 knows its window by layer, Mistral for all of them.
        owner = {"layer": module, "model": module.config, None: None}[family.window]
        window = getattr(owner, "sliding_window", None)
        out, _weights = packed_attention(
            module, query, key, value, None, layout=layout, scaling=module.scaling, sliding_window=window, **cap
        )
    return module.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def _heads(family: Family, module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values before their positions, each (rows, tokens, its heads, head size)."""
    if family.joined:
        config, size = module.config, module.head_dim
        widths = [size * heads for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        query, key, value = _together(module, x, "qkv_proj")[0].split_with_sizes(widths, -1)
    else:
        query, key, value = _together(module, x, "q_proj", "k_proj", "v_proj")
    if family.query_norm == "all heads":
        query, key = module.q_norm(query), module.k_norm(key)
    query, key, value = (y.view(*y.shape[:-1], -1, module.head_dim) for y in (query, key, value))
    if family.query_norm == "head":
        query, key = module.q_norm(query), module.k_norm(key)
    return query, key, value
