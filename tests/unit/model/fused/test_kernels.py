"""The operations between the matrix products: they follow the models' formulas."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from job.model.fused.kernels import TORCH, Kernels, triton


def gradients_of(function: Callable[..., Any], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Outputs and gradients of a function at copies of the inputs."""
    copies = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*copies)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [torch.arange(y.numel(), dtype=y.dtype, device=y.device).view(y.shape).sin() for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, copies, seeds)]


def kernel_sets() -> list[tuple[Kernels, torch.dtype, torch.device]]:
    """Torch's own on a CPU; Triton's where there is a GPU, or its interpreter (TRITON_INTERPRET=1)."""
    sets = [(TORCH, torch.float64, torch.device("cpu"))]
    on_gpu = torch.cuda.is_available()
    if on_gpu or os.environ.get("TRITON_INTERPRET"):
        sets.append((triton(), torch.float32, torch.device("cuda" if on_gpu else "cpu")))
    return sets


@pytest.mark.parametrize(("kernels", "dtype", "device"), kernel_sets(), ids=lambda x: getattr(x, "name", ""))
def test_kernels_are_those_of_transformers(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> None:
    """Norms, gates and rotary positions, whole or of a part of a head, and their gradients."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm, apply_rotary_pos_emb

    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=dtype).to(device)

    x, gate, up = random(1, 7, 16), random(1, 70, 32), random(1, 70, 32)
    query, key, half = random(1, 70, 4, 8), random(1, 70, 2, 8), random(1, 70, 4)
    cosine, sine = torch.cat([half, half], -1).cos(), torch.cat([half, half], -1).sin()
    norm = MistralRMSNorm(16, eps=1e-5)
    norm.weight = torch.nn.Parameter(random(16), requires_grad=False)

    around_one = Gemma2RMSNorm(16, eps=1e-5)
    around_one.weight = norm.weight
    both = random(1, 70, 64)  # gate and up side by side, as of a joined layer

    def rotate(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        turned = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cosine, sine)
        return tuple(x.transpose(1, 2) for x in turned)

    close = 1e-12 if dtype is torch.float64 else 1e-5
    for ours, theirs, inputs, tolerance in (
        (lambda x: kernels.norm(x, norm.weight, 1e-5), norm, [x], 1e-6),  # theirs goes through fp32
        (lambda x: kernels.norm_around_one(x, norm.weight, 1e-5), around_one, [x], 1e-6),
        (kernels.swiglu, lambda g, u: functional.silu(g) * u, [gate, up], close),
        (kernels.geglu, lambda g, u: functional.gelu(g, approximate="tanh") * u, [gate, up], close),
        (
            lambda x: kernels.swiglu(*x.chunk(2, -1)),
            lambda x: functional.silu(x[..., :32]) * x[..., 32:],
            [both],
            close,
        ),
        (lambda q, k: kernels.rotate(q, k, cosine, sine), rotate, [query, key], close),
    ):
        for found, expected in zip(gradients_of(ours, *inputs), gradients_of(theirs, *inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(len(kernel_sets()) < 2, reason="Triton needs a GPU, or TRITON_INTERPRET=1")
def test_triton_norm_and_limited_rotation() -> None:
    """From fp32 to fp16 in one kernel as in several; what is beyond the limit becomes NaN, and nothing else changes."""
    from job.model.fused import triton_kernels

    _, (_, _, device) = kernel_sets()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 576, generator=draw).mul(100).to(device)
    weight = torch.randn(576, generator=draw).bfloat16().to(device)
    expected = functional.rms_norm(x, (576,), weight.float(), 1e-5)
    assert (triton_kernels.norm(x, weight, 1e-5, dtype=torch.float32) - expected).abs().max() < 1e-5
    half = triton_kernels.norm(x, weight, 1e-5, dtype=torch.float16)
    assert half.dtype is torch.float16
    assert (half - expected).abs().max() < 0.01  # half a unit in the last place of numbers up to 16
    query = torch.randn(1, 7, 4, 8, generator=draw).half().to(device)
    angles = torch.randn(1, 7, 4, generator=draw).to(device)
    cosine, sine = (torch.cat([f, f], -1) for f in (angles.cos(), angles.sin()))
    turned = triton_kernels.turn(query, cosine, sine, largest=6e4)
    assert torch.equal(turned, triton_kernels.turn(query, cosine, sine))
    assert (turned - TORCH.turn(query.float(), cosine, sine)).abs().max() < 0.002
    query[0, 3, 1, 2], query[0, 5, 0, 0] = float("inf"), 65000
    found = triton_kernels.turn(query, cosine, sine, largest=6e4)
    within = TORCH.turn(query.float(), cosine, sine).abs() <= 6e4
    assert not within.all()
    assert torch.equal(found.isfinite(), within)
    assert found.isnan().any()
    assert not found.isinf().any()
