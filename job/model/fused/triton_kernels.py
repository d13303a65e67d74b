"""Triton kernels that torch lacks. They work element by element in fp32, so their bits are reproducible."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton import language as tl

_BLOCK = 1024


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
def _norm_kernel(x, weight, out, width, epsilon, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < width
    start = tl.program_id(0).to(tl.int64) * width
    v = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / width + epsilon) * w
    tl.store(out + start + at, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn_kernel(
    x, cosine, sine, out, size, heads, largest, LIMITED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < size
    head, place = pair // HALF, pair % HALF
    first, angle = head * 2 * HALF + place, (head // heads) * 2 * HALF + place
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


def turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, largest: float | None = None) -> torch.Tensor:
    """(1, tokens, heads, head size) with its positions; with `largest`, what is beyond that becomes NaN."""
    x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
    out, pairs, half = torch.empty_like(x), x.numel() // 2, x.shape[-1] // 2
    _turn_kernel[(triton.cdiv(pairs, _BLOCK),)](
        x, cosine, sine, out, pairs, x.shape[-2], largest or 0.0, LIMITED=largest is not None, HALF=half, BLOCK=_BLOCK
    )
    return out


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, dtype: torch.dtype) -> torch.Tensor:
    """RMS norm of (..., hidden), computed in fp32 in one pass over memory, rounded to `dtype`; has no gradient."""
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x, dtype=dtype)
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    _norm_kernel[(x.numel() // width,)](x, weight, out, width, epsilon, BLOCK=block, num_warps=warps)
    return out
