"""A decoder layer of a long row: its feed-forward half in tiles over the sequence, forward and backward.

The feed-forward half (norm, gate, up, SwiGLU, down, residual) works token by token, so it can be computed for a part of
the tokens at a time. With all of 343,000 tokens at Mistral-7B's shape, it would need three intermediate tensors of 9
GiB each. In the backward pass each tile is computed again, and its part of the adapter's gradient is added in fp32,
tile after tile. The order of these sums affects the last bits, so the size of a tile is a constant and does not depend
on free memory.

The attention half is computed as a whole, but its norms, which may compute in fp32, in tiles. What it saves for its
backward pass exists for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from job.model.packed_layout import Attend


@dataclass(frozen=True)
class Halves:
    """Names of a decoder layer's norms: before and after attention, before and after the feed-forward layer."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_feed_forward: str | None = "post_attention_layernorm"
    after_feed_forward: str | None = None
    scaled: bool = False
    """Whether the output of each half is multiplied by `residual_multiplier` before the residual addition."""


_FOUR_NORMS = Halves(
    after_attention="post_attention_layernorm",
    before_feed_forward="pre_feedforward_layernorm",
    after_feed_forward="post_feedforward_layernorm",
)
LAYERS = {
    "Gemma2DecoderLayer": _FOUR_NORMS,
    "Gemma3DecoderLayer": _FOUR_NORMS,
    "GemmaDecoderLayer": Halves(),
    "GraniteDecoderLayer": Halves(scaled=True),
    "LlamaDecoderLayer": Halves(),
    "MistralDecoderLayer": Halves(),
    "MixtralDecoderLayer": Halves(),
    "Olmo2DecoderLayer": Halves(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_feed_forward=None,
        after_feed_forward="post_feedforward_layernorm",
    ),
    "Phi3DecoderLayer": Halves(),
    "Qwen2DecoderLayer": Halves(),
    "Qwen3DecoderLayer": Halves(),
    "Qwen3MoeDecoderLayer": Halves(),
    "SmolLM3DecoderLayer": Halves(),
}
"""By class name: layers that only add attention and feed-forward layer to the residual stream."""

Tokenwise = Callable[[torch.Tensor], torch.Tensor]
"""(1, tokens, hidden) -> (1, tokens, hidden), each token independently."""


def is_known(layer: Any) -> bool:
    """Whether this module can compute the halves of a decoder layer separately."""
    return type(layer).__name__ in LAYERS


def forward_layer(
    layer: Any, x: torch.Tensor, arguments: Mapping[str, Any], *, attend: Attend | None, tile: int
) -> torch.Tensor:
    """The output of a layer, without recording gradients.

    Args:
        layer: A decoder layer for which `is_known`.
        x: (1, tokens, hidden), not changed.
        arguments: What the decoder hands to its layers besides `x`.
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
        needs_input: Whether to compute the gradient of `x`; else None is returned.
    """
    x = x.detach().requires_grad_(needs_input)
    with torch.enable_grad():
        after = _attention_half(layer, x, arguments, attend, tile)
    edge = get_gradient_edge(after) if after.requires_grad else None
    after = after.detach()
    backward_in_tiles(lambda part: _feed_forward_half(layer, part), after, gradient, tile)
    del after  # frees memory: the graph that `edge` keeps alive does not need the output itself
    if edge is not None:
        torch.autograd.backward([edge], [gradient])
    return x.grad


def backward_in_tiles(function: Tokenwise, x: torch.Tensor, gradient: torch.Tensor, tile: int) -> None:
    """The backward pass of a function in tiles; each tile is computed again first.

    Args:
        function: Its parameters' gradients are added to their `.grad`, in the order of the tiles.
        x: (1, tokens, hidden): its input.
        gradient: (1, tokens, hidden): of its output; overwritten with that of `x`.
        tile: Tokens of a tile.
    """
    for start in range(0, x.shape[1], tile):
        part = x[:, start : start + tile].detach().requires_grad_()
        gradient_tile = gradient[:, start : start + tile]
        with torch.enable_grad():
            y = function(part)
        torch.autograd.backward([y], [gradient_tile])
        assert part.grad is not None  # noqa: S101 - for the type
        gradient_tile.copy_(part.grad)


class _InTiles(torch.autograd.Function):
    """A function that works token by token, in tiles forward and backward; its parameters get no gradient.

    So a norm in fp32 needs memory for one tile of fp32 values, and saves only its input.
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
        gradient = gradient.clone()  # overwritten below, and other functions may get the same tensor
        backward_in_tiles(ctx.function, x, gradient, ctx.tile)
        return gradient, None, None


def _attention_half(
    layer: Any, x: torch.Tensor, arguments: Mapping[str, Any], attend: Attend | None, tile: int
) -> torch.Tensor:
    halves = LAYERS[type(layer).__name__]
    layout = replace(arguments["layout"], attend=attend)
    read = _normed(layer, halves.before_attention, x, tile)
    out = layer.self_attn(hidden_states=read, **{**arguments, "layout": layout})[0]
    return _added(layer, halves, x, _normed(layer, halves.after_attention, out, tile))


def _feed_forward_half(layer: Any, x: torch.Tensor) -> torch.Tensor:
    halves = LAYERS[type(layer).__name__]
    out = layer.mlp(_normed(layer, halves.before_feed_forward, x))
    return _added(layer, halves, x, _normed(layer, halves.after_feed_forward, out))


def _normed(layer: Any, name: str | None, x: torch.Tensor, tile: int | None = None) -> torch.Tensor:
    """The norm of this name, where there is one; in tiles where a tile is given."""
    if name is None:
        return x
    norm = getattr(layer, name)
    return norm(x) if tile is None else _InTiles.apply(x, norm, tile)  # type: ignore[no-any-return, no-untyped-call]


def _added(layer: Any, halves: Halves, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    return x + (more * layer.residual_multiplier if halves.scaled else more)
