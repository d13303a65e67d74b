"""The forward pass for scoring questions: closer to fp32 than that of training, at about the same speed.

bf16 rounds to 8 bits, which moves log-likelihoods by more than what separates many choices. fp16 has 11 bits, and a
GPU multiplies both at the same rate; but its largest number is 65,504. So what adds up over the layers is kept in
fp32, where it costs little, and only the factors of matrix products are rounded to fp16:

    x = embedding                                   fp32, the residual stream
    for each layer:
        h = norm(x)                                 computed in fp32, rounded to fp16
        x = x + attention(h W_q', h W_k', h W_v') W_o'
        h = norm(x)
        x = x + (silu(h W_gate') * h W_up') W_down'
    logits = norm(x) W_head'                        fp32

The products are summed in fp32. NF4 weights are dequantized to fp16, not by way of bf16. Cosine and sine of the rotary
positions are in fp32. A number that is too large for fp16 becomes infinite, and the scores of its question NaN; then
`job.evaluation.scorer` computes them again by the same pass in fp32.

Decoders like Llama's are computed by `scoring_decoder`. In others the modules of the model are unchanged, and their
`forward` is replaced while the pass runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from job.model.fused import fused_decoder
from job.model.fused.frozen_weights import dequantizer
from job.model.fused.kernels import TORCH, Kernels, Turn
from job.model.fused.lora_forward import CommonInput, Weight
from job.model.fused.scoring_decoder import (
    WIDE,
    Attend,
    Decoder,
    HeadSizes,
    Layer,
    Operations,
    Product,
    TorchOperations,
    attention_fails,
    checked_attention,
    is_like_llama,
)
from job.model.lora import base_of

if TYPE_CHECKING:
    from job.model.families import Family
    from job.model.packed_layout import Layout

PreciseForward = Callable[[torch.Tensor, torch.Tensor, "Layout", torch.Tensor], torch.Tensor]
"""As `job.evaluation.scoring.Forward`; the logits are fp32."""
LARGEST = 6e4
"""Queries and keys of a larger absolute value count as too large for fp16, and become NaN. Infinite numbers elsewhere
turn into NaN anyway; but an infinite key could give a score of -inf, which attention would silently ignore."""
_FLOATS = {torch.float16, torch.bfloat16, torch.float32}
_MISSING = object()
_HEAD_ROWS = 32768
"""Rows of the output layer's weight that are converted to fp32 at once."""


def why_not_precise(model: Any) -> str:
    """Why this pass cannot compute the model, in words; empty if it can.

    Args:
        model: A causal language model from `load_base`, with or without an adapter.
    """
    base = base_of(model)
    if (family := fused_decoder.family_of(base)) is None:
        return f"the decoder of {base.config.model_type} is not one that the fused layers compute"
    if what := _unlike(family, base.config):
        return f"the decoder of {base.config.model_type} has {what}"
    if not all(fused_decoder.fits(module) for module in base.modules() if _has_adapter(module)):
        return "the adapter is of a kind that only PEFT's own layers compute"
    if type(base.lm_head) is not torch.nn.Linear:
        return "the output layer is trained"
    projections = [module for name, module in base.model.named_modules() if name.endswith("_proj")]
    if not all(_has_adapter(module) or _is_linear(module) for module in projections):
        return "linear layers are of an unknown library"
    return ""


def _unlike(family: Family, config: Any) -> str:
    """What a family has that this pass does not compute, in words; empty if nothing."""
    if family.experts is not None:
        return "experts, which the router chooses in the dtype of training"
    if family.some_rotate:  # only rotated keys are compared with `LARGEST`
        return "layers without rotary positions"
    return "partial rotary positions" if _rotates_in_part(config) else ""


def has_foreign_layers(model: Any) -> bool:
    """Whether some linear layers are another library's, whose own forward this pass calls in the model's dtype."""
    return any(_is_linear(module) and _is_foreign(module) for module in base_of(model).model.modules())


def _rotates_in_part(config: Any) -> bool:
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return bool(rope.get("partial_rotary_factor", 1) != 1)


def fits_fp16(model: Any) -> bool:
    """Whether all weights that are not quantized have an absolute value below `LARGEST`."""
    largest = [
        p.detach().abs().amax() for p in base_of(model).parameters() if p.dtype in {torch.bfloat16, torch.float32}
    ]
    return not largest or float(torch.stack([one.float() for one in largest]).amax()) < LARGEST


def copies_bytes(model: Any) -> int:
    """Bytes that fp16 copies of the weights of all linear layers take."""
    return sum(2 * one.in_features * one.out_features for one in base_of(model).modules() if _is_linear(one))


