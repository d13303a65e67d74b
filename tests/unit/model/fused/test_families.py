"""Every family of the table on the fused layers: losses, gradients and texts equal those of its own code with PEFT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

from job.evaluation.scoring import _score_alone, score_sequence
from job.model.architecture import read_config
from job.model.families import FAMILIES, IMAGES_TOO, fused_family, why_not_recorded
from job.model.fused import fused_decoder
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.fused_decoder import attention_with_cache, decoder_of, knows
from job.model.fused.kernels import TORCH
from job.model.fused.precise_forward import precise_forward, why_not_precise
from job.model.lora import add_adapter, trainable
from job.model.packed_attention import NAME, register, use
from job.model.packing_check import choose_packing
from job.records import Question
from job.training.lm_head_loss import logits_of, padded_loss
from job.training.long_rows import LongRows, why_not_here
from job.training.packing import padded_sequence
from tests.families.models import tiny_config
from tests.helpers import fill_adapter, make_examples
from tests.unit.training.recipes import PLAN

CPU = torch.device("cpu")
MODELS = sorted(FAMILIES.keys() | IMAGES_TOO.keys())
EXAMPLES = make_examples(4, shortest=10, longest=24, prompt=0.3)
_WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 24},
    "gemma3": {"query_pre_attn_scalar": 24},
    "gemma3_text": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 24},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.3, "embedding_multiplier": 3.0}
    | {"logits_scaling": 2.5},
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8, "partial_rotary_factor": 0.5},
    "qwen2": _WINDOWS,
    "qwen3": _WINDOWS,
    "smollm3": {**_WINDOWS, "no_rope_layers": [1, 0]},
}
"""What makes a family's differences show: windows that segments fill, caps that logits reach, factors other than 1."""


def tiny(family: str, *, rope: dict[str, Any] | None = None, **adapter: Any) -> Any:
    """Two layers of the family with random weights, norms among them, and a filled adapter; by the model's own code."""
    config = tiny_config(family)
    text = config.get_text_config(decoder=True)
    for name, value in {"num_hidden_layers": 2, "sliding_window": 8, **CONFIGS.get(family, {})}.items():
        if hasattr(text, name):
            setattr(text, name, value)
    if getattr(text, "layer_types", None):
        kinds = CONFIGS.get(family, {}).get("layer_types") or list(dict.fromkeys(text.layer_types))
        text.layer_types = (kinds * 2)[:2]
    if family == "phi3":
        plain = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        config.rope_parameters = rope or plain
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    base.requires_grad_(requires_grad=False)
    how = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": None, "seed": 1} | adapter
    return fill_adapter(add_adapter(base, **how), 0.2).eval()


def fused(family: str, **adapter: Any) -> Any:
    """The same by the fused layers, packed."""
    model = tiny(family, **adapter)
    register()
    assert use(model.get_base_model(), NAME)
    assert fuse_layers(model, keep_dequantized=False, kernels=TORCH) == "all"
    return model


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    """Of the adapter."""
    return list(torch.autograd.grad(loss, list(trainable(model).values())))


def own_loss(model: Any, smoothing: float = 0.0) -> torch.Tensor:
    """The summed loss of the examples by the model's own code, one after the other."""
    losses = []
    for example in EXAMPLES:
        ids = torch.tensor([example.input_ids])
        labels = torch.where(torch.tensor(example.targets), ids[0], -100)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses.append(functional.cross_entropy(logits, labels[1:], reduction="sum", label_smoothing=smoothing))
    return torch.stack(losses).sum()


def padded_sum(model: Any, smoothing: float = 0.0) -> torch.Tensor:
    """The same by the training path of the fused decoder: all examples in one padded sequence."""
    from job.model.packed_layout import Layout

    base, sequence = model.get_base_model(), padded_sequence(EXAMPLES, CPU)
    decoder = decoder_of(base)
    ids, labels, positions = sequence.tokens
    layout = Layout(sequence.segments, sequence.ends, sequence.ends, len(ids), len(ids))
    hidden = decoder(input_ids=ids[None], position_ids=positions[None], layout=layout, use_cache=False)
    return padded_loss(hidden.last_hidden_state[0], base.get_output_embeddings(), labels, smoothing, logits_of(base))


