"""Blocks and types of GGUF files are those of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from job.common.export_formats import EXPORT_FORMATS
from job.export.gguf import TYPES
from job.export.gguf_conversion import (
    _blocks_by_ggml,
    _file_type,
    _fitting_type,
    import_converter,
    lost_window,
    why_computed_otherwise,
)
from job.model.families import FAMILIES

ERROR = {"Q4_0": 0.12, "Q5_0": 0.06, "Q5_1": 0.06, "Q8_0": 0.01, "Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.03}


@pytest.fixture
def packaged() -> Iterator[Any]:
    """The package gguf, put back as it was."""
    import gguf as package

    table = package.quants._type_traits
    kinds = {kind: vars(kind).get("quantize_blocks") for kind in table.values()}
    rows = package.quants._apply_over_grouped_rows
    yield package
    package.quants._apply_over_grouped_rows = rows
    for kind, method in kinds.items():
        if method is not None:
            kind.quantize_blocks = method
        elif "quantize_blocks" in vars(kind):
            del kind.quantize_blocks


def test_blocks_are_llama_cpps_own(packaged: Any) -> None:
    """Every type holds the numbers up to its rounding; those that the package makes too have the same bytes."""
    types, quants = packaged.GGMLQuantizationType, packaged.quants
    weights = np.random.default_rng(0).standard_normal((96, 512), dtype=np.float32)
    own = {name: quants.quantize(weights, types[name]) for name in ("Q4_0", "Q5_0", "Q5_1", "Q8_0")}
    with pytest.raises(NotImplementedError):
        quants.quantize(weights, types.Q4_K)
    _blocks_by_ggml()
    for name, bound in ERROR.items():
        made = quants.quantize(weights, types[name])
        assert name not in own or np.array_equal(made, own[name])
        error = np.abs(quants.dequantize(made, types[name]) - weights).mean()
        assert bound / 8 < error < bound


def test_a_type_that_does_not_fit_is_replaced_as_llama_cpp_does() -> None:
    """Rows that are no multiple of 256 have no k-quants: the next larger kind of 32 takes their place, or 16 bits."""
    types, fits = import_module("gguf").GGMLQuantizationType, _fitting_type
    assert fits(types.Q4_K, 512) == types.Q4_K
    assert [fits(kind, 576) for kind in (types.Q4_K, types.Q5_K, types.Q6_K)] == [types.Q5_0, types.Q5_1, types.Q8_0]
    assert fits(types.Q8_0, 100) == fits(types.Q6_K, 100) == types.F16


def test_every_type_is_one_of_llama_cpps() -> None:
    """The names are llama.cpp's own, and those of the settings."""
    assert tuple(TYPES) == tuple(EXPORT_FORMATS["gguf"].types)
    assert all(_file_type(name).name.endswith(name.upper()) for name in TYPES)


def test_every_fused_family_can_be_converted() -> None:
    """Each class is found, with an architecture that the installed package gguf knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    conversion = import_converter()
    classes = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] for family in FAMILIES}
    assert all(conversion.get_model_class(name).model_arch is not None for name in classes)


GEMMA = {"num_hidden_layers": 6, "head_dim": 64, "hidden_size": 128, "num_attention_heads": 1}
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("family", "hparams", "why"),
    [
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 64, "layer_types": [SLIDING, FULL] * 3}, None),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 32}, "divides scores by the square root of 64"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 128, "num_hidden_layers": 46}, None),
        ("Gemma3ForCausalLM", {"layer_types": [*[SLIDING] * 5, FULL]}, None),
        ("Gemma3ForCausalLM", {"layer_types": [SLIDING, FULL] * 3}, "full attention in every 6th layer"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": True}, None),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}, "normalizes the weights of the experts"),
        ("LlamaForCausalLM", {}, None),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family: str, hparams: dict[str, Any], why: str) -> None:
    """A file cannot say it, so that its numbers would silently be those of another model."""
    found = why_computed_otherwise(family, GEMMA | hparams)
    assert found is None if why is None else why in str(found)


class WithParameters:
    """A converter's model whose file gets these parameters."""

    def __init__(self, written: str, **hparams: Any) -> None:
        self.hparams, self._written = {"max_position_embeddings": 64, **hparams}, written
        self.gguf_writer = SimpleNamespace(kv_data=[{}])

    def set_gguf_parameters(self) -> None:
        """Writes them."""
        self.gguf_writer.kv_data[0][self._written] = 16


@pytest.mark.parametrize(
    ("model", "lost"),
    [
        (WithParameters("llama.context_length", sliding_window=16), 16),
        (WithParameters("llama.context_length", sliding_window=64), None),
        (WithParameters("llama.context_length", sliding_window=None), None),
        (WithParameters("llama.context_length", sliding_window=16, use_sliding_window=False), None),
        (WithParameters("llama.context_length", sliding_window=16, layer_types=[FULL]), None),
        (WithParameters("gemma2.attention.sliding_window", sliding_window=16), None),
    ],
)
def test_a_window_that_a_file_does_not_have_is_told(model: Any, lost: int | None) -> None:
    """Mistral's, which llama.cpp ignores; not one that reaches over all positions, or is not used."""
    assert lost_window(model) == lost
