"""A few representative model families, packed and one by one; `make families` checks all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.families import check as checking
from tests.families.check import check
from tests.families.models import LAYERS, VARIANTS, tiny_config

PACKED = ["gemma2", "phi3", "gpt2", "gpt_oss"]
"""Among them: a soft cap, windows in some layers, fused projections, `Conv1D`, positions that are learned, experts."""
ALIKE = ["llama", "opt", "mixtral", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma4_text", "gpt_neox"]
"""Used more than most of those above, and built like one of them. Gemma 4's last layers share keys and values."""


@pytest.mark.parametrize("family", [*PACKED, *(pytest.param(name, marks=pytest.mark.long) for name in ALIKE)])
def test_losses_and_scores_are_those_of_plain_peft_in_packed_sequences(family: str, tokenizer: Any) -> None:
    """Four steps' losses and all log-likelihoods agree with one example at a time by eager attention, to 1e-4."""
    verdict = check(family, tokenizer)
    assert verdict.outcome == "packed", verdict


@pytest.mark.parametrize("family", ["falcon", "bloom", pytest.param("lfm2", marks=pytest.mark.long)])
def test_what_packing_would_get_wrong_goes_one_by_one_and_comes_out_right(family: str, tokenizer: Any) -> None:
    """Biases of positions, an attention of its own, the state of a convolution: found out, and right the plain way."""
    verdict = check(family, tokenizer)
    assert verdict.outcome == "one by one", verdict
    assert verdict.why


def test_what_sees_the_future_is_refused(tokenizer: Any) -> None:
    """A model whose attention goes in both directions is not a causal language model, and it is said so."""
    verdict = check("bert", tokenizer)
    assert verdict.outcome == "refused", verdict
    assert "not a causal language model" in verdict.why


@pytest.mark.parametrize(
    ("apart", "explained", "outcome"),
    [
        (3e-6, 4e-4, "packed"),
        (1e-2, 4e-4, "WRONG"),
        (float("inf"), 4e-4, "WRONG"),
        (1e-3, 5e-2, "FAILED"),
        (1e-2, 5e-2, "FAILED"),
        (3e-1, 5e-2, "WRONG"),
    ],
)
def test_no_family_is_called_right_where_rounding_may_hide_an_error(
    apart: float, explained: float, outcome: str
) -> None:
    """An error that rounding may cover in a badly conditioned tiny model ends as "FAILED", never as right."""
    found, why = checking._outcome({"the losses": apart}, {"the losses": explained}, packed=True, why="")
    assert found == outcome, why


def test_tiny_gemma4_looks_at_more_than_one_token_a_query() -> None:
    """Scores of Gemma 4, which it does not scale, stay small enough in the tiny model for rounding to stay small."""
    from transformers import AutoModelForCausalLM

    for family in ("gemma4_text", "gemma4_unified_text"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="eager").eval()
        with torch.no_grad():
            weights = model(input_ids=torch.arange(10, 40)[None], output_attentions=True).attentions
        most = [float(layer[0, :, 8:].amax(-1).mean()) for layer in weights]
        assert max(most) < 0.8, (family, most)


@pytest.mark.parametrize("family", [name for name in VARIANTS if name.startswith("gemma4")])
def test_variants_of_gemma4_have_what_their_names_say(family: str) -> None:
    """Experts in each layer, and no projection of values in the layers without a window, as in checkpoints."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if family.startswith("gemma4 ") else AutoModelForCausalLM
    with torch.device("meta"):
        names = [name for name, _ in kind.from_config(tiny_config(family)).named_modules()]
    of_text = [name for name in names if "vision" not in name and "audio" not in name]
    assert sum(name.endswith(".experts") for name in of_text) == (LAYERS if "experts" in family else 0)
    assert sum(name.endswith(".self_attn.v_proj") for name in of_text) == (2 if "keys as values" in family else LAYERS)


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gemma4_text", "gemma4_unified_text"])
def test_an_error_of_a_hundredth_is_found(family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores with the adapter that are off by 0.01 are more than rounding explains, by a measured noise."""
    ours = checking.ours

    def off(*args: Any) -> checking.Figures:
        right = ours(*args)
        return replace(right, adapter=[right.adapter[0] + 0.01, *right.adapter[1:]])

    monkeypatch.setattr(checking, "ours", off)
    verdict = check(family, tokenizer)
    assert verdict.outcome == "WRONG", verdict
    assert "the adapter's scores" in verdict.why
