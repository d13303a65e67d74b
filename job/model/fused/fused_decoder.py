"""The fused forward pass of a decoder of a known family: which forward is put into which of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import MethodType
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from job.model.families import Family, fused_family
from job.model.fused.dropout import new_state
from job.model.fused.kernels import TORCH, Kernels
from job.model.fused.lora_forward import AdaptedLayer, CommonInput, Dropout, Weight
from job.model.packed_attention import packed_attention
from job.model.packed_layout import Layout


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
    """The `Family` that computes the whole decoder of a causal language model; None if it is not supported."""
    return fused_family(base.config.to_dict())


def knows(base: Any) -> bool:
    """Whether a causal language model's family is supported, so that its whole decoder is computed here."""
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
    """Replaces the forward of layers with an adapter, and of the modules between them in supported decoders.

    Args:
        base: A causal language model; its layers get fresh copies of the trained weights at every call of it.
        weights: PEFT's layer with an adapter -> its frozen weight in `dtype`.
        dtype: The compute dtype.
        kernels: What norms, SwiGLU and rotary positions are computed by; None leaves them unchanged.

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
    trained weights to it, whose gradients `lora_forward` computes.
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
        cosine_and_sine: tuple[torch.Tensor, torch.Tensor] = type(module).forward(module, x, position_ids)
        return cosine_and_sine
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
    is the one that transformers makes for `attention_with_cache`, and the cache holds the tokens before.
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
