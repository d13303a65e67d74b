"""Attention over a packed sequence, whose layout says what each token sees (`packed_layout`).

Further arguments of a layer (a sliding window, a soft cap, attention sinks) are computed, or refused with `Unpackable`;
none is ignored. Whether a whole model is computed correctly is tested by `packing_check`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention

from job.model.packed_layout import Layout

NAME = "flat"
"""Name of this attention in transformers. A model with it is called with a `layout` and no mask."""
CHECKED = "flat-checked"
"""The same, but each layer also gets the mask that transformers would make for it; see `AskedMask`."""
_MOST_KEYS = 16
"""How many times the keys of a sequence may be copied for the variable-length kernel, to be contiguous for each
segment; where long prefixes shared by many segments need more copies, blocks run one by one."""
WIDEST_HEAD = 256
"""The variable-length kernel takes no wider heads, and those of queries and values alike."""

_NO_ARITHMETIC = frozenset(
    {"cache_position", "layer_idx", "output_attentions", "output_hidden_states", "output_router_logits"}
    | {"position_ids", "return_dict", "use_cache"}
)
"""Arguments that models pass to all layers and that do not affect the result of attention."""


class Unpackable(TypeError):
    """A layer needs what packed attention does not compute: the model has to be run one sequence at a time."""


@dataclass(frozen=True)
class AskedMask:
    """The mask that transformers would have made for a layer: what the layer's own arguments must agree with.

    Eager attention gets its window by the mask, kernels get it by an argument; a layer whose arguments lack it would
    silently see too much here.
    """

    window: int | None
    """How many keys a query sees, itself included; None where it sees all before it."""
    plain: bool = True
    """Whether it is causal and no more: not in chunks, not in both directions, not by a function of the model's own."""