def forwards(model: Any, kernels: Kernels, *, keep: bool) -> tuple[PreciseForward, PreciseForward]:
    """The pass in fp16, and the one in fp32 for numbers that are too large for it; see `precise_forward`."""
    half = precise_forward(model, torch.float16, kernels, keep=keep)
    return half, precise_forward(model, torch.float32, kernels, keep=False)


def precise_forward(model: Any, dtype: torch.dtype, kernels: Kernels, *, keep: bool) -> PreciseForward:
    """A forward pass with the model's present weights and adapter.

    Args:
        model: As for `why_not_precise`, in evaluation mode; its adapter may be switched off and on again.
        dtype: Dtype of the factors of matrix products, and of queries, keys and values: fp16, or fp32 to round none of
            them.
        kernels: The kernels for SwiGLU, norms and rotary positions.
        keep: Whether the weights are converted now and kept (`copies_bytes`), or converted for each use: the bits are
            the same.

    Returns:
        A function that computes the logits of one packed sequence; valid until the adapter's weights change.
    """
    base = base_of(model)
    family = fused_decoder.family_of(base)
    assert family is not None  # noqa: S101 - see `why_not_precise`
    if is_like_llama(family, base) and not has_foreign_layers(model):
        decoder = _decoder(base, family, dtype, kernels, keep=keep)
        return partial(_with_sums_in_fp32, decoder)
    precise = _precise_kernels(kernels, dtype)
    patches: dict[Any, dict[str, Any]] = {
        base.get_input_embeddings(): {"forward": partial(_in_fp32, base.get_input_embeddings().forward)},
        base.lm_head: {"forward": _output_layer(base.lm_head, dtype)},
    }
    together = set()
    for module, forward, names in fused_decoder.decoder_parts(base, family):
        patches[module] = {"forward": MethodType(partial(forward, precise, family), module)}
        inner = [getattr(module, name) for name in names]
        if inner and all(_has_adapter(layer) for layer in inner):
            patches[module]["fused"] = partial(_rounded, _common_input(inner, dtype, keep=keep))
            together.update(inner)
    adapted = {layer for layer in base.model.modules() if _has_adapter(layer)}
    inside = {part for layer in adapted for part in layer.modules()} - adapted
    for module in base.model.modules():
        if module in adapted and module not in together:
            common = _common_input([module], dtype, keep=keep)
            patches[module] = {"forward": partial(_alone, common)}
        elif _is_linear(module) and module not in inside:
            patches[module] = {"forward": _linear_layer(module, base.dtype, dtype, keep=keep)}
    return partial(_logits, model, patches)


def _decoder(base: Any, family: Family, dtype: torch.dtype, kernels: Kernels, *, keep: bool) -> Decoder:
    """The whole pass, for decoders like Llama's; arguments as for `precise_forward`."""
    operations = _operations(kernels, dtype)
    layers = []
    for module in base.model.layers:
        attention, mlp = module.self_attn, module.mlp
        heads = _joined([attention.q_proj, attention.k_proj, attention.v_proj], dtype, keep=keep)
        gate_up = _joined([mlp.gate_proj, mlp.up_proj], dtype, keep=keep, apart=True)
        out, down = (_joined([layer], dtype, keep=keep) for layer in (attention.o_proj, mlp.down_proj))
        layers.append(Layer(module, heads, out, gate_up, down))
    attend: Attend = operations.attend
    if kernels.name == "triton" and dtype is torch.float16:
        attend = checked_attention(operations, _heads(base, family), base.device)
    return Decoder(base, layers, _output_layer(base.lm_head, dtype), operations, attend, dtype, family.window)


def _operations(kernels: Kernels, dtype: torch.dtype) -> Operations:
    largest = LARGEST if dtype is torch.float16 else None
    if kernels.name == "triton":
        from job.model.fused.triton_scoring import TritonOperations

        return TritonOperations(largest)
    return TorchOperations(largest)


def _heads(base: Any, family: Family) -> HeadSizes:
    sizes = base.config.num_attention_heads, base.config.num_key_value_heads, base.model.layers[0].self_attn.head_dim
    return HeadSizes(*sizes, windowed=family.window is not None)


def tested_attention(model: Any, kernels: Kernels) -> tuple[HeadSizes, bool] | None:
    """(the model's heads, whether Triton's attention for them fails its test here); None where it is not used.

    Args:
        model: As for `why_not_precise`, which has no reason.
        kernels: As for `precise_forward`.
    """
    base = base_of(model)
    family = fused_decoder.family_of(base)
    if kernels.name != "triton" or family is None or not is_like_llama(family, base) or has_foreign_layers(model):
        return None
    heads = _heads(base, family)
    return heads, attention_fails(_operations(kernels, torch.float16), heads, base.device)


