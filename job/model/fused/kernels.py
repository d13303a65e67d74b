"""A decoder's operations between matrix products, with few passes over memory: norms, SwiGLU, rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from job.model.fused import fp8

Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x, cosine, sine) -> x with its positions; (1, tokens, heads, head size), and (1, tokens, head size)."""


@dataclass(frozen=True)
class Kernels:
    """How it is computed."""

    name: str
    norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """(input, weight, epsilon) -> RMS norm over the last dimension."""
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(gate, up) -> silu(gate) * up."""
    turn: Turn
    quantize: fp8.Quantize
    """Rows in FP8; used where training computes in it."""

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key with their positions."""
        return tuple(_Rotated.apply(x, cosine, sine, self.turn) for x in (query, key))  # type: ignore[no-untyped-call]


class _Rotated(torch.autograd.Function):
    """A rotation, whose gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, turn: Turn) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        ctx.turn = turn
        return turn(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        cosine, sine = ctx.saved_tensors
        return ctx.turn(gradient, cosine, -sine), None, None, None


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


def _turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    cosine, sine = cosine[..., None, :half], sine[..., None, :half]
    first, second = x[..., :half], x[..., half:]
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, cosine, out=turned[..., :half]).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=turned[..., half:]).addcmul_(first, sine)
    return turned


TORCH = Kernels("torch", _norm, _swiglu, _turn, fp8.quantize)
"""By torch's own operations; runs anywhere."""


def triton() -> Kernels:
    """SwiGLU, rotation and quantization in one pass over memory each.

    Raises:
        ImportError: There is no Triton, which comes with torch for GPUs.
    """
    from job.model.fused import triton_kernels

    own = triton_kernels
    return replace(TORCH, name="triton", swiglu=own.swiglu, turn=own.turn, quantize=own.quantize)
