"""A decoder's operations between products, with few passes over memory: norms, gates, rotary positions, dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from job.model.families import GELU_TANH, SILU
from job.model.fused import dropout, fp8

Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(input, weight, epsilon) -> RMS norm over the last dimension."""
Gated = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(gate, up) -> activation(gate) * up; both (..., intermediate), and may be views of one tensor."""
Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x, cosine, sine) -> x with its positions; (1, tokens, heads, head size), and (1, tokens, head size)."""


@dataclass(frozen=True)
class Kernels:
    """How it is computed."""

    name: str
    norm: Norm
    """Multiplied by the weight."""
    norm_around_one: Norm
    """Multiplied by 1 + weight in fp32, and then rounded to the input's dtype."""
    swiglu: Gated
    """With SiLU."""
    geglu: Gated
    """With GELU by its tanh approximation."""
    turn: Turn
    drop: Callable[[torch.Tensor, torch.Tensor, int, float], torch.Tensor]
    """`dropout.drop`."""
    quantize: fp8.Quantize
    """Rows in FP8; used where training computes in it."""

    def gated(self, activation: str) -> Gated:
        """By transformers' name of the activation."""
        return {SILU: self.swiglu, GELU_TANH: self.geglu}[activation]

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key with their positions; where cosine and sine are narrower than a head, its rest stays."""
        wide = cosine.shape[-1]
        if wide == query.shape[-1]:
            return tuple(_Rotated.apply(x, cosine, sine, self.turn) for x in (query, key))  # type: ignore[no-untyped-call]
        first = self.rotate(query[..., :wide], key[..., :wide], cosine, sine)
        query, key = (torch.cat([x, y[..., wide:]], -1) for x, y in zip(first, (query, key), strict=True))
        return query, key


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


def _norm_around_one(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return functional.rms_norm(x.float(), (x.shape[-1],), 1 + weight.float(), epsilon).to(x.dtype)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


def _geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.gelu(gate, approximate="tanh") * up


def _turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    cosine, sine = cosine[..., None, :half], sine[..., None, :half]
    first, second = x[..., :half], x[..., half:]
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, cosine, out=turned[..., :half]).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=turned[..., half:]).addcmul_(first, sine)
    return turned


TORCH = Kernels("torch", _norm, _norm_around_one, _swiglu, _geglu, _turn, dropout.drop, fp8.quantize)
"""By torch's own operations; runs anywhere."""


def triton() -> Kernels:
    """Gates, rotation, dropout, the norm around one and quantization in one pass over memory each.

    Raises:
        ImportError: There is no Triton, which comes with torch for GPUs.
    """
    from job.model.fused import triton_kernels

    return replace(
        TORCH,
        name="triton",
        norm_around_one=triton_kernels.norm_around_one,
        swiglu=triton_kernels.swiglu,
        geglu=triton_kernels.geglu,
        turn=triton_kernels.turn,
        drop=triton_kernels.drop,
        quantize=triton_kernels.quantize,
    )
