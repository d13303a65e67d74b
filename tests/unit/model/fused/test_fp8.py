"""FP8 products with the frozen weights on a CPU: the same FP8 values, multiplied in fp32.

What a GPU computes is compared with this by `tests/bench/fp8.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from job.evaluation.scoring import score_sequence
from job.model.fused import fp8
from job.model.fused.dropout import reseed
from job.model.fused.fp8 import FORMAT, LARGEST, FrozenProducts, Quantize, Rows
from job.model.fused.frozen_weights import forget_dequantized, fuse_layers
from job.model.fused.kernels import TORCH, triton
from job.model.fused.lora_forward import AdaptedLayer
from job.model.gradient_checkpointing import recompute_activations
from job.model.lora import adapter_off
from tests.helpers import fill_adapter, make_model
from tests.unit.model.fused.test_lora_forward import QUESTIONS, learn

HALF_STEP = 2.0**-4
"""Largest relative error of rounding to three bits of mantissa."""
OF_PRODUCT = 2**0.5 * HALF_STEP / 3**0.5
"""The error of a product of many terms, as a share of its norm: errors are spread evenly up to the largest, so the
root of their mean square is a factor of 3**0.5 less, and those of the two factors add up like independent ones."""
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


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, as a share of the expected one's."""
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("keep", [True, False])
def test_layers_with_a_common_input(*, keep: bool) -> None:
    """Forward and back, each is the plain product within the error of e4m3, whatever the size of gradients by token."""
    sizes, x = (96, 32, 32), random(64, 128).bfloat16()
    layers = []
    for number, size in enumerate(sizes):
        weight, bias = random(size, 128, seed=number).bfloat16(), random(size, seed=number).bfloat16()
        a, b = torch.zeros(4, 128), torch.zeros(size, 4)
        layers.append(AdaptedLayer(lambda weight=weight: weight, bias, 1.0, a, b, b.bfloat16()))  # type: ignore[misc]
    products = FrozenProducts(layers, fp8.quantize, keep=keep)
    for y, layer in zip(products.outputs(x), layers, strict=True):
        assert y.dtype is torch.bfloat16
        assert layer.bias is not None
        plain = x.float() @ layer.weight().float().T
        assert 0.02 < relative(y.float() - layer.bias.float(), plain) < OF_PRODUCT
    by_token = torch.exp(5 * random(64, 1))
    gradients = [(by_token * random(64, size, seed=9)).bfloat16() for size in sizes]
    found = products.input_gradient(gradients)
    assert (found.shape, found.dtype) == ((64, 128), torch.bfloat16)
    for token, row in enumerate(found):
        plain = sum(g[token].float() @ layer.weight().float() for g, layer in zip(gradients, layers, strict=True))
        assert relative(row, plain) < 1.5 * OF_PRODUCT  # of few numbers


def fused(
    folder: Path, *, in_fp8: bool = True, keep: bool = True, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> Any:
    """The tiny model with a filled adapter, on the fused layers."""
    model = fill_adapter(make_model(folder, quantization="nf4", dtype=dtype, dropout=dropout))
    assert fuse_layers(model, keep_dequantized=keep, kernels=TORCH, fp8=in_fp8) == "all"
    return model


def same(one: tuple[float, list[torch.Tensor]], other: tuple[float, list[torch.Tensor]]) -> bool:
    """Whether loss and gradients have the same bits."""
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_training_is_close_and_repeats_its_bits(base_folder: Path) -> None:
    """Loss and gradients are those of the plain products up to e4m3's rounding; a repetition has the same bits.

    Eight products lie in a row, four in each of two layers, and eight on the way back, whose errors add up like
    independent ones; half as much again is for what the loss makes of them.
    """
    loss, gradients = learn(fused(base_folder, in_fp8=False))
    found = learn(fused(base_folder))
    assert found[0] == pytest.approx(loss, rel=HALF_STEP)
    assert found[0] != loss
    for one, other in zip(found[1], gradients, strict=True):
        assert one.dtype is torch.float32
        assert relative(one, other) < 1.5 * 16**0.5 * OF_PRODUCT
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


def test_dropout_draws_the_same_masks(base_folder: Path) -> None:
    """With dropout, the gradients differ by e4m3's rounding alone from those of the plain products."""
    found = []
    for in_fp8, rate in ((False, 0.5), (True, 0.5), (True, 0.0)):
        model = fused(base_folder, in_fp8=in_fp8, dropout=rate)
        reseed(model, 7, 0)
        found.append(learn(model)[1])
    for plain, one, without in zip(*found, strict=True):
        assert relative(one, plain) < 1.5 * 16**0.5 * OF_PRODUCT < relative(without, plain)


def test_scores_have_no_fp8_in_them(base_folder: Path) -> None:
    """Those of base and adapter are, bit by bit, those of the same model without it."""
    with_fp8, without = fused(base_folder).eval(), fused(base_folder, in_fp8=False).eval()
    assert score_sequence(with_fp8, QUESTIONS) == score_sequence(without, QUESTIONS)
    with adapter_off(with_fp8), adapter_off(without):
        assert score_sequence(with_fp8, QUESTIONS) == score_sequence(without, QUESTIONS)


@pytest.mark.parametrize("refused", [1, 17, 128])
def test_any_number_of_tokens_is_tried_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    """A GPU or a library that wants another number of tokens is found out at once."""
    product = fp8.product

    def picky(left: Rows, *given: Any) -> torch.Tensor:
        if left.values.shape[0] == refused:
            raise RuntimeError("the number of rows is not supported")
        return product(left, *given)

    assert fp8.why_not_here(torch.device("cpu")) is None
    monkeypatch.setattr(fp8, "product", picky)
    assert "the number of rows is not supported" in str(fp8.why_not_here(torch.device("cpu")))
