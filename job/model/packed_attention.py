"""Attention over a flat row: many sequences laid end to end, without padding, none of which sees another.

A row is described by its segments. The queries of a segment see an optional prefix that lies elsewhere in the row (a
question that several choices share) and, causally, the segment itself. Training uses segments without a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import signature
from itertools import pairwise
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "flat"


@dataclass(frozen=True)
class Segment:
    """Tokens `start:end` of a row; they also see the tokens `prefix_start:prefix_end` that lie before them."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0

    @property
    def keys(self) -> int:
        """How many tokens the last query of the segment sees."""
        return self.prefix_end - self.prefix_start + self.end - self.start


@dataclass(frozen=True, eq=False)
class Group:
    """Tokens `start:end` of a row that see none but each other: a segment, and those behind it that see it."""

    start: int
    end: int
    mask: torch.Tensor | None
    """(tokens, tokens) bool: which key each query sees; None where each sees all up to itself."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The segments of one row, and what the variable-length kernel wants to know of them, on the row's device."""

    segments: tuple[Segment, ...]
    queries: torch.Tensor
    """(segments + 1,) int32: where each segment's queries start, and their number."""
    keys: torch.Tensor
    """(segments + 1,) int32: the same for the keys."""
    key_index: torch.Tensor | None
    """(keys,) int64: which token of the row each key is; None where the keys are the row itself."""
    longest_query: int
    longest_key: int
    """No segment has more."""

    @cached_property
    def groups(self) -> list[Group]:
        """The row in groups, for the plain way: worked out for its first layer, used by all."""
        starts = [i for i, s in enumerate(self.segments) if s.prefix_end == s.prefix_start]
        return [
            _group(self.segments[first:end], self.queries.device)
            for first, end in pairwise([*starts, len(self.segments)])
        ]


def _group(segments: Sequence[Segment], device: torch.device) -> Group:
    """The first segment, and the others, which see it or a part of it."""
    start, end = segments[0].start, segments[-1].end
    if len(segments) == 1:
        return Group(start, end, None)
    mask = torch.zeros(end - start, end - start, dtype=torch.bool)
    for s in segments:
        if s.prefix_end > s.prefix_start and not start <= s.prefix_start <= s.prefix_end <= segments[0].end:
            raise ValueError("a segment sees one that is not the last before it without a prefix")
        rows = slice(s.start - start, s.end - start)
        mask[rows, rows] = mask.new_ones(s.end - s.start, s.end - s.start).tril()
        mask[rows, slice(s.prefix_start - start, s.prefix_end - start)] = True
    return Group(start, end, mask.to(device))


def build_layout(segments: Sequence[Segment], device: torch.device) -> Layout:
    """Lays out the segments of one row; they must cover it without gaps, in order."""
    queries = torch.tensor([0, *(s.end for s in segments)], dtype=torch.int32, device=device)
    keys = torch.tensor([0, *(s.keys for s in segments)], device=device).cumsum(0).to(torch.int32)
    index = None
    if any(s.prefix_end > s.prefix_start for s in segments):
        ranges = [torch.arange(a, b) for s in segments for a, b in ((s.prefix_start, s.prefix_end), (s.start, s.end))]
        index = torch.cat(ranges).to(device)
    longest_query, longest_key = max(s.end - s.start for s in segments), max(s.keys for s in segments)
    return Layout(tuple(segments), queries, keys, index, longest_query, longest_key)


def packed_attention(  # the signature is transformers'
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one flat row, for transformers' attention interface.

    Args:
        query: (1, heads, tokens, head size).
        key: (1, key/value heads, tokens, head size); fewer heads than queries are shared by groups of them.
        value: As `key`.
        layout: The row's segments.
        scaling: Factor of the scores; 1/sqrt(head size) where it is None.

    Returns:
        (1, tokens, heads, head size) in the dtype of `query`, and None for the weights that are never formed.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and _has_kernel(query.device):
        return _varlen_kernel(query, key, value, layout, scaling), None
    return _group_by_group(query, key, value, layout, scaling), None


@cache
def _has_kernel(device: torch.device) -> bool:
    """The flash kernel is built for Ampere (8.0) and newer; a T4, V100 or P100 takes the plain way."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _group_by_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float | None
) -> torch.Tensor:
    """The plain way: one call for each group. Serves CPUs and older GPUs, and is the reference for the kernel."""
    outputs = []
    for group in layout.groups:
        own = slice(group.start, group.end)
        q, k, v = (x[:, :, own] for x in (query, key, value))
        mask = group.mask
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _varlen_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float | None
) -> torch.Tensor:
    """One call of the variable-length flash kernel for all segments; causal from the last key backwards."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if layout.key_index is not None:
        k, v = k.index_select(0, layout.key_index), v.index_select(0, layout.key_index)
    longest = layout.longest_query, layout.longest_key
    out = varlen_attn(
        q, k, v, layout.queries, layout.keys, *longest, window_size=(-1, 0), scale=scaling, **_grouped_heads()
    )
    return cast("torch.Tensor", out)[None]


@cache
def _grouped_heads() -> dict[str, Any]:
    """The kernel shares key/value heads itself; newer versions of torch want to be told that this is meant."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def register() -> None:
    """Makes `attn_implementation="flat"` known to transformers. Such a model runs with a `layout` only."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
