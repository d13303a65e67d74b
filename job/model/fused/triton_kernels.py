"""Triton kernels that torch lacks.

They work in fp32, element by element, or on the largest number of a row, which depends on no order: their bits are
reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton import language as tl

from job.model.fused.fp8 import FORMAT, LARGEST, SMALLEST, Rows

_BLOCK = 1024
_ROW_BLOCK = 4096
"""Columns that a program quantizes at a time."""
_MOST_PARTS = 3
"""Layers with a common input: queries, keys and values."""


@triton.jit
def _swiglu_kernel(gate, up, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_gradient_kernel(gradient, gate, up, to_gate, to_up, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    d = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    tl.store(to_gate + at, (d * u * (s + silu * (1 - s))).to(to_gate.dtype.element_ty), mask=inside)
    tl.store(to_up + at, (d * silu).to(to_up.dtype.element_ty), mask=inside)


@triton.jit
def _turn_kernel(x, cosine, sine, out, size, heads, HALF: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < size
    head, place = pair // HALF, pair % HALF
    first, angle = head * 2 * HALF + place, (head // heads) * 2 * HALF + place
    a = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + first + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cosine + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sine + angle, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + first + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _largest_of(part, row, seen, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(part + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        seen = tl.maximum(seen, tl.abs(x))
    return seen


@triton.jit
def _scale_into(out, part, row, inverse, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(part + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        tl.store(out + at, (x * inverse).to(out.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def _quantize_kernel(
    first,
    second,
    third,
    out,
    scale,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    seen = tl.zeros((BLOCK,), tl.float32)
    seen = _largest_of(first, row, seen, FIRST, BLOCK)
    seen = _largest_of(second, row, seen, SECOND, BLOCK)
    seen = _largest_of(third, row, seen, THIRD, BLOCK)
    largest = tl.maximum(tl.max(seen, 0), LEAST)
    limit = tl.full([], LIMIT, tl.float32)
    # Rounded as IEEE has it, so that the bits are those of torch's formula; `/` is an approximation on a GPU.
    tl.store(scale + row, tl.div_rn(largest, limit))
    inverse = tl.div_rn(limit, largest)
    to = out + row * (FIRST + SECOND + THIRD)  # the second reading of a row comes from the cache
    _scale_into(to, first, row, inverse, FIRST, BLOCK)
    _scale_into(to + FIRST, second, row, inverse, SECOND, BLOCK)
    _scale_into(to + FIRST + SECOND, third, row, inverse, THIRD, BLOCK)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _swiglu_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, out, gate.numel(), BLOCK=_BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        _swiglu_gradient_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](
            gradient.contiguous(), gate, up, to_gate, to_up, gate.numel(), BLOCK=_BLOCK
        )
        return to_gate, to_up


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of which only the two inputs are kept for the gradient."""
    out: torch.Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


def turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """(1, tokens, heads, head size) with its positions."""
    x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
    out, pairs, half = torch.empty_like(x), x.numel() // 2, x.shape[-1] // 2
    _turn_kernel[(triton.cdiv(pairs, _BLOCK),)](x, cosine, sine, out, pairs, x.shape[-2], HALF=half, BLOCK=_BLOCK)
    return out


def quantize(parts: Sequence[torch.Tensor]) -> Rows:
    """`fp8.Quantize`, as `fp8.quantize` does it: largest number, scale and rounding of a row in one kernel.

    On Hopper the bits are the same. Ada rounds by way of fp16, so that a number close to a tie may fall the other way.
    """
    if len(parts) > _MOST_PARTS:
        return quantize([torch.cat(list(parts), 1)])
    given = [part.contiguous() for part in parts]
    widths = [part.shape[1] for part in given]
    given += [given[0]] * (_MOST_PARTS - len(given))  # not read: their width is 0
    widths += [0] * (_MOST_PARTS - len(widths))
    rows = given[0].shape[0]
    values = torch.empty((rows, sum(widths)), dtype=FORMAT, device=given[0].device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=given[0].device)
    block = min(_ROW_BLOCK, triton.next_power_of_2(max(widths)))
    _quantize_kernel[(rows,)](*given, values, scale, *widths, LIMIT=LARGEST, LEAST=SMALLEST, BLOCK=block, num_warps=8)
    return Rows(values, scale)
