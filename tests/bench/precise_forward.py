"""The forward pass of known decoders with a choice of precision: what is scored is nearer to fp32 than what is trained.

Training and scoring read the same weights. Where a model computes in bf16, its results are rounded to 8 bits after
each operation, and rounding moves log-likelihoods by more than what separates many choices. This pass keeps what
accumulates (the residual stream, the logits, the rotary angles) in fp32, and rounds the factors of the large matrix
products to a dtype that tensor cores multiply at full speed:

    x = embedding                                   residual
    for each layer:
        h = norm(x)                                 computed in fp32, rounded to `factors`
        x = x + attention(h W_q', h W_k', h W_v') W_o'
        h = norm(x)
        x = x + (silu(h W_gate') * h W_up') W_down'
    logits = norm(x) W_head'                        `logits`

The decoders are Llama's, Mistral's and Qwen2's, with linear layers as they are loaded here: plain, NF4, or either
of them with a LoRA adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from job.model.fused.frozen_weights import dequantized
from job.model.fused.kernels import TORCH, Kernels
from job.model.packed_attention import Layout, packed_attention


@dataclass(frozen=True)
class Precision:
    """In which dtype what is computed.

    Attributes:
        factors: Both factors of the products with weights, and queries, keys and values.
        residual: The sum that every layer adds to.
        added: What attention and MLP add to it.
        logits: The output layer's result. Its factors are in `factors`.
        adapter: The factors of the adapter's products.
        angles: Cosine and sine of the rotary positions.
    """

    factors: torch.dtype
    residual: torch.dtype = torch.float32
    added: torch.dtype = torch.float32
    logits: torch.dtype = torch.float32
    adapter: torch.dtype | None = None
    angles: torch.dtype = torch.float32


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def sums_in_fp32() -> Iterator[None]:
    """Has cuBLAS add partial sums of a product in fp32; by default it may round them to the dtype of the factors."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = before


def logits_of(
    model: Any,
    ids: torch.Tensor,
    positions: torch.Tensor,
    layout: Layout,
    reads: torch.Tensor,
    *,
    how: Precision,
    kernels: Kernels = TORCH,
) -> torch.Tensor:
    """The logits of one packed sequence at some of its positions.

    Args:
        model: A decoder of Llama's, Mistral's or Qwen2's kind, with or without an adapter, which may be switched off.
        ids: (1, tokens) int64.
        positions: (1, tokens) int64, for the rotary embedding.
        layout: Which tokens see which.
        reads: (reads,) int64: the positions whose logits are computed.
        how: The dtypes.
        kernels: For SwiGLU and rotation.

    Returns:
        (reads, vocabulary) in `how.logits`.
    """
    base = _base(model)
    decoder, weights = base.model, kept_weights(model)
    x = decoder.embed_tokens(ids)[0].to(how.residual)  # (tokens, hidden)
    # transformers gives the angles in the dtype of the tensor that it is handed
    cosine, sine = decoder.rotary_emb(x.new_empty(1, dtype=how.angles), positions)
    angles = cosine.to(how.angles), sine.to(how.angles)
    for layer in decoder.layers:
        h = _norm(layer.input_layernorm, x, how)
        x = x + _attention(layer.self_attn, h, angles, layout, how, kernels, weights).to(how.residual)
        h = _norm(layer.post_attention_layernorm, x, how)
        gate, up = (
            _linear_layer(getattr(layer.mlp, f"{name}_proj"), h, how.factors, how, weights) for name in ("gate", "up")
        )
        h = kernels.swiglu(gate, up)
        x = x + _linear_layer(layer.mlp.down_proj, h, how.added, how, weights).to(how.residual)
    h = _norm(decoder.norm, x[reads], how)
    return _product(h, base.lm_head.weight.to(how.factors), how.logits)


def _norm(module: Any, x: torch.Tensor, how: Precision) -> torch.Tensor:
    """(tokens, hidden) in `residual` -> the same in `factors`."""
    x = x.float()
    return functional.rms_norm(x, (x.shape[-1],), module.weight.float(), module.variance_epsilon).to(how.factors)


def _attention(  # noqa: PLR0917 - what a layer needs
    module: Any,
    h: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    layout: Layout,
    how: Precision,
    kernels: Kernels,
    weights: dict[Any, Any],
) -> torch.Tensor:
    """(tokens, hidden) in `factors` -> what is added to the residual stream, in `added`."""
    shape = (1, h.shape[0], -1, module.head_dim)
    query, key, value = (
        _linear_layer(getattr(module, f"{n}_proj"), h, how.factors, how, weights).view(shape) for n in "qkv"
    )
    query, key = (_turn(x, angles, kernels) for x in (query, key))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    whole = module.config.sliding_window if module.config.model_type == "mistral" else None
    window = getattr(module, "sliding_window", whole)
    out, _weights = packed_attention(
        module, query, key, value, None, layout=layout, scaling=module.scaling, sliding_window=window
    )
    return _linear_layer(module.o_proj, out.reshape(h.shape[0], -1), how.added, how, weights)


def _turn(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], kernels: Kernels) -> torch.Tensor:
    """(1, tokens, heads, head size) with its positions, rounded once."""
    if kernels.name == "triton" or x.dtype == angles[0].dtype:
        return kernels.turn(x, *angles)
    return kernels.turn(x.float(), *(a.float() for a in angles)).to(x.dtype)


def kept_weights(model: Any) -> dict[Any, Any]:
    """PEFT's layer -> what gives its frozen weight, where the fused layers keep that or know how to make it."""
    found = {}
    for module in model.modules():
        if (common := module.__dict__.get("fused")) is not None:
            found.update({inner: layer.weight for inner, layer in zip(common.modules, common.layers, strict=True)})
    return found


def _linear_layer(
    module: Any, x: torch.Tensor, out: torch.dtype, how: Precision, weights: dict[Any, Any]
) -> torch.Tensor:
    """(tokens, inputs) -> (tokens, outputs) in `out`, with the adapter if there is one and it is on."""
    adapted = hasattr(module, "lora_A")
    layer = module.get_base_layer() if adapted else module
    if (kept := weights.get(module)) is not None:
        weight = kept()
    elif getattr(layer.weight, "quant_state", None) is not None:
        weight = dequantized(layer, layer.weight.quant_state.dtype)
    else:
        weight = layer.weight
    y = _product(x, weight.to(how.factors), out)
    if layer.bias is not None:
        y = y + layer.bias.to(out)
    if not adapted or module.disable_adapters:
        return y
    (name,) = module.active_adapters
    dtype = how.adapter or how.factors
    low = _product(x.to(dtype), module.lora_A[name].weight.to(dtype), dtype)
    b = (module.lora_B[name].weight.float() * module.scaling[name]).to(dtype)
    return (y + _product(low, b, dtype if dtype == torch.float32 else out)).to(out)


def _product(x: torch.Tensor, weight: torch.Tensor, out: torch.dtype) -> torch.Tensor:
    """(tokens, inputs) by (outputs, inputs) of one dtype, summed in fp32 -> (tokens, outputs) in `out`."""
    if not x.is_cuda:
        return functional.linear(x.float(), weight.float()).to(out)
    if x.dtype in {out, torch.float32}:
        return functional.linear(x, weight).to(out)
    return torch.mm(x, weight.T, out_dtype=out)
