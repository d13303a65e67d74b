"""Triton kernels that torch lacks.

They work in fp32, element by element, on sums in a fixed order, or on the largest number of a row, which depends on no
order: their bits are reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch.nn import functional
from triton import language as tl

from job.model.fused.dropout import bound
from job.model.fused.fp8 import FORMAT, LARGEST, SMALLEST, Rows

_BLOCK = 1024
_TILE = 4096
"""Numbers that a program of the norm works on at a time, in whole rows."""
_ROW_BLOCK = 4096
"""Columns that a program quantizes at a time."""
_MOST_PARTS = 3
"""Layers with a common input: queries, keys and values."""


@triton.jit
def _activation(g, TANH: tl.constexpr):
    """The activation of the gate and its derivative: SiLU, or GELU by its tanh approximation."""
    if TANH:
        # tanh(x) = 2 sigmoid(2 x) - 1
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        t = 2 * tl.sigmoid(2 * inner) - 1
        value = 0.5 * g * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * g * g)
    else:
        s = tl.sigmoid(g)
        value = g * s
        slope = s + value * (1 - s)
    return value, slope


@triton.jit
def _gated_kernel(gate, up, out, width, per_row, gate_stride, up_stride, TANH: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row, at = (program // per_row).to(tl.int64), (program % per_row) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation(g, TANH)
    tl.store(out + row * width + at, (value * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_gradient_kernel(
    gradient, gate, up, to_gate, to_up, width, per_row, gate_stride, up_stride, TANH: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    row, at = (program // per_row).to(tl.int64), (program % per_row) * BLOCK + tl.arange(0, BLOCK)
    inside, position = at < width, row * width + at
    d = tl.load(gradient + position, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(g, TANH)
    tl.store(to_gate + position, (d * u * slope).to(to_gate.dtype.element_ty), mask=inside)
    tl.store(to_up + position, (d * value).to(to_up.dtype.element_ty), mask=inside)


@triton.jit
def _scoring_norm_kernel(x, weight, out, width, epsilon, AROUND_ONE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < width
    start = tl.program_id(0).to(tl.int64) * width
    v = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if AROUND_ONE:
        w += 1
    v = v * tl.rsqrt(tl.sum(v * v, 0) / width + epsilon) * w
    tl.store(out + start + at, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn_kernel(
    x, cosine, sine, out, size, heads, largest, LIMITED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < size
    head, pair_of_head = pair // HALF, pair % HALF
    first, angle = head * 2 * HALF + pair_of_head, (head // heads) * 2 * HALF + pair_of_head
    a = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + first + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cosine + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sine + angle, mask=inside, other=0.0).to(tl.float32)
    turned, other = a * c - b * s, b * c + a * s
    if LIMITED:
        turned = tl.where(tl.abs(turned) <= largest, turned, float("nan"))
        other = tl.where(tl.abs(other) <= largest, other, float("nan"))
    tl.store(out + first, turned.to(out.dtype.element_ty), mask=inside)
    tl.store(out + first + HALF, other.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _largest_of(part, row, largest, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(part + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    return largest


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


@triton.jit
def _norm_kernel(x, weight, out, inverse, rows, width, epsilon, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (at < width)
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1, keep_dims=True) / width + epsilon)
    w = 1 + tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (values * scale * w).to(out.dtype.element_ty), mask=inside)
    tl.store(inverse + row, scale, mask=row < rows)


@triton.jit
def _norm_gradient_kernel(gradient, x, weight, inverse, to_x, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (at < width)
    scale = tl.load(inverse + row, mask=row < rows, other=0.0)
    normal = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32) * scale
    w = 1 + tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    d = tl.load(gradient + row * width + at, mask=inside, other=0.0).to(tl.float32) * w
    along = tl.sum(d * normal, axis=1, keep_dims=True) / width
    tl.store(to_x + row * width + at, (scale * (d - normal * along)).to(to_x.dtype.element_ty), mask=inside)


@triton.jit
def _drop_kernel(x, state, out, quarter, width, per_row, number, bound, factor, BLOCK: tl.constexpr):
    """`dropout.drop`: each program draws the numbers of four parts of a row, a quarter of it apart."""
    program = tl.program_id(0)
    row, at = program // per_row, (program % per_row) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(state)
    key_0, key_1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    c_0, zero = at.to(tl.uint32), tl.zeros_like(at).to(tl.uint32)
    c_1, c_2, c_3 = zero + row.to(tl.uint32), zero + number, zero + tl.load(state + 1).to(tl.uint32)
    for _ in tl.static_range(10):
        first, second = tl.full((), 0xD2511F53, tl.uint32), tl.full((), 0xCD9E8D57, tl.uint32)
        high_0, high_2 = tl.umulhi(c_0, first + zero), tl.umulhi(c_2, second + zero)
        low_0, low_2 = c_0 * first, c_2 * second
        c_0, c_1, c_2, c_3 = high_2 ^ c_1 ^ key_0, low_2, high_0 ^ c_3 ^ key_1, low_0
        key_0 += 0x9E3779B9
        key_1 += 0xBB67AE85
    start, limit = row.to(tl.int64) * width, tl.cast(bound, tl.uint32)
    for part in tl.static_range(4):
        drawn = c_0 if part == 0 else c_1 if part == 1 else c_2 if part == 2 else c_3  # noqa: PLR2004 - of the four
        column = at + part * quarter
        inside = (at < quarter) & (column < width)
        value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32) * factor
        kept = tl.where(drawn < limit, 0.0, value)
        tl.store(out + start + column, kept.to(out.dtype.element_ty), mask=inside)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, tanh: bool) -> torch.Tensor:  # noqa: FBT001 - autograd's
        gate, up = (x if x.stride(-1) == 1 else x.contiguous() for x in (gate, up))
        ctx.save_for_backward(gate, up)
        ctx.tanh = tanh
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        # Views: the rows of half of a wider tensor are not adjacent in memory.
        rows = [x.view(-1, x.shape[-1]) for x in (gate, up)]
        width = gate.shape[-1]
        per_row = triton.cdiv(width, _BLOCK)
        strides = [x.stride(0) for x in rows]
        _gated_kernel[(rows[0].shape[0] * per_row,)](*rows, out, width, per_row, *strides, TANH=tanh, BLOCK=_BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        to_gate, to_up = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
        rows = [x.view(-1, x.shape[-1]) for x in (gate, up)]
        width = gate.shape[-1]
        per_row = triton.cdiv(width, _BLOCK)
        strides = [x.stride(0) for x in rows]
        _gated_gradient_kernel[(rows[0].shape[0] * per_row,)](
            gradient.contiguous(), *rows, to_gate, to_up, width, per_row, *strides, TANH=ctx.tanh, BLOCK=_BLOCK
        )
        return to_gate, to_up, None


class _NormAroundOne(torch.autograd.Function):
    """The gradient is that of the input alone: the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        out, inverse = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        columns = triton.next_power_of_2(width)
        together = max(1, _TILE // columns)
        _norm_kernel[(triton.cdiv(rows, together),)](
            x, weight, out, inverse, rows, width, epsilon, ROWS=together, COLUMNS=columns, num_warps=_warps(columns)
        )
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        to_x = torch.empty_like(x)
        columns = triton.next_power_of_2(width)
        together = max(1, _TILE // columns)
        _norm_gradient_kernel[(triton.cdiv(rows, together),)](
            gradient.contiguous(),
            x,
            weight,
            inverse,
            to_x,
            rows,
            width,
            ROWS=together,
            COLUMNS=columns,
            num_warps=_warps(columns),
        )
        return to_x, None, None


def _warps(columns: int) -> int:
    """For rows that wide: as many as keep a thread's part of a row in its registers."""
    return 4 if columns <= _TILE else 8


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of which only the two inputs are kept for the gradient."""
    out: torch.Tensor = _Gated.apply(gate, up, False)  # type: ignore[no-untyped-call] # noqa: FBT003
    return out


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up by GELU's tanh approximation, of which only the two inputs are kept for the gradient."""
    out: torch.Tensor = _Gated.apply(gate, up, True)  # type: ignore[no-untyped-call] # noqa: FBT003
    return out


def norm_around_one(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMS norm times 1 + weight in fp32; of (..., hidden) only the input and a number a row are kept."""
    if weight.requires_grad:  # a norm that is trained whole
        return functional.rms_norm(x.float(), (x.shape[-1],), 1 + weight.float(), epsilon).to(x.dtype)
    out: torch.Tensor = _NormAroundOne.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return out


def drop(x: torch.Tensor, state: torch.Tensor, number: int, rate: float) -> torch.Tensor:
    """`dropout.drop` in one pass over memory, with the same bits."""
    x = x.contiguous()
    rows, width = x.shape
    out, quarter = torch.empty_like(x), triton.cdiv(width, 4)
    per_row = triton.cdiv(quarter, _BLOCK)
    _drop_kernel[(rows * per_row,)](
        x, state, out, quarter, width, per_row, number, bound(rate), 1 / (1 - rate), BLOCK=_BLOCK
    )
    return out


def turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, largest: float | None = None) -> torch.Tensor:
    """(1, tokens, heads, head size) with its positions; with `largest`, what is beyond that becomes NaN."""
    x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
    out, pairs, half = torch.empty_like(x), x.numel() // 2, x.shape[-1] // 2
    _turn_kernel[(triton.cdiv(pairs, _BLOCK),)](
        x, cosine, sine, out, pairs, x.shape[-2], largest or 0.0, LIMITED=largest is not None, HALF=half, BLOCK=_BLOCK
    )
    return out


def norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, dtype: torch.dtype, around_one: bool = False
) -> torch.Tensor:
    """RMS norm of (..., hidden), computed in fp32 in one pass over memory, rounded to `dtype`; has no gradient.

    With `around_one` it is multiplied by 1 + weight.
    """
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x, dtype=dtype)
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    _scoring_norm_kernel[(x.numel() // width,)](
        x, weight, out, width, epsilon, AROUND_ONE=around_one, BLOCK=block, num_warps=warps
    )
    return out


def quantize(parts: Sequence[torch.Tensor]) -> Rows:
    """`fp8.Quantize`, as `fp8.quantize` does it: largest number, scale and rounding of a row in one kernel.

    On Hopper the bits are the same. Ada rounds by way of fp16, so that a number close to a tie may fall the other way.
    """
    if len(parts) > _MOST_PARTS:
        return quantize([torch.cat(list(parts), 1)])
    contiguous = [part.contiguous() for part in parts]
    widths = [part.shape[1] for part in contiguous]
    contiguous += [contiguous[0]] * (_MOST_PARTS - len(contiguous))  # not read: their width is 0
    widths += [0] * (_MOST_PARTS - len(widths))
    rows = contiguous[0].shape[0]
    values = torch.empty((rows, sum(widths)), dtype=FORMAT, device=contiguous[0].device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=contiguous[0].device)
    block = min(_ROW_BLOCK, triton.next_power_of_2(max(widths)))
    _quantize_kernel[(rows,)](
        *contiguous, values, scale, *widths, LIMIT=LARGEST, LEAST=SMALLEST, BLOCK=block, num_warps=8
    )
    return Rows(values, scale)
