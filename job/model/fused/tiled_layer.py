"""A decoder layer of a long row: its feed-forward half in tiles over the sequence, forward and backward.

The feed-forward half (norm, gate, up, SwiGLU, down, residual) works token by token, so it need not have all tokens at
once: of 343,000 tokens its inner tensors would be three times 9 GiB at Mistral-7B's shape. In the backward pass each
tile is computed again, and its part of the adapter's gradient is added to the whole in fp32, tile after tile. That
order of sums is part of the result's bits: the tile is a constant, not a choice by free memory.

The attention half is computed as a whole. What it keeps for its own backward pass exists for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from job.model.packed_attention import Attend

_PLAIN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
"""Layers that add attention and feed-forward to the stream, each behind its norm, and do nothing else."""

Tokenwise = Callable[[torch.Tensor], torch.Tensor]
"""(1, tokens, hidden) -> (1, tokens, hidden), each token by itself."""


def is_plain(layer: Any) -> bool:
    """Whether a decoder layer is of the build that is taken apart here."""
    return type(layer).__name__ in _PLAIN


def forward_layer(
    layer: Any, x: torch.Tensor, arguments: Mapping[str, Any], *, attend: Attend | None, tile: int
) -> torch.Tensor:
    """A plain layer without gradients.

    Args:
        layer: A decoder layer for which `is_plain`.
        x: (1, tokens, hidden), not changed.
        arguments: What the decoder hands to its layers beside `x`.
        attend: See `Layout.attend`.
        tile: Tokens of a tile.

    Returns:
        (1, tokens, hidden).
    """
    with torch.no_grad():
        after = _attention_half(layer, x, arguments, attend)
        for start in range(0, x.shape[1], tile):
            part = after[:, start : start + tile]
            part.copy_(_feed_forward_half(layer, part))  # in place: nothing else refers to `after`
    return after


def backward_layer(
    layer: Any,
    x: torch.Tensor,
    gradient: torch.Tensor,
    arguments: Mapping[str, Any],
    *,
    attend: Attend | None,
    tile: int,
    needs_input: bool,
) -> torch.Tensor | None:
    """The gradient of a plain layer, computed again from its input; adds the adapter's to `.grad` of its parameters.

    Args:
        layer: As for the forward pass.
        x: (1, tokens, hidden): its input.
        gradient: (1, tokens, hidden): of its output; overwritten.
        arguments: As for the forward pass.
        attend: As for the forward pass.
        tile: As for the forward pass.
        needs_input: Whether the gradient of `x` is wanted; else None is returned.
    """
    x = x.detach().requires_grad_(needs_input)
    with torch.enable_grad():
        after = _attention_half(layer, x, arguments, attend)
    edge = get_gradient_edge(after) if after.requires_grad else None
    after = after.detach()
    backward_in_tiles(lambda part: _feed_forward_half(layer, part), after, gradient, tile)
    del after  # the edge keeps what its gradient needs, and this is not part of it
    if edge is not None:
        torch.autograd.backward([edge], [gradient])
    return x.grad


def backward_in_tiles(function: Tokenwise, x: torch.Tensor, gradient: torch.Tensor, tile: int) -> None:
    """Replaces the gradient of a function's output by that of its input, tile by tile, with what it computes again.

    Args:
        function: Its parameters' gradients are added to their `.grad`, in the order of the tiles.
        x: (1, tokens, hidden): its input.
        gradient: (1, tokens, hidden): of its output; overwritten with that of `x`.
        tile: Tokens of a tile.
    """
    for start in range(0, x.shape[1], tile):
        part = x[:, start : start + tile].detach().requires_grad_()
        place = gradient[:, start : start + tile]
        with torch.enable_grad():
            y = function(part)
        torch.autograd.backward([y], [place])
        assert part.grad is not None  # noqa: S101 - for the type
        place.copy_(part.grad)


def _attention_half(layer: Any, x: torch.Tensor, arguments: Mapping[str, Any], attend: Attend | None) -> torch.Tensor:
    layout = replace(arguments["layout"], attend=attend)
    found = layer.self_attn(hidden_states=layer.input_layernorm(x), **{**arguments, "layout": layout})
    return x + found[0]  # type: ignore[no-any-return]


def _feed_forward_half(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x + layer.mlp(layer.post_attention_layernorm(x))  # type: ignore[no-any-return]
