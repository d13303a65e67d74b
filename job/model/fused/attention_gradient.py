"""Triton kernels for the backward pass of causal attention: deterministic, with no sum over thread blocks.

One kernel computes the gradients of keys and values, a block of keys at a time over the queries that see it; the other
that of the queries, a block at a time over the keys that it sees. Each number is summed by one thread block in one
order, so it does not matter which block runs first. The price is that the scores and their gradients are computed
twice: 7 matrix products in place of 5. On an H200 that takes less time than to put the sums of one kernel in order, as
flash does.

Blocks of queries, keys, values and gradients are read by tensor descriptors, on a Hopper GPU by its copy engine; behind
the end of a segment they give zeros.

Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691), algorithm 2, with its two loops in kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["tokens"])
def _dot_kernel(
    gradient, out, delta, tokens, g_token, g_head, o_token, o_head, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """The product of each output with its gradient, (heads, tokens), which the softmax's gradient needs."""
    head = tl.program_id(1).to(tl.int64)  # 64 heads of 300,000 tokens are more numbers than 31 bits count
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, column = at < tokens, tl.arange(0, SIZE)
    row = at.to(tl.int64)[:, None]
    g = tl.load(gradient + row * g_token + head * g_head + column[None], mask=inside[:, None], other=0.0)
    o = tl.load(out + row * o_token + head * o_head + column[None], mask=inside[:, None], other=0.0)
    tl.store(delta + head * tokens + at, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1), mask=inside)


