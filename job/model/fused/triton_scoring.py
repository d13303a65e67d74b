"""Triton kernels of the forward pass that scores questions; each reads its inputs and writes its outputs once.

Inputs and outputs may be columns of wider matrices (`scoring_decoder`), so kernels get the strides of rows. Sums have a
fixed order, so results repeat bit for bit. No kernel has a backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
from triton import language as tl

from job.common.device_copies import to_device
from job.model.fused.scoring_decoder import TorchOperations
from job.model.packed_attention import WIDEST_HEAD

if TYPE_CHECKING:
    from job.model.packed_layout import Layout

_BLOCK = 1024
_ROWS = 64
"""Queries that one program of the attention kernel computes."""
_KEYS = 32
"""Keys that such a program loads at a time; half as many if heads are wider than `_WIDE_HEAD`. `_STAGES` such blocks of
keys and values fit into the 64 KiB of a T4's shared memory, next to the queries."""
_STAGES = 2
_WIDE_HEAD = 128


@triton.jit
def _add_norm_kernel(x, update, weight, out, width, out_stride, epsilon, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < width
    row = tl.program_id(0).to(tl.int64)
    v = tl.load(x + row * width + at, mask=inside, other=0.0)
    if ADDS:
        v += tl.load(update + row * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + row * width + at, v, mask=inside)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / width + epsilon) * w
    tl.store(out + row * out_stride + at, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_kernel(gate, up, out, width, per_row, stride, out_stride, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row, at = (program // per_row).to(tl.int64), (program % per_row) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn_kernel(
    x, cosine, sine, pairs, heads, stride, largest, LIMITED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """Rotates pairs of numbers in place: a program reads both numbers of its pairs before it writes them."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    head, pair_of_head = pair // HALF, pair % HALF
    token = head // heads
    first, angle = token * stride + (head % heads) * 2 * HALF + pair_of_head, token * 2 * HALF + pair_of_head
    a = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + first + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cosine + angle, mask=inside, other=0.0)
    s = tl.load(sine + angle, mask=inside, other=0.0)
    turned, other = a * c - b * s, b * c + a * s
    if LIMITED:
        turned = tl.where(tl.abs(turned) <= largest, turned, float("nan"))
        other = tl.where(tl.abs(other) <= largest, other, float("nan"))
    tl.store(x + first, turned.to(x.dtype.element_ty), mask=inside)
    tl.store(x + first + HALF, other.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])  # it is another number for each sequence
def _attention_kernel(
    query,
    key,
    value,
    out,
    starts,
    index,
    last_seen_by,
    depths,
    tokens,
    stride,
    out_stride,
    group,
    scale,
    window,
    WINDOWED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Attention of `ROWS` consecutive queries over the keys that `index` lists for them.

    Token j is seen by tokens j to `last_seen_by[j]`, exclusive (`packed_layout.Layout`). The softmax is computed
    online, in one pass over the keys: Dao et al. 2022 (FlashAttention, arXiv:2205.14135), algorithm 1.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    in_range = row < tokens
    column = tl.arange(0, WIDTH)
    own = row.to(tl.int64)[:, None] * stride + head * SIZE + column[None, :]
    q = tl.load(query + own, mask=in_range[:, None] & (column < SIZE)[None, :], other=0.0)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    begin, end = tl.load(starts + tile), tl.load(starts + tile + 1)
    for at in range(begin, end, KEYS):
        position = at + tl.arange(0, KEYS)
        inside = position < end
        token = tl.load(index + position, mask=inside, other=0)
        until = tl.load(last_seen_by + token, mask=inside, other=0)
        where = token.to(tl.int64)[:, None] * stride + (head // group) * SIZE + column[None, :]
        whole = inside[:, None] & (column < SIZE)[None, :]
        k = tl.load(key + where, mask=whole, other=0.0)
        v = tl.load(value + where, mask=whole, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        sees = (token[None, :] <= row[:, None]) & (row[:, None] < until[None, :])
        if WINDOWED:
            depth = tl.load(depths + row, mask=in_range, other=0)
            sees &= tl.load(depths + token, mask=inside, other=0)[None, :] > depth[:, None] - window
        scores = tl.where(sees, scores, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # a query may see none of these keys
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        most = larger
    to = out + row.to(tl.int64)[:, None] * out_stride + head * SIZE + column[None, :]
    mean = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(to, mean, mask=in_range[:, None] & (column < SIZE)[None, :])


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """Writes the attention of a packed sequence to `out`. All tensors are in bf16 or fp16.

    Args:
        query: (tokens, query heads, head size); with `key` and `value` in one matrix, so that all have the same stride.
        key: (tokens, key/value heads, head size).
        value: As `key`.
        layout: The tree of segments, which says which tokens see which.
        scaling: Factor of the scores.
        window: How many keys of its path a query sees, its own included; None for all.
        out: (tokens, query heads, head size); the heads of a token are contiguous.
    """
    tokens, heads, size = query.shape
    starts, index, last_seen_by, depths = _on_device(layout)
    width = max(16, triton.next_power_of_2(size))
    _attention_kernel[(triton.cdiv(tokens, _ROWS), heads)](
        query,
        key,
        value,
        out,
        starts,
        index,
        last_seen_by,
        depths,
        tokens,
        query.stride(0),
        out.stride(0),
        heads // key.shape[1],
        scaling * 1.4426950408889634,  # 1 / ln 2, since the kernel uses exp2
        window or 0,
        WINDOWED=window is not None and window < layout.longest_key,
        SIZE=size,
        WIDTH=width,
        ROWS=_ROWS,
        KEYS=_KEYS if width <= _WIDE_HEAD else _KEYS // 2,
        num_warps=4,
        num_stages=_STAGES,
    )


_KNOWN: WeakKeyDictionary[Any, tuple[torch.Tensor, ...]] = WeakKeyDictionary()


def _on_device(layout: Layout) -> tuple[torch.Tensor, ...]:
    """What the kernel reads of a layout, all int32 on its device; computed once for each layout.

    Returns:
        Where in the second tensor the keys of each block of `_ROWS` queries start, (blocks + 1,); those keys, block
        after block; `Layout.last_seen_by`, (tokens,); `Layout.depths`, (tokens,).
    """
    if layout not in _KNOWN:
        tokens = len(layout.depths)
        lists = [
            np.concatenate([layout.seen_before(first), np.arange(first, min(first + _ROWS, tokens))])
            for first in range(0, tokens, _ROWS)
        ]
        starts = np.cumsum([0, *map(len, lists)])
        parts = (starts, np.concatenate(lists), layout.last_seen_by, layout.depths)
        device = layout.queries.device
        _KNOWN[layout] = tuple(to_device(torch.from_numpy(part.astype(np.int32)), device) for part in parts)
    return _KNOWN[layout]


@dataclass(frozen=True)
class TritonOperations:
    """`scoring_decoder.Operations` by the kernels of this module."""

    largest: float | None = None
    """Queries and keys of a larger absolute value become NaN; None for no limit."""

    def add_norm(
        self, x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, epsilon: float, out: torch.Tensor
    ) -> None:
        """As `Operations` has it."""
        rows, width = x.shape
        block = triton.next_power_of_2(width)
        adds = update is not None
        _add_norm_kernel[(rows,)](
            x,
            update if adds else x,
            weight,
            out,
            width,
            out.stride(0),
            epsilon,
            ADDS=adds,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
        """As `Operations` has it."""
        rows, width = gate.shape
        per_row = triton.cdiv(width, _BLOCK)
        _swiglu_kernel[(rows * per_row,)](gate, up, out, width, per_row, gate.stride(0), out.stride(0), BLOCK=_BLOCK)

    def turn(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """As `Operations` has it."""
        tokens, heads, size = x.shape
        pairs = tokens * heads * size // 2
        _turn_kernel[(triton.cdiv(pairs, _BLOCK),)](
            x,
            cosine,
            sine,
            pairs,
            heads,
            x.stride(0),
            self.largest or 0.0,
            LIMITED=self.largest is not None,
            HALF=size // 2,
            BLOCK=_BLOCK,
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        scaling: float,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        """As `Operations` has it."""
        if query.dtype is torch.float32 or query.shape[-1] > WIDEST_HEAD:
            TorchOperations().attend(query, key, value, layout, scaling, window, out)
        else:
            attention(query, key, value, layout, scaling, window, out)