def _joined(modules: Sequence[Any], dtype: torch.dtype, *, keep: bool, apart: bool = False) -> Product:
    """The product of linear layers with a common input, of which all, some or none have an adapter.

    With `apart` each keeps a separate weight matrix: a common one would take much memory when it is dequantized.
    """
    adapted = [module for module in modules if _has_adapter(module)]
    inner = [module.get_base_layer() if _has_adapter(module) else module for module in modules]
    weights = [_weight(layer, dtype, keep=False) for layer in inner]
    biases = [layer.bias for layer in inner]
    bias = None
    if any(one is not None for one in biases):
        parts = zip(biases, inner, strict=True)
        device = inner[0].weight.device
        bias = torch.cat([torch.zeros(o.out_features, device=device) if b is None else b.detach() for b, o in parts])
        bias = bias.to(dtype)
    a = b = None
    if adapted:
        common = _common_input(adapted, dtype, weights=dict(zip(modules, weights, strict=True)))
        wide = -(-sum(common.ranks) // WIDE) * WIDE
        a = functional.pad(common.a, (0, 0, 0, wide - common.a.shape[0]))
        b = common.a.new_zeros(sum(layer.out_features for layer in inner), wide)
        factors = dict(zip(adapted, common.layers, strict=True))
        row = column = 0
        for module, layer in zip(modules, inner, strict=True):
            if (factor := factors.get(module)) is not None:
                rank = factor.b.shape[1]
                b[row : row + layer.out_features, column : column + rank] = factor.b
                column += rank
            row += layer.out_features
    outputs = [layer.out_features for layer in inner]
    products = [(weights, b, sum(outputs))]
    if apart:
        parts_of_b = [None] * len(inner) if b is None else b.split_with_sizes(outputs)
        products = [([weight], part, rows) for weight, part, rows in zip(weights, parts_of_b, outputs, strict=True)]
    makes: list[Weight] = [partial(_side_by_side, *product) for product in products]
    if keep:
        makes = [partial(_identity, make()) for make in makes]
    sizes = [rows for _, _, rows in products]
    return Product(makes, sizes, a, bias, inner[0].in_features, adapted[0] if adapted else None)


def _side_by_side(weights: Sequence[Weight], b: torch.Tensor | None, outputs: int) -> torch.Tensor:
    """[W | s B] of stacked layers, (all outputs, inputs + wide); only one of the weights is dequantized at a time.

    Args:
        weights: Each returns (its outputs, inputs).
        b: s B, (all outputs, wide); None without an adapter.
        outputs: All outputs.
    """
    if len(weights) == 1 and b is None:
        return weights[0]()
    part = weights[0]()
    inputs = part.shape[1]
    stacked = part.new_empty(outputs, inputs + (0 if b is None else b.shape[1]))
    row = 0
    for number, weight in enumerate(weights):
        if number:
            part = weight()
        stacked[row : row + len(part), :inputs] = part
        row += len(part)
    if b is not None:
        stacked[:, inputs:] = b
    return stacked


def _identity(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _with_sums_in_fp32(forward: PreciseForward, *inputs: Any) -> torch.Tensor:
    with _sums_in_fp32():
        return forward(*inputs)


def _has_adapter(module: Any) -> bool:
    """Whether a module is PEFT's layer around a linear one."""
    return hasattr(module, "lora_A")


def _is_linear(module: Any) -> bool:
    """Whether a module is a linear layer, torch's or that of a library that quantizes, and not PEFT's."""
    return hasattr(module, "in_features") and hasattr(module, "weight") and not _has_adapter(module)


def _logits(  # noqa: PLR0917 - a `Forward` with what it needs
    model: Any,
    patches: Mapping[Any, Mapping[str, Any]],
    ids: torch.Tensor,
    positions: torch.Tensor,
    layout: Layout,
    reads: torch.Tensor,
) -> torch.Tensor:
    with _patched(patches), _sums_in_fp32():
        logits: torch.Tensor = model(
            input_ids=ids, position_ids=positions, layout=layout, logits_to_keep=reads, use_cache=False
        ).logits[0]
    return logits


@contextmanager
def _patched(patches: Mapping[Any, Mapping[str, Any]]) -> Iterator[None]:
    """Within it, modules have other attributes; set in their `__dict__`, since torch's `__setattr__` is slow."""
    before = [(module, name, module.__dict__.get(name, _MISSING)) for module, new in patches.items() for name in new]
    for module, new in patches.items():
        module.__dict__.update(new)
    try:
        yield
    finally:
        for module, name, old in before:
            if old is _MISSING:
                del module.__dict__[name]
            else:
                module.__dict__[name] = old


@contextmanager
def _sums_in_fp32() -> Iterator[None]:
    """Makes cuBLAS add partial sums of a product in fp32; by default it may round them to the dtype of the factors."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before


def _in_fp32(forward: Callable[..., torch.Tensor], *inputs: Any, **options: Any) -> torch.Tensor:
    """The embedding's rows in fp32, which makes the residual stream and the rotary angles fp32, too."""
    return forward(*inputs, **options).float()


def _weight(layer: Any, dtype: torch.dtype, *, keep: bool) -> Weight:
    """A function that returns the weight of a linear layer, (outputs, inputs), in `dtype`."""
    is_4bit = getattr(layer.weight, "quant_state", None) is not None
    make: Weight = dequantizer(layer, dtype) if is_4bit else partial(layer.weight.detach().to, dtype)
    if not keep:
        return make
    kept: torch.Tensor = make()
    return lambda: kept


def _common_input(
    modules: Sequence[Any], dtype: torch.dtype, *, keep: bool = False, weights: Mapping[Any, Weight] | None = None
) -> CommonInput:
    """A `CommonInput` whose copies of the adapter in `dtype` are made once, not before each pass."""
    if weights is None:
        weights = {module: _weight(module.get_base_layer(), dtype, keep=keep) for module in modules}
    common = CommonInput(modules, weights, dtype)
    common.layers = [
        replace(
            layer,
            bias=None if layer.bias is None else layer.bias.detach().to(dtype),
            b=(layer.trained_b.detach().float() * layer.scale).to(dtype),
        )
        for layer in common.layers
    ]
    return common


def _rounded(common: CommonInput, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Layers with a common input, cast first: without a norm in front (OLMo 2), it is the fp32 residual stream."""
    return common(x.to(common.a.dtype))


def _alone(common: CommonInput, x: torch.Tensor) -> torch.Tensor:
    """A layer with an adapter that shares its input with no other."""
    return _rounded(common, x)[0]


def _linear_layer(
    layer: Any, weight_dtype: torch.dtype, dtype: torch.dtype, *, keep: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of a linear layer without an adapter.

    A layer that another library quantized keeps its own forward, in `weight_dtype`, the dtype the model was loaded in.
    """
    if _is_foreign(layer):
        return partial(_own_forward, layer.forward, weight_dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return partial(_product, _weight(layer, dtype, keep=keep), bias)


def _is_foreign(layer: Any) -> bool:
    """Whether a linear layer is one that another library than bitsandbytes quantized."""
    plain = type(layer) is torch.nn.Linear and "forward" not in layer.__dict__ and layer.weight.dtype in _FLOATS
    return not plain and getattr(layer.weight, "quant_state", None) is None


def _product(weight: Weight, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    factor = weight()
    return functional.linear(x.to(factor.dtype), factor, bias)


def _own_forward(
    forward: Callable[[torch.Tensor], torch.Tensor], weight_dtype: torch.dtype, x: torch.Tensor
) -> torch.Tensor:
    return forward(x.to(weight_dtype)).to(x.dtype)


def _output_layer(layer: Any, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of the output layer: (..., hidden) in `dtype` -> (..., vocabulary) in fp32."""
    bias = None if layer.bias is None else layer.bias.detach().float()
    weight = layer.weight.detach()
    if dtype is not torch.float32 and weight.is_cuda:
        return partial(_fp32_product, weight.to(dtype), bias)
    return partial(_product_by_rows, weight, bias)


def _fp32_product(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The product of factors in fp16, not rounded to fp16."""
    y = torch.mm(x.reshape(-1, x.shape[-1]), weight.T, out_dtype=torch.float32).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _product_by_rows(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The product in fp32, with a part of the weight in fp32 at a time."""
    y = torch.cat([functional.linear(x.float(), rows.float()) for rows in torch.split(weight, _HEAD_ROWS)], -1)
    return y if bias is None else y + bias


def _precise_kernels(kernels: Kernels, dtype: torch.dtype) -> Kernels:
    """Norms from fp32 to `dtype`, and rotary positions by angles in fp32."""
    norm: Callable[..., torch.Tensor] = _norm
    turn: Turn = _turn
    if kernels.name == "triton":
        from job.model.fused import triton_kernels

        norm = triton_kernels.norm
        turn = partial(triton_kernels.turn, largest=LARGEST if dtype is torch.float16 else None)
    around_one = partial(norm, dtype=dtype, around_one=True)
    return replace(kernels, norm=partial(norm, dtype=dtype), norm_around_one=around_one, turn=turn)


def _norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, dtype: torch.dtype, around_one: bool = False
) -> torch.Tensor:
    factor = 1 + weight.float() if around_one else weight.float()
    return functional.rms_norm(x.float(), (x.shape[-1],), factor, epsilon).to(dtype)


def _turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    turned = TORCH.turn(x.float(), cosine, sine)
    if x.dtype is torch.float16:
        turned = turned.masked_fill(turned.abs() > LARGEST, float("nan"))
    return turned.to(x.dtype)