@triton.jit
def _add_queries(
    dk, dv, k, v, q, g, sums, delta, low, high, key, length, factor, window,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Adds what the queries low..high give to a block of keys and values; scores are transposed, (keys, queries)."""
    for first in range(low, high, M):
        query = first + tl.arange(0, M)
        q_block = q.load([first, 0])
        # An infinite sum makes the probabilities 0 behind the end.
        lse = tl.load(sums + query, mask=query < length, other=float("inf")) if MASKED else tl.load(sums + query)
        p = tl.math.exp2(tl.dot(k, tl.trans(q_block)) * factor - (lse * _LOG2E)[None])
        if MASKED:
            seen = query[None] >= key[:, None]
            if WINDOW:
                seen = seen & (query[None] - key[:, None] < window)
            p = tl.where(seen, p, 0.0)
        d_o = g.load([first, 0])
        dot = tl.load(delta + query, mask=query < length, other=0.0) if MASKED else tl.load(delta + query)
        dv += tl.dot(p.to(d_o.dtype), d_o)
        ds = p * (tl.dot(v, tl.trans(d_o)) - dot[None])
        dk += tl.dot(ds.to(q_block.dtype), q_block)
    return dk, dv


@triton.jit(do_not_specialize=["length", "total", "window"], do_not_specialize_on_alignment=["sums", "delta"])
def _keys_kernel(
    q, k, v, g, sums, delta, dk, dv, length, total,
    q_token, q_head, k_token, k_head, v_token, v_head, g_token, g_head, d_token, d_head, scale, window,
    SHARED: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, summed over the heads that share them. The longest ones come first."""
    program, blocks = tl.program_id(0), tl.cdiv(length, N)
    head, start = (program // blocks).to(tl.int64), program % blocks * N
    key, column = start + tl.arange(0, N), tl.arange(0, SIZE)
    row, inside = key.to(tl.int64)[:, None], (key < length)[:, None]
    k_block = tl.make_tensor_descriptor(k + head * k_head, [length, SIZE], [k_token, 1], [N, SIZE]).load([start, 0])
    v_block = tl.make_tensor_descriptor(v + head * v_head, [length, SIZE], [v_token, 1], [N, SIZE]).load([start, 0])
    to_k, to_v = tl.zeros([N, SIZE], tl.float32), tl.zeros([N, SIZE], tl.float32)
    factor = scale * _LOG2E
    # Queries of the block itself see a part of it; then come those that see all of it, then those for which it leaves
    # the window or the segment ends.
    whole = tl.minimum(start + N, length)
    end = length
    to_whole = length
    if WINDOW:
        end = tl.minimum(length, start + N - 1 + window)
        to_whole = tl.minimum(length, start + window)
    rest = whole + tl.maximum(to_whole - whole, 0) // M * M
    for shared in range(SHARED):
        own = head * SHARED + shared
        q_own = tl.make_tensor_descriptor(q + own * q_head, [length, SIZE], [q_token, 1], [M, SIZE])
        g_own = tl.make_tensor_descriptor(g + own * g_head, [length, SIZE], [g_token, 1], [M, SIZE])
        sums_own, delta_own = sums + own * total, delta + own * total
        to_k, to_v = _add_queries(
            to_k, to_v, k_block, v_block, q_own, g_own, sums_own, delta_own, start, whole, key, length,
            factor, window, True, WINDOW, M,
        )  # fmt: skip
        to_k, to_v = _add_queries(
            to_k, to_v, k_block, v_block, q_own, g_own, sums_own, delta_own, whole, rest, key, length,
            factor, window, False, WINDOW, M,
        )  # fmt: skip
        to_k, to_v = _add_queries(
            to_k, to_v, k_block, v_block, q_own, g_own, sums_own, delta_own, rest, end, key, length,
            factor, window, True, WINDOW, M,
        )  # fmt: skip
    place = row * d_token + head * d_head + column[None]
    tl.store(dk + place, (to_k * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + place, to_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _add_keys(
    dq, q, d_o, lse, dot, k, v, low, high, query, factor, window,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Adds what the keys low..high give to a block of queries."""
    for first in range(low, high, N):
        key = first + tl.arange(0, N)
        k_block = k.load([first, 0])
        v_block = v.load([first, 0])
        p = tl.math.exp2(tl.dot(q, tl.trans(k_block)) * factor - lse[:, None])
        if MASKED:
            seen = query[:, None] >= key[None]
            if WINDOW:
                seen = seen & (query[:, None] - key[None] < window)
            p = tl.where(seen, p, 0.0)
        ds = p * (tl.dot(d_o, tl.trans(v_block)) - dot[:, None])
        dq += tl.dot(ds.to(k_block.dtype), k_block)
    return dq


@triton.jit(do_not_specialize=["length", "total", "window"], do_not_specialize_on_alignment=["sums", "delta"])
def _queries_kernel(
    q, k, v, g, sums, delta, dq, length, total,
    q_token, q_head, k_token, k_head, v_token, v_head, g_token, g_head, d_token, d_head, scale, window,
    SHARED: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries. The longest ones come first."""
    program, blocks = tl.program_id(0), tl.cdiv(length, M)
    head, start = (program // blocks).to(tl.int64), (blocks - 1 - program % blocks) * M
    query, column = start + tl.arange(0, M), tl.arange(0, SIZE)
    row, inside = query.to(tl.int64)[:, None], (query < length)[:, None]
    q_block = tl.load(q + row * q_token + head * q_head + column[None], mask=inside, other=0.0)
    d_o = tl.load(g + row * g_token + head * g_head + column[None], mask=inside, other=0.0)
    lse = tl.load(sums + head * total + query, mask=query < length, other=float("inf")) * _LOG2E
    dot = tl.load(delta + head * total + query, mask=query < length, other=0.0)
    shared = head // SHARED
    k_own = tl.make_tensor_descriptor(k + shared * k_head, [length, SIZE], [k_token, 1], [N, SIZE])
    v_own = tl.make_tensor_descriptor(v + shared * v_head, [length, SIZE], [v_token, 1], [N, SIZE])
    to_q = tl.zeros([M, SIZE], tl.float32)
    factor = scale * _LOG2E
    # Keys that all of the block's queries see lie between those that only some see.
    high = start // N * N
    end = tl.minimum(start + M, length)
    if WINDOW:
        low = tl.maximum(start - window + 1, 0) // N * N
        whole = tl.minimum(tl.cdiv(tl.maximum(start + M - window, 0), N) * N, high)
        to_q = _add_keys(
            to_q, q_block, d_o, lse, dot, k_own, v_own, low, whole, query,
            factor, window, True, WINDOW, N,
        )  # fmt: skip
    else:
        whole = 0
    to_q = _add_keys(
        to_q, q_block, d_o, lse, dot, k_own, v_own, whole, high, query,
        factor, window, False, WINDOW, N,
    )  # fmt: skip
    to_q = _add_keys(
        to_q, q_block, d_o, lse, dot, k_own, v_own, high, end, query,
        factor, window, True, WINDOW, N,
    )  # fmt: skip
    place = row * d_token + head * d_head + column[None]
    tl.store(dq + place, (to_q * scale).to(dq.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work: queries and keys of a step, steps that are copied ahead, and warps of a block."""

    queries: int
    keys: int
    stages: int
    warps: int


BY_KEY, BY_QUERY = Tiles(64, 128, 3, 8), Tiles(128, 64, 4, 8)
"""The fastest of seven each on an H200, with heads of 128. They affect the last bits. Of the first, the keys have to be
a multiple of the queries."""
_ALIGNED = 16
"""Bytes to which a descriptor's address and strides have to be aligned."""


def attention_gradient(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    *,
    segments: Sequence[tuple[int, int]],
    scale: float,
    window: int | None,
    by_key: Tiles = BY_KEY,
    by_query: Tiles = BY_QUERY,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of queries, keys and values, (tokens, heads, head size) each; the head size is a power of two.

    Args:
        gradient: That of the output, (tokens, heads, head size).
        query: (tokens, heads, head size).
        key: (tokens, shared heads, head size).
        value: (tokens, shared heads, head size).
        out: The output, (tokens, heads, head size).
        sums: The logarithm of each softmax's sum, (heads, tokens) float32.
        segments: (start, end) of each; none sees another.
        scale: Factor of the scores.
        window: How many keys a query sees, its own included; None for all up to its own.
        by_key: Tiles of the kernel for keys and values.
        by_query: Tiles of the kernel for queries.
    """
    # Here and not once: the allocator is the calling thread's, and autograd has threads of its own.
    triton.set_allocator(allocator(query.device))
    tokens, heads, size = query.shape
    tensors = [x if _is_aligned(x) else x.contiguous() for x in (query, key, value, gradient)]
    out = out if out.stride(2) == 1 else out.contiguous()
    sums = sums.contiguous()
    found = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    delta = torch.empty_like(sums)
    _dot_kernel[triton.cdiv(tokens, 64), heads](
        tensors[3], out, delta, tokens, *tensors[3].stride()[:2], *out.stride()[:2], SIZE=size, BLOCK=64
    )
    for start, end in segments:
        length = end - start
        own = [x[start:end] for x in tensors]
        strides = [stride for x in own for stride in x.stride()[:2]]
        common = (*own, sums[:, start:], delta[:, start:])
        limit = length if window is None else min(window, length)
        how = {"SHARED": heads // key.shape[1], "WINDOW": limit < length, "SIZE": size}
        dq, dk, dv = (x[start:end] for x in found)
        _keys_kernel[(triton.cdiv(length, by_key.keys) * key.shape[1],)](
            *(*common, dk, dv, length, tokens, *strides, *dk.stride()[:2], scale, limit),
            **how,
            **_options(by_key),
        )
        _queries_kernel[(triton.cdiv(length, by_query.queries) * heads,)](
            *(*common, dq, length, tokens, *strides, *dq.stride()[:2], scale, limit),
            **how,
            **_options(by_query),
        )
    return found[0], found[1], found[2]


def allocator(device: torch.device) -> Callable[[int, int, Any], torch.Tensor]:
    """Gives Triton the memory that a launch needs.

    Triton keeps it until it is given another one. So it must refer to no tensor: one of a row would keep the row's
    autograd graph, with the nodes that add to the adapter's gradient, and a CUDA graph that uses those again cannot be
    recorded (`training.cuda_graphs`).
    """
    return lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=device)


def _is_aligned(x: torch.Tensor) -> bool:
    size = x.element_size()
    places = (x.data_ptr(), x.stride(0) * size, x.stride(1) * size)
    return x.stride(2) == 1 and all(place % _ALIGNED == 0 for place in places)


def _options(tiles: Tiles) -> dict[str, int]:
    return {"M": tiles.queries, "N": tiles.keys, "num_stages": tiles.stages, "num_warps": tiles.warps}
