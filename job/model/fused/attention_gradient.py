"""Triton kernels for the backward pass of causal attention: deterministic, since no sum spans thread blocks.

One kernel computes the gradients of keys and values: a thread block takes a block of keys, and loops over the queries
that see it. The other computes the gradient of the queries: a thread block takes a block of queries, and loops over the
keys that it sees. So every number is summed by one thread block in one order, regardless of which block runs first. The
price is that scores and their gradients are computed twice: 7 matrix products instead of 5. On an H200 this is still
faster than one kernel that sums over thread blocks in a fixed order, as deterministic FlashAttention does.

Blocks of queries, keys, values and gradients are loaded through tensor descriptors (TMA on a Hopper GPU), which return
zeros beyond the end of a segment.

Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691), algorithm 2, with its two loops in separate kernels.
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
    """Computes delta, (heads, tokens): the sum over the head size of output * gradient, for the softmax's gradient."""
    head = tl.program_id(1).to(tl.int64)  # 64 heads of 300,000 tokens have more elements than int32 can index
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
    """Adds what queries low..high contribute to the gradients of a block of keys and values.

    Scores are transposed, (keys, queries). `MASKED` is for blocks in which some queries do not see some keys.
    """
    for first in range(low, high, M):
        query = first + tl.arange(0, M)
        q_block = q.load([first, 0])
        # Beyond the end of the segment an infinite log-sum-exp makes the probabilities 0.
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
    """Gradients of a block of keys and values, summed over the query heads that share them.

    Programs start with the first keys, which the most queries see, so that the short ones fill the end.
    """
    program, blocks = tl.program_id(0), tl.cdiv(length, N)
    head, start = (program // blocks).to(tl.int64), program % blocks * N
    key, column = start + tl.arange(0, N), tl.arange(0, SIZE)
    row, inside = key.to(tl.int64)[:, None], (key < length)[:, None]
    k_block = tl.make_tensor_descriptor(k + head * k_head, [length, SIZE], [k_token, 1], [N, SIZE]).load([start, 0])
    v_block = tl.make_tensor_descriptor(v + head * v_head, [length, SIZE], [v_token, 1], [N, SIZE]).load([start, 0])
    to_k, to_v = tl.zeros([N, SIZE], tl.float32), tl.zeros([N, SIZE], tl.float32)
    factor = scale * _LOG2E
    # Three ranges of queries: those at the block's own positions, which see a part of it; those that see all of it; and
    # the last ones, for which a part of it is outside of the window, or whose block is cut by the end of the segment.
    masked_end = tl.minimum(start + N, length)
    end = length
    to_whole = length
    if WINDOW:
        end = tl.minimum(length, start + N - 1 + window)
        to_whole = tl.minimum(length, start + window)
    unmasked_end = masked_end + tl.maximum(to_whole - masked_end, 0) // M * M
    for shared in range(SHARED):
        own = head * SHARED + shared
        q_own = tl.make_tensor_descriptor(q + own * q_head, [length, SIZE], [q_token, 1], [M, SIZE])
        g_own = tl.make_tensor_descriptor(g + own * g_head, [length, SIZE], [g_token, 1], [M, SIZE])
        sums_own, delta_own = sums + own * total, delta + own * total
        to_k, to_v = _add_queries(
            to_k, to_v, k_block, v_block, q_own, g_own, sums_own, delta_own, start, masked_end, key, length,
            factor, window, True, WINDOW, M,
        )  # fmt: skip
        to_k, to_v = _add_queries(
            to_k, to_v, k_block, v_block, q_own, g_own, sums_own, delta_own, masked_end, unmasked_end, key, length,
            factor, window, False, WINDOW, M,
        )  # fmt: skip
        to_k, to_v = _add_queries(
            to_k, to_v, k_block, v_block, q_own, g_own, sums_own, delta_own, unmasked_end, end, key, length,
            factor, window, True, WINDOW, M,
        )  # fmt: skip
    offset = row * d_token + head * d_head + column[None]
    tl.store(dk + offset, (to_k * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + offset, to_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _add_keys(
    dq, q, d_o, lse, dot, k, v, low, high, query, factor, window,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Adds what keys low..high contribute to the gradient of a block of queries; `MASKED` as in `_add_queries`."""
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
    """Gradient of a block of queries.

    Programs start with the last queries, which see the most keys, so that the short ones fill the end.
    """
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
    # Three ranges of keys: those that the window hides from some queries, those that all queries of the block
    # see, and those at the block's own positions.
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
    offset = row * d_token + head * d_head + column[None]
    tl.store(dq + offset, (to_q * scale).to(dq.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work.

    Attributes:
        queries: Queries of one step.
        keys: Keys of one step.
        stages: Steps in flight at once (`num_stages`).
        warps: Warps of a thread block.
    """

    queries: int
    keys: int
    stages: int
    warps: int


BY_KEY, BY_QUERY = Tiles(64, 128, 3, 8), Tiles(128, 64, 4, 8)
"""The fastest of seven tried for each kernel on an H200, with a head size of 128. They affect the last bits. In
`BY_KEY` the keys have to be a multiple of the queries."""
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
    """The gradients of queries, keys and values, each of the shape and dtype of its tensor.

    Args:
        gradient: The output's gradient, (tokens, query heads, head size), in bf16 or fp16 like all but `sums`.
        query: (tokens, query heads, head size); the head size is a power of two.
        key: (tokens, key/value heads, head size).
        value: (tokens, key/value heads, head size).
        out: Attention's output, (tokens, query heads, head size).
        sums: The log-sum-exp of the scores, (query heads, tokens) float32.
        segments: (start, end) of each segment; none attends to another.
        scale: Factor of the scores.
        window: How many keys a query sees, its own included; None for all up to its own.
        by_key: Tiles of the kernel for keys and values.
        by_query: Tiles of the kernel for queries.

    Raises:
        ValueError: The keys of `by_key` are not a multiple of its queries, so that some queries would count twice.
    """
    if by_key.keys % by_key.queries:
        raise ValueError(f"the keys of a block, {by_key.keys}, have to be a multiple of its queries, {by_key.queries}")
    # At each call: Triton keeps the allocator for each thread, and autograd calls this from its own threads.
    triton.set_allocator(allocator(query.device))
    tokens, heads, size = query.shape
    tensors = [x if _is_aligned(x) else x.contiguous() for x in (query, key, value, gradient)]
    out = out if out.stride(2) == 1 else out.contiguous()
    sums = sums.contiguous()
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
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
        options = {"SHARED": heads // key.shape[1], "WINDOW": limit < length, "SIZE": size}
        dq, dk, dv = (x[start:end] for x in gradients)
        _keys_kernel[(triton.cdiv(length, by_key.keys) * key.shape[1],)](
            *(*common, dk, dv, length, tokens, *strides, *dk.stride()[:2], scale, limit),
            **options,
            **_options(by_key),
        )
        _queries_kernel[(triton.cdiv(length, by_query.queries) * heads,)](
            *(*common, dq, length, tokens, *strides, *dq.stride()[:2], scale, limit),
            **options,
            **_options(by_query),
        )
    return gradients[0], gradients[1], gradients[2]


def allocator(device: torch.device) -> Callable[[int, int, Any], torch.Tensor]:
    """A function with which Triton allocates the scratch memory of a launch.

    Triton holds the function until it is given another one. So the function must not refer to a tensor: one of a row
    would keep the row's autograd graph alive, with the nodes that accumulate the adapter's gradient, and no CUDA graph
    can be recorded that uses these nodes again (`training.cuda_graphs`).
    """
    return lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=device)


def _is_aligned(x: torch.Tensor) -> bool:
    size = x.element_size()
    byte_offsets = (x.data_ptr(), x.stride(0) * size, x.stride(1) * size)
    return x.stride(2) == 1 and all(offset % _ALIGNED == 0 for offset in byte_offsets)


def _options(tiles: Tiles) -> dict[str, int]:
    return {"M": tiles.queries, "N": tiles.keys, "num_stages": tiles.stages, "num_warps": tiles.warps}
