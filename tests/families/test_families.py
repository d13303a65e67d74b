"""Families that stand for the others: right packed, right one by one; `make families` goes over all of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.families.check import check

PACKED = ["llama", "gemma2", "phi3", "gpt2", "opt", "mixtral", "gpt_oss"]
"""Among them: a soft cap, windows in some layers, fused projections, `Conv1D`, positions that are learned, experts."""
ALIKE = ["mistral", "qwen2", "qwen3", "gemma3_text", "gpt_neox"]
"""Used more than most of those above, and built like one of them."""


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
    """A model whose attention goes in both directions is no causal language model, and it is said so."""
    verdict = check("bert", tokenizer)
    assert verdict.outcome == "refused", verdict
    assert "no causal language model" in verdict.why
