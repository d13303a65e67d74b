"""A decoder layer of a long row: its feed-forward half in tiles over the sequence, forward and backward.

The feed-forward half (norm, gate, up, SwiGLU, down, residual) works token by token, so it need not have all tokens at
once: of 343,000 tokens its inner tensors would be three times 9 GiB at Mistral-7B's shape. In the backward pass each
tile is computed again, and its part of the adapter's gradient is added to the whole in fp32, tile after tile. That
order of sums is part of the result's bits: the tile is a constant, not a choice by free memory.

The attention half is computed as a whole, but its norms, which may compute in fp32, are in tiles, too. What it keeps
for its own backward pass exists for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from job.model.packed_attention import Attend


@dataclass(frozen=True)
class Halves:
    """Names of a layer's norms: those that attention and the feed-forward layer read through, and those behind them."""

    before_attention: str | None = "input_layernorm"
    behind_attention: str | None = None
    before_feed_forward: str | None = "post_attention_layernorm"
    behind_feed_forward: str | None = None
    scaled: bool = False
    """Whether both are multiplied by `residual_multiplier` before they are added to the stream."""


_FOUR_NORMS = Halves(
    behind_attention="post_attention_layernorm",
    before_feed_forward="pre_feedforward_layernorm",
    behind_feed_forward="post_feedforward_layernorm",
)
LAYERS = {
    "Gemma2DecoderLayer": _FOUR_NORMS,
    "Gemma3DecoderLayer": _FOUR_NORMS,
    "GemmaDecoderLayer": Halves(),
    "GraniteDecoderLayer": Halves(scaled=True),
    "LlamaDecoderLayer": Halves(),
    "MistralDecoderLayer": Halves(),
    "Olmo2DecoderLayer": Halves(
        before_attention=None,
        behind_attention="post_attention_layernorm",
        before_feed_forward=None,
        behind_feed_forward="post_feedforward_layernorm",
    ),
    "Phi3DecoderLayer": Halves(),
    "Qwen2DecoderLayer": Halves(),
    "Qwen3DecoderLayer": Halves(),
    "SmolLM3DecoderLayer": Halves(),
}
"""By the name of their class, layers that add attention and feed-forward to the stream, and do nothing else."""

Tokenwise = Callable[[torch.Tensor], torch.Tensor]
"""(1, tokens, hidden) -> (1, tokens, hidden), each token by itself."""


def is_known(layer: Any) -> bool:
    """Whether a decoder layer is one of those that are taken apart here."""
    return type(layer).__name__ in LAYERS


def forward_layer(
    layer: Any, x: torch.Tensor, arguments: Mapping[str, Any], *, attend: Attend | None, tile: int
) -> torch.Tensor:
    """A layer without gradients.

    Args:
        layer: A decoder layer for which `is_known`.
        x: (1, tokens, hidden), not changed.
        arguments: What the decoder hands to its layers beside `x`.
        attend: See `Layout.attend`.
        tile: Tokens of a tile.

    Returns:
        (1, tokens, hidden).
    """
    with torch.no_grad():
        after = _attention_half(layer, x, arguments, attend, tile)
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
    """The gradient of a layer, computed again from its input; adds the adapter's to `.grad` of its parameters.

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
        after = _attention_half(layer, x, arguments, attend, tile)
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


class _InTiles(torch.autograd.Function):
    """A function that works token by token, in tiles forward and backward; its parameters get no gradient.

    Of a norm in fp32, only a tile's values are there at a time, and only its input is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, function: Tokenwise, tile: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.tile = function, tile
        out = torch.empty_like(x)
        for start in range(0, x.shape[1], tile):
            out[:, start : start + tile] = function(x[:, start : start + tile])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        gradient = gradient.clone()  # it may be another function's, too
        backward_in_tiles(ctx.function, x, gradient, ctx.tile)
        return gradient, None, None


def _attention_half(
    layer: Any, x: torch.Tensor, arguments: Mapping[str, Any], attend: Attend | None, tile: int
) -> torch.Tensor:
    halves = LAYERS[type(layer).__name__]
    layout = replace(arguments["layout"], attend=attend)
    read = _normed(layer, halves.before_attention, x, tile)
    found = layer.self_attn(hidden_states=read, **{**arguments, "layout": layout})[0]
    return _added(layer, halves, x, _normed(layer, halves.behind_attention, found, tile))


def _feed_forward_half(layer: Any, x: torch.Tensor) -> torch.Tensor:
    halves = LAYERS[type(layer).__name__]
    found = layer.mlp(_normed(layer, halves.before_feed_forward, x))
    return _added(layer, halves, x, _normed(layer, halves.behind_feed_forward, found))


def _normed(layer: Any, name: str | None, x: torch.Tensor, tile: int | None = None) -> torch.Tensor:
    """The norm of this name, where there is one; in tiles where a tile is given."""
    if name is None:
        return x
    norm = getattr(layer, name)
    return norm(x) if tile is None else _InTiles.apply(x, norm, tile)  # type: ignore[no-any-return, no-untyped-call]


def _added(layer: Any, halves: Halves, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    return x + (more * layer.residual_multiplier if halves.scaled else more)
