"""The forward pass that scores questions on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from job.evaluation.scoring import score_sequence
from job.model.adapter_options import AdapterOptions
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import TORCH
from job.model.fused.precise_forward import copies_bytes, fits_fp16, precise_forward, why_not_precise
from job.model.load_base import load_base
from job.model.lora import adapter_off, add_adapter
from job.records import Question
from tests.helpers import LINEAR, fill_adapter

CPU = torch.device("cpu")
QUESTIONS = [Question((0, 5 + n, 6, 7 + 2 * n), ((8, 9 + n), (10,), (11, 12, 13 + n))) for n in range(12)]


def loaded(folder: Path, dtype: torch.dtype, quantization: str = "nf4") -> Any:
    """The tiny base."""
    return load_base(
        folder, quantization=quantization, double_quantization=True, dtype=dtype, device=CPU, max_length=64
    )


def adapted(base: Any, targets: Sequence[str] = LINEAR, **options: Any) -> Any:
    """With a filled adapter."""
    made = add_adapter(base, rank=4, alpha=8, dropout=0.0, target_modules=targets, seed=1, **options)
    return fill_adapter(made).eval()


def scores(model: Any, forward: Any = None) -> torch.Tensor:
    """All log-likelihoods."""
    found = score_sequence(model, QUESTIONS, forward)
    return torch.tensor([choice.log_likelihood for choices in found for choice in choices])


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("targets", [LINEAR, ("q_proj", "v_proj", "down_proj")], ids=["all", "some"])
def test_in_fp32_it_is_the_model_in_fp32(base_folder: Path, targets: Sequence[str], *, keep: bool) -> None:
    """With NF4 weights that are dequantized to fp32, whatever the model was loaded in; also without the adapter."""
    exact, model = (adapted(loaded(base_folder, torch.bfloat16), targets) for _ in range(2))
    forward = precise_forward(model, torch.float32, TORCH, keep=keep)
    for module in exact.modules():  # the same 4-bit values, in a model that computes in fp32
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            state.dtype = module.compute_dtype = torch.float32
    for parameter in exact.parameters():
        if parameter.dtype is torch.bfloat16:
            parameter.data = parameter.data.float()
    assert largest(scores(model, forward), scores(exact)) < 1e-5
    with adapter_off(model), adapter_off(exact):
        assert largest(scores(model, forward), scores(exact)) < 1e-5
    assert largest(scores(exact), scores(model)) > 1e-3  # in bf16 it is not


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_in_fp16_it_is_nearer_to_fp32_than_bf16(base_folder: Path, quantization: str) -> None:
    """Kept weights or not, the same bits; and the model computes as before afterwards, and has its modules."""
    model = adapted(loaded(base_folder, torch.bfloat16, quantization))
    assert fuse_layers(model, keep_dequantized=True, kernels=TORCH) == "all"
    before, modules = scores(model), {name: dict(m.__dict__) for name, m in model.named_modules()}
    exact = scores(model, precise_forward(model, torch.float32, TORCH, keep=False))
    half, again = (scores(model, precise_forward(model, torch.float16, TORCH, keep=keep)) for keep in (True, False))
    assert torch.equal(half, again)
    assert largest(half, exact) < 0.25 * largest(before, exact)
    assert torch.equal(scores(model), before)
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == modules


def test_weights_come_from_nf4_without_bf16_in_between(base_folder: Path) -> None:
    """A pass in fp32 has the 4-bit values exactly: rounding them to bf16 first would give other scores."""
    model = loaded(base_folder, torch.bfloat16)
    exact = scores(model, precise_forward(model, torch.float32, TORCH, keep=False))
    for parent, name, layer in [(p, n, m) for p in model.modules() for n, m in p.named_children()]:
        if getattr(getattr(layer, "weight", None), "quant_state", None) is not None:
            rounded = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            rounded.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            setattr(parent, name, rounded)
    assert largest(exact, scores(model, precise_forward(model, torch.float32, TORCH, keep=False))) > 1e-5


def test_a_number_beyond_fp16_shows_in_the_scores(base_folder: Path) -> None:
    """Large activations, keys above all, make the scores NaN, not merely others; the pass in fp32 computes them."""
    model = loaded(base_folder, torch.bfloat16, "none")
    assert fits_fp16(model)
    half, exact = (
        partial(precise_forward, model, dtype, TORCH, keep=False) for dtype in (torch.float16, torch.float32)
    )
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for layer in (attention.k_proj, attention.v_proj, mlp.down_proj, mlp.up_proj):
        weight = layer.weight.data.clone()
        layer.weight.data.mul_(30_000 / float(weight.abs().max()))
        assert fits_fp16(model)
        assert not scores(model, half()).isfinite().all()
        assert scores(model, exact()).isfinite().all()
        layer.weight.data.copy_(weight)
    attention.k_proj.weight.data[0, 0] = 1e5
    assert not fits_fp16(model)


def test_what_it_cannot_compute(base_folder: Path) -> None:
    """A decoder of another build, an adapter that PEFT computes by itself, a trained output layer."""
    base = loaded(base_folder, torch.float32)
    assert copies_bytes(base) == 2 * sum(
        m.in_features * m.out_features for m in base.modules() if hasattr(m, "in_features")
    )
    assert not why_not_precise(base)
    base.config.hidden_act = "gelu"
    assert "decoder" in why_not_precise(base)
    base.config.hidden_act = "silu"
    whole = torch.nn.Sequential(base.lm_head)
    base.lm_head, head = whole, base.lm_head
    assert "output layer" in why_not_precise(base)
    base.lm_head = head
    scaled = adapted(base, options=AdapterOptions(use_dora=True))
    assert "PEFT" in why_not_precise(scaled)
