"""FP8 products with the frozen weights, as a CPU computes them: the same numbers, multiplied in fp32.

What a GPU computes is compared with this by `tests/bench/fp8.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from job.evaluation.scoring import score_sequence
from job.model.base import recompute_activations
from job.model.fused import fp8
from job.model.fused.fp8 import FORMAT, LARGEST, Quantize, Rows
from job.model.fused.frozen_weights import forget_dequantized, fuse_layers
from job.model.fused.kernels import TORCH, triton
from job.model.lora import adapter_off
from tests.helpers import fill_adapter, make_model
from tests.unit.model.fused.test_lora_forward import QUESTIONS, learn

HALF_STEP = 2.0**-4
"""Largest relative error of rounding to three bits of mantissa."""
RANDOM = torch.Generator()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=RANDOM.manual_seed(seed))


def exact(rows: Rows) -> torch.Tensor:
    """The numbers that a quantized matrix stands for, (rows, columns) float32."""
    return rows.values.float() * rows.scale


def quantizers() -> list[Any]:
    """Torch's formula; Triton's where there is a GPU, or its interpreter (TRITON_INTERPRET=1)."""
    found = [pytest.param(fp8.quantize, "cpu", id="torch")]
    on_gpu = torch.cuda.is_available()
    if on_gpu or os.environ.get("TRITON_INTERPRET"):
        found.append(pytest.param(triton().quantize, "cuda" if on_gpu else "cpu", id="triton"))
    return found


@pytest.mark.parametrize(("quantize", "device"), quantizers())
def test_what_fits_the_format_is_kept_exactly(quantize: Quantize, device: str) -> None:
    """Numbers of e4m3, times a power of two that differs from row to row, side by side from matrices of any width."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 0x7F) != 0x7F].view(FORMAT).float()  # but for the two NaNs
    whole = numbers[torch.randint(0, 254, (5, 96), generator=RANDOM.manual_seed(0))]
    whole[:, 0] = LARGEST
    whole *= 2.0 ** torch.tensor([-40.0, -3, 0, 1, 30])[:, None]
    whole[2] = 0
    found = quantize([part.to(device, torch.bfloat16) for part in whole.split([17, 47, 32], dim=1)])
    assert found.values.dtype is FORMAT
    assert torch.equal(exact(found).cpu(), whole)


def test_an_error_is_at_most_half_a_step() -> None:
    """Of a number's own size, however the rows differ; below e4m3's smallest normal number, of that one's."""
    x = random(50, 300) * torch.exp(4 * random(50, 1, seed=1))
    error = (exact(fp8.quantize([x])) - x).abs()
    smallest = x.abs().amax(1, keepdim=True) / LARGEST * 2.0**-6
    assert (error <= HALF_STEP * torch.maximum(x.abs(), smallest) * (1 + 1e-6)).all()
    assert error.max() > 0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_stays_one(number: float) -> None:
    """So a loss that is not finite is found as without FP8."""
    x = random(2, 32)
    x[1, 3] = number
    found = fp8.product(fp8.quantize([x]), fp8.quantize([random(16, 32)]), torch.float32)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()


def test_a_product_is_torchs_own() -> None:
    """With bias, as `torch._scaled_mm` computes it, which is what a GPU's products are."""
    x, weight, bias = random(40, 64).bfloat16(), random(48, 64, seed=1).bfloat16(), random(48, seed=2).bfloat16()
    left, right = fp8.quantize([x]), fp8.quantize([weight])
    found = fp8.product(left, right, torch.bfloat16, bias)
    scales: dict[str, Any] = {"scale_a": left.scale, "scale_b": right.scale.reshape(1, -1)}
    theirs = torch._scaled_mm(left.values, right.values.T, **scales, out_dtype=torch.float32) + bias.float()
    torch.testing.assert_close(found, theirs.bfloat16(), rtol=2**-7, atol=1e-3)
    # Errors of many products add up like random ones: each at most half a step, of both factors.
    plain = x.float() @ weight.float().T + bias.float()
    assert 1e-3 < ((found.float() - plain).norm() / plain.norm()).item() < 2**0.5 * HALF_STEP


def fused(folder: Path, *, in_fp8: bool = True, keep: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model with a filled adapter, on the fused layers."""
    model = fill_adapter(make_model(folder, quantization="nf4", dtype=dtype))
    assert fuse_layers(model, keep_dequantized=keep, kernels=TORCH, fp8=in_fp8) == "all"
    return model


def same(one: tuple[float, list[torch.Tensor]], other: tuple[float, list[torch.Tensor]]) -> bool:
    """Whether loss and gradients have the same bits."""
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_training_is_close_and_repeats_its_bits(base_folder: Path) -> None:
    """Loss and gradients are those of the plain products up to e4m3's rounding; a repetition has the same bits.

    Two roundings of at most 2^-4 each in a product, four products in a row through this model and back: the bound is
    what these come to if all of them are at their largest in the same direction.
    """
    loss, gradients = learn(fused(base_folder, in_fp8=False))
    found = learn(fused(base_folder))
    assert found[0] == pytest.approx(loss, rel=HALF_STEP)
    assert found[0] != loss
    for one, other in zip(found[1], gradients, strict=True):
        assert one.dtype is torch.float32
        assert (one - other).norm() <= 8 * HALF_STEP * other.norm()
    assert same(found, learn(fused(base_folder)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_saves_time_changes_no_bit(base_folder: Path, dtype: torch.dtype) -> None:
    """Weights kept in FP8 or made for each use, from the start or later, and activations computed again."""
    kept = learn(fused(base_folder, dtype=dtype))
    assert same(kept, learn(fused(base_folder, dtype=dtype, keep=False)))
    forgetting, recomputing = fused(base_folder, dtype=dtype), fused(base_folder, dtype=dtype)
    forget_dequantized(forgetting)
    assert same(kept, learn(forgetting))
    recompute_activations(recomputing, on=True)
    assert same(kept, learn(recomputing))


def test_scores_have_no_fp8_in_them(base_folder: Path) -> None:
    """Those of base and adapter are, bit by bit, those of the same model without it."""
    with_fp8, without = fused(base_folder).eval(), fused(base_folder, in_fp8=False).eval()
    assert score_sequence(with_fp8, QUESTIONS) == score_sequence(without, QUESTIONS)
    with adapter_off(with_fp8), adapter_off(without):
        assert score_sequence(with_fp8, QUESTIONS) == score_sequence(without, QUESTIONS)