def packed_attention(  # the signature is transformers'
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | AskedMask | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one packed sequence, for transformers' attention interface.

    Args:
        query: (1, heads, tokens, head size).
        key: (1, key/value heads, tokens, head size); fewer heads than queries are shared by groups of them.
        value: (1, key/value heads, tokens, value's head size).
        attention_mask: None; within the check of a model, what it would have been.
        layout: The segments.
        scaling: Factor of the scores; 1/sqrt(head size) where it is None.
        dropout: Rate of dropout on attention weights; must be 0.
        sliding_window: Number of keys before and including a query that it sees; None for all.
        softcap: Scores become softcap * tanh(score / softcap).
        s_aux: (heads,): for each head a score that takes its share of the softmax and gives no value (a "sink").
        is_causal: Must not be False.
        position_bias: Must be None.
        options: What models hand to all their layers; a name not known to be without effect is refused.

    Returns:
        (1, tokens, heads, value's head size) in the dtype of `query`, and None for the weights that are never formed.

    Raises:
        Unpackable: The layer requests anything else.
    """
    requested = {
        "a custom mask": attention_mask is not None and not isinstance(attention_mask, AskedMask),
        "dropout of attention": dropout != 0,
        "attention in both directions": is_causal is False,
        "a bias of positions": position_bias is not None,
    }
    requested |= {name: True for name, value in options.items() if name not in _NO_ARITHMETIC and value is not None}
    if wanted := [name for name, wants in requested.items() if wants]:
        raise Unpackable(f"its attention requests {', '.join(wanted)}")
    if isinstance(attention_mask, AskedMask):
        _compare(attention_mask, sliding_window)
    # A window that no segment fills changes nothing: the same kernel as without one, and so the same bits.
    window = sliding_window if sliding_window is not None and sliding_window < layout.longest_key else None
    if softcap is not None or s_aux is not None:
        return _explicit(query, key, value, layout, scaling, window, softcap, s_aux), None
    if layout.attend is not None:
        return layout.attend(query, key, value, scaling, window), None
    is_half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if is_half and _fits_kernel(query, value) and layout.copied_keys <= _MOST_KEYS * query.shape[2]:
        return _varlen_kernel(query, key, value, layout, scaling, window), None
    return _block_by_block(query, key, value, layout, scaling, window), None


def _compare(mask: AskedMask, window: int | None) -> None:
    if not mask.plain:
        raise Unpackable("its attention requests a mask that is not causal alone")
    if mask.window != window:
        raise Unpackable(f"its layers get a window of {window}, and their masks have one of {mask.window}")


def _fits_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    return _has_kernel(query.device) and query.shape[-1] == value.shape[-1] <= WIDEST_HEAD


@cache
def _has_kernel(device: torch.device) -> bool:
    """The flash kernel is built for Ampere (8.0) and newer; on a T4, V100 or P100 blocks run one by one."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _block_by_block(  # noqa: PLR0917 - as attention has it
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One call for each block. Serves CPUs and older GPUs, and is the reference for the kernel."""
    outputs = []
    for block in layout.blocks(window):
        q, k, v = query[:, :, block.start : block.end], block.keys_of(key), block.keys_of(value)
        mask = block.mask
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()  # some layers (AFMoE's) take a view of it


def _explicit(  # noqa: PLR0917 - as attention has it
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention block by block with explicit weights, for options that torch's kernels do not support.

    Sources: the soft cap of Gemma 2 (arXiv:2408.00118), section 2; the sinks of gpt-oss (arXiv:2508.10925).
    """
    shared_by = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for block in layout.blocks(window):
        q, k, v = query[:, :, block.start : block.end], block.keys_of(key), block.keys_of(value)
        k, v = (x.repeat_interleave(shared_by, dim=1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        tokens = block.end - block.start
        sees = block.mask
        if sees is None:
            sees = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        scores = scores.float().masked_fill(~sees, float("-inf"))
        if sinks is not None:
            column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        outputs.append(weights.to(v.dtype) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()  # some layers (AFMoE's) take a view of it


def _varlen_kernel(  # noqa: PLR0917 - as attention has it
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One call of the variable-length flash kernel for all segments; causal from the last key backwards."""
    from torch.nn.attention.varlen import varlen_attn

    # The backward pass of `squeeze` is a view; that of `x[0]` would copy the gradient into a tensor of zeros.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if layout.key_index is not None:
        k, v = k.index_select(0, layout.key_index), v.index_select(0, layout.key_index)
    longest = layout.longest_query, layout.longest_key
    seen = (-1 if window is None else window - 1, 0)  # keys before the query's own, and behind it
    offsets = layout.queries, layout.keys
    with _flash_alone():
        out = varlen_attn(q, k, v, *offsets, *longest, window_size=seen, scale=scaling, **_grouped_heads())
    return cast("torch.Tensor", out)[None]


@cache
def _grouped_heads() -> dict[str, Any]:
    """The kernel shares key/value heads itself; newer versions of torch need a flag for it."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def _flash_alone() -> AbstractContextManager[None]:
    """Has the kernel be flash's: from 2.15 on, torch prefers cuDNN's where queries and keys have the same offsets.

    That is so in a CUDA graph only. One kernel gives the same bits within a graph and without, and is the one tested.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

    if hasattr(varlen, "_select_backend"):
        return cast("AbstractContextManager[None]", sdpa_kernel(SDPBackend.FLASH_ATTENTION))
    return nullcontext()


def _asked_mask(
    *,
    mask_function: Callable[..., Any],
    q_length: int,
    device: torch.device,
    local_size: int | None = None,
    use_vmap: bool = False,
    **_shapes: Any,
) -> AskedMask:
    """Finds which keys a mask function of transformers lets a query see from a few pairs, without making the mask."""
    last = max(q_length - 1, 2 * (local_size or 0))
    positions = torch.arange(last + 1, device=device)

    def seen_by(query: int) -> list[int]:
        sees = torch.as_tensor(mask_function(0, 0, torch.tensor(query, device=device), positions))
        return cast("list[int]", positions[sees.expand(positions.shape)].tolist())

    irregular = AskedMask(None, plain=False)
    if use_vmap:  # a function of the model's own is part of it
        return irregular
    try:
        for query in (last, last // 2):
            if seen_by(query) != list(range(max(0, query + 1 - (local_size or last + 1)), query + 1)):
                return irregular
    except (IndexError, RuntimeError):  # it looks into tensors as long as the input, so it is made from the input
        return irregular
    return AskedMask(local_size)


def register() -> None:
    """Makes both implementations known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in (NAME, CHECKED):
        AttentionInterface.register(name, packed_attention)
    AttentionMaskInterface.register(CHECKED, _asked_mask)


def is_packed(model: Any) -> bool:
    """Whether the model computes packed sequences; else it is called with one sequence at a time, and no layout."""
    return bool(model.config._attn_implementation == NAME)  # noqa: SLF001 - transformers has no public name for it


def use(model: Any, implementation: str) -> bool:
    """Has all attention layers of transformers' model computed by this implementation; whether that is possible.

    Which one computes is looked up at each call, so that nothing has to be loaded again.
    """
    model.set_attn_implementation(implementation)
    return bool(model.config._attn_implementation == implementation)  # noqa: SLF001 - as in is_packed
