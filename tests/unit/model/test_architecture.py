"""A model's shape from its config.json: the counts equal those of the model that is built from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.model.architecture import FAMILIES, read_config
from job.planning.known_models_and_data import ARCHITECTURES
from tests.helpers import LINEAR

MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


def test_the_reference_model_has_its_published_counts() -> None:
    """Mistral-7B: 7,241,732,096 parameters, 41,943,040 in the recipe's adapter; the shipped table is its config."""
    found = read_config(MISTRAL)
    assert found.parameters == 7_241_732_096
    assert found.adapter_parameters(16, LINEAR) == 41_943_040
    assert found.window == 32768  # its sliding window limits what a token sees, not how long a sequence is
    assert found == ARCHITECTURES["mistralai/Mistral-7B-v0.1"]


def test_counts_are_those_of_a_real_model(base_folder: Path) -> None:
    """What is counted from a config.json is what transformers and PEFT build from it."""
    from job.model.lora import trainable
    from tests.helpers import make_model

    model = make_model(base_folder, rank=8)
    found = read_config(json.loads((base_folder / "config.json").read_text("utf-8")))
    adapter = sum(parameter.numel() for parameter in trainable(model).values())
    assert found.adapter_parameters(8, LINEAR) == adapter
    assert found.parameters == model.get_base_model().num_parameters() - adapter


def test_what_a_config_leaves_out_has_its_usual_meaning() -> None:
    """No key/value heads: as many as queries. No head size: the width over the heads. Tied: one matrix less."""
    plain = {key: value for key, value in MISTRAL.items() if key not in {"num_key_value_heads", "sliding_window"}}
    assert read_config(plain).kv_heads == 32
    assert read_config(plain).window == 32768
    assert read_config(MISTRAL | {"sliding_window": None}).window == 32768
    assert read_config(MISTRAL | {"head_dim": 64}).queries == 2048
    assert [read_config(MISTRAL | {"hidden_act": act}).fused for act in ("silu", "gelu")] == [True, False]
    gemma = MISTRAL | {"model_type": "gemma2"}
    assert [read_config(gemma | {"hidden_activation": act}).fused for act in (None, "gelu")] == [True, False]
    del gemma["tie_word_embeddings"]
    assert read_config(gemma).tied
    tied = read_config(MISTRAL | {"tie_word_embeddings": True})
    assert tied.parameters == 7_241_732_096 - 4096 * 32000


@pytest.mark.parametrize("change", [{"model_type": "gpt2"}, {"model_type": None}, {"hidden_size": "4096"}])
def test_what_is_not_known_is_said(change: dict[str, Any]) -> None:
    """A family that the formulas do not describe, or a number that is none: an error, never a wrong figure."""
    with pytest.raises(ValueError, match=r"not known to the formulas|no number hidden_size"):
        read_config(MISTRAL | change)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=2))


@given(st.dictionaries(st.sampled_from(list(MISTRAL)), JSON), st.sampled_from(sorted(FAMILIES)))
def test_any_config_is_read_or_refused(changes: dict[str, Any], family: str) -> None:
    """Untrusted files: whatever they contain, the result is an architecture of positive sizes or a ValueError."""
    try:
        found = read_config({**MISTRAL, **changes, "model_type": family})
    except ValueError:
        return
    assert min(found.hidden, found.layers, found.heads, found.kv_heads, found.head_size, found.vocabulary) > 0