@pytest.mark.parametrize("family", MODELS)
def test_losses_and_gradients_are_those_of_the_models_own_code(family: str) -> None:
    """In fp32, to 1e-5: several segments in a padded sequence against one example at a time by PEFT's layers."""
    model = tiny(family)
    expected = own_loss(model)
    theirs = gradients(model, expected)
    model = fused(family)
    found = padded_sum(model)
    ours = gradients(model, found)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("family", MODELS)
def test_long_rows_are_those_of_the_whole(family: str) -> None:
    """Layer by layer and in tiles, loss and gradients are those of one pass through autograd; but Gemma 2's caps."""
    model = fused(family)
    if family == "gemma2":
        assert "no attention kernel" in (why_not_here(model) or "")
        return
    assert why_not_here(model) is None
    expected = padded_sum(model)
    whole = gradients(model, expected)
    for parameter in trainable(model).values():
        parameter.grad = torch.zeros_like(parameter)
    base = model.get_base_model()
    rows = LongRows(model, lambda h, labels: padded_loss(h, base.get_output_embeddings(), labels, 0.0, logits_of(base)))
    plan = replace(PLAN, tile_tokens=7, kept_attention=True)
    assert rows.gradient(EXAMPLES, torch.tensor(1.0), plan).item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(trainable(model).values(), whole, strict=True):
        assert one.grad is not None
        assert (one.grad - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("family", MODELS)
def test_scores_in_fp32_are_those_of_the_models_own_code(family: str) -> None:
    """By the pass that questions are scored with, to 1e-4; in fp16 nearly; a family that it cannot compute says why."""
    model, own = fused(family), tiny(family)
    if why := why_not_precise(model):
        assert why == {
            "mixtral": "the decoder of mixtral has experts, which the router chooses in the dtype of training",
            "qwen3_moe": "the decoder of qwen3_moe has experts, which the router chooses in the dtype of training",
            "phi3": "the decoder of phi3 has partial rotary positions",
            "smollm3": "the decoder of smollm3 has layers without rotary positions",
        }.get(family)
        return
    questions = [Question(example.input_ids[:-2], (example.input_ids[-2:], (3,))) for example in EXAMPLES]
    with torch.inference_mode():
        found, half = (
            score_sequence(model, questions, precise_forward(model, dtype, TORCH, keep=False))
            for dtype in (torch.float32, torch.float16)
        )
        expected = [[_score_alone(own, asked.context, choice) for choice in asked.choices] for asked in questions]
    for ours, rounded, theirs in zip(found, half, expected, strict=True):
        for one, near, other in zip(ours, rounded, theirs, strict=True):
            assert near.log_likelihood == pytest.approx(other.log_likelihood, abs=0.05)
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
            assert one.greedy == other.greedy


@pytest.mark.parametrize("family", MODELS)
def test_texts_are_those_of_the_models_own_code(family: str) -> None:
    """With a cache, rows of two lengths padded in front: the logits of each new token, by the adapter and the base."""
    model, own = fused(family), tiny(family)
    assert use(model.get_base_model(), str(attention_with_cache(model.get_base_model())))
    found = _generated(model)
    torch.testing.assert_close(found, _generated(own), rtol=1e-4, atol=1e-4)
    with model.disable_adapter(), own.disable_adapter():
        bare = _generated(model)
        torch.testing.assert_close(bare, _generated(own), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, bare, rtol=1e-2)


def _generated(model: Any, new: int = 10) -> torch.Tensor:
    """(rows, new tokens, vocabulary) logits of a greedy generation."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 5, 5, 11, 12, 13]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    config = model.get_base_model().config.get_text_config(decoder=True)
    cache, found = DynamicCache(config=config), []
    with torch.no_grad():
        for _ in range(new):
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits[:, -1]
            found.append(logits)
            ids, positions = logits.argmax(-1)[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    return torch.stack(found, 1)


@pytest.mark.parametrize("family", ["gemma3_text", "phi3"])
def test_the_check_of_packing_passes(family: str) -> None:
    """For the fused layers too, which `test_families` of all families does not use: a CPU has PEFT's."""
    model = fused(family)
    found = choose_packing(model, EXAMPLES, max_length=64)
    assert found.packed, found.reason


@pytest.mark.parametrize("family", ["gemma3_text", "granite", "llama"])
def test_label_smoothing_knows_the_familys_logits(family: str) -> None:
    """Caps and factors of the logits are in its term and its gradient."""
    model = tiny(family)
    expected = own_loss(model, smoothing=0.2)
    theirs = gradients(model, expected)
    model = fused(family)
    found = padded_sum(model, smoothing=0.2)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(gradients(model, found), theirs, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("family", MODELS)
def test_sizes_are_those_of_the_model(family: str) -> None:
    """Parameters of base and adapter, and the names of the layers that get one."""
    model = tiny(family)
    base = model.get_base_model()
    found = read_config(base.config.to_dict())
    adapter = sum(parameter.numel() for parameter in trainable(model).values())
    assert set(found.linear) == set(model.peft_config["default"].target_modules)
    assert found.adapter_parameters(4, tuple(found.linear)) == adapter
    text = base.num_parameters() - adapter
    if family in IMAGES_TOO:
        text = sum(p.numel() for p in decoder_of(base).parameters()) - adapter
    assert found.parameters == pytest.approx(text, rel=0.01)  # norms of heads, biases
    assert found.fused
    assert found.in_tiles == (why_not_here(model) is None)  # what `plan` says of long rows is what a run does


def test_longrope_is_the_same_in_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sequences within the length that the model was first trained for, without looking at the longest one."""
    long_rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 4.0}
    long_rope |= {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 8.0, 9.0]}
    model = fused("phi3", rope={**long_rope, "original_max_position_embeddings": 64})
    expected = padded_sum(model)
    assert expected.item() != pytest.approx(padded_sum(fused("phi3")).item(), rel=1e-5)
    monkeypatch.setattr(fused_decoder, "_is_recorded", lambda _: True)
    monkeypatch.setattr(type(decoder_of(model.get_base_model()).rotary_emb), "forward", None)  # which would choose
    assert padded_sum(model).item() == expected.item()


def test_what_is_no_entry_is_not_fused() -> None:
    """Another activation, another family; and what a config.json does not say has its usual meaning."""
    assert fused_family({"model_type": "gemma", "hidden_act": "gelu"}) is FAMILIES["gemma"]
    assert fused_family({"model_type": "gemma2"}) is FAMILIES["gemma2"]
    assert fused_family({"model_type": "gemma2", "hidden_activation": "gelu"}) is None
    assert fused_family({"model_type": "gemma4_text"}) is None
    model = tiny("seed_oss")
    assert not knows(model.get_base_model())
    assert attention_with_cache(model.get_base_model()) is None


def test_what_is_not_recorded_says_why() -> None:
    """Soft caps of scores, and frequencies that the host chooses."""
    assert "soft cap" in str(why_not_recorded({"model_type": "gemma2"}))
    assert why_not_recorded({"model_type": "gemma2", "attn_logit_softcapping": None}) is None
    for rope in ({"rope_type": "dynamic"}, {"type": "dynamic"}, {"full_attention": {"rope_type": "dynamic"}}):
        assert "dynamic" in str(why_not_recorded({"model_type": "phi3", "rope_scaling": rope}))
    assert fused_family({"model_type": "qwen3_moe", "mlp_only_layers": [0]}) is None
    for name in FAMILIES.keys() - {"gemma2"}:
        assert why_not_recorded({"model_type": name, "rope_parameters": {"rope_type": "default"}}) is None
