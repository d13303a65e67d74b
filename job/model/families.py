"""The families whose whole decoder `model/fused` computes, each described by how it differs from Llama.

A family of `FAMILIES` trains on a GPU with all operations of its decoder fused: `fused all` in the execution plan. All
are built alike: RMS norms, attention with rotary positions, and a gated feed-forward layer. `Family` has a field for
each difference, `model/fused/fused_decoder.py` computes by it, and `model/architecture.py` counts by it.

How to add one:

1. Compare its `modeling_*.py` in transformers with Llama's: the classes whose names end with RMSNorm, MLP and
   Attention, and what the causal language model does to the logits. What the layer and the model do between these
   (residuals, their multipliers, scaled embeddings) stays transformers' own code, and needs no entry.
2. Add the entry, under the `model_type` of its config.json. A difference that no field describes is a new field, with
   the place in `fused_decoder.py` that reads it.
3. `tests/unit/model/fused/test_families.py` runs over all entries: losses, gradients and texts have to be
   those of the model's own code with PEFT's layers. `CONFIGS` there has what makes a difference show in a tiny model.
4. `tests/bench/fused_families.py` measures it on a GPU: add its sizes to `SHAPES`.

Of a mixture, the experts are computed by `fused/experts.py` in any family whose experts it fits; here are those whose
whole decoder is fused, see `Experts`. A router stays the model's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SILU, GELU_TANH = "silu", "gelu_pytorch_tanh"
"""Activations as transformers names them."""


@dataclass(frozen=True)
class Experts:
    """The fields of config.json that describe a mixture of experts, of which every layer is one."""

    count: tuple[str, ...]
    """How many a layer has, by any of these names; a token goes to `num_experts_per_tok` of them."""
    width: str
    """Of the feed-forward layer that each is."""
    dense: Mapping[str, Any] = field(default_factory=dict)
    """Fields that would make some layers none, and the values with which they do not."""


@dataclass(frozen=True)
class Family:
    """How a decoder differs from Llama's, whose entry is `Family()`."""

    activation: str = SILU
    """Of the gate of the feed-forward layer. A config.json with another one is not fused."""
    activation_field: str = "hidden_act"
    """Where config.json names it; where it does not, it is `activation`."""
    activation_alias: str | None = None
    """Another value in config.json that means the same."""
    tied: bool = False
    """Whether the output layer is the embedding where config.json does not say it."""
    joined: bool = False
    """Whether queries, keys and values are one linear layer (`qkv_proj`), and gate and up another (`gate_up_proj`)."""
    norm: Literal["weight", "1 + weight"] = "weight"
    """What an RMS norm multiplies by; with `1 + weight` in fp32, before it is rounded to the compute dtype."""
    norms: int = 2
    """RMS norms of the width of the residual stream, a layer."""
    query_norm: Literal["head", "all heads"] | None = None
    """Over what queries and keys have an RMS norm, before their positions."""
    window: Literal["layer", "model"] | None = None
    """Whose sliding window counts: `sliding_window` of the attention layer, or of config.json for all layers. Llama has
    none, and ignores what config.json says of one."""
    some_rotate: bool = False
    """Whether layers without rotary positions are among them, which `use_rope` of the attention layer says."""
    caps_scores: bool = False
    """Whether attention's scores are capped, by `attn_logit_softcapping`."""
    caps_logits: bool = False
    """Whether logits are capped, by `final_logit_softcapping`."""
    divides_logits: bool = False
    """Whether logits are divided, by `logits_scaling`."""
    experts: Experts | None = None
    """Of a mixture."""


FAMILIES: dict[str, Family] = {
    "gemma": Family(activation=GELU_TANH, activation_alias="gelu", tied=True, norm="1 + weight"),
    "gemma2": Family(
        activation=GELU_TANH,
        activation_field="hidden_activation",
        tied=True,
        norm="1 + weight",
        norms=4,
        window="layer",
        caps_scores=True,
        caps_logits=True,
    ),
    "gemma3_text": Family(
        activation=GELU_TANH,
        activation_field="hidden_activation",
        tied=True,
        norm="1 + weight",
        norms=4,
        query_norm="head",
        window="layer",
        caps_logits=True,
    ),
    "granite": Family(divides_logits=True),
    "llama": Family(),
    "mistral": Family(window="model"),
    "mixtral": Family(window="model", experts=Experts(("num_local_experts",), "intermediate_size")),
    "olmo2": Family(query_norm="all heads"),
    "phi3": Family(joined=True, window="model"),
    "qwen2": Family(window="layer"),
    "qwen3": Family(query_norm="head", window="layer"),
    "qwen3_moe": Family(
        query_norm="head",
        window="layer",
        experts=Experts(
            ("num_experts", "num_local_experts"),
            "moe_intermediate_size",
            {"mlp_only_layers": [], "decoder_sparse_step": 1},
        ),
    ),
    "smollm3": Family(tied=True, window="layer", some_rotate=True),
}
"""By the `model_type` of config.json."""

IMAGES_TOO = {"gemma3": "gemma3_text"}
"""Models that read images too, and the family of their text part. Here they get texts alone, so that only this part
computes; `decoder_of` in `fused_decoder.py` finds it."""

CHANGING_ROPE = {"dynamic"}
"""Rotary positions whose frequencies transformers computes from the longest sequence, on the host."""


def of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the text part where a config.json of `IMAGES_TOO` has them apart, else all."""
    text = config.get("text_config")
    if config.get("model_type") not in IMAGES_TOO or not isinstance(text, Mapping):
        return config
    return {"model_type": IMAGES_TOO[config["model_type"]], **text}


def fused_family(config: Mapping[str, Any]) -> Family | None:
    """The entry of a config.json; None if `model/fused` does not compute the whole decoder.

    Args:
        config: Its fields by name.
    """
    config = of_text(config)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or (family.experts is not None and not _all_sparse(config, family.experts)):
        return None
    activation = config.get(family.activation_field) or family.activation
    return family if activation in {family.activation, family.activation_alias} else None


def _all_sparse(config: Mapping[str, Any], experts: Experts) -> bool:
    """Whether all layers of a mixture are one."""
    return all((config.get(name) or value) == value for name, value in experts.dense.items())


def caps_scores(config: Mapping[str, Any]) -> bool:
    """Whether attention's scores are capped in the decoder of a config.json.

    Args:
        config: Its fields by name.
    """
    config = of_text(config)
    family = fused_family(config)
    return family is not None and family.caps_scores and config.get("attn_logit_softcapping", 50.0) is not None


def why_not_recorded(config: Mapping[str, Any]) -> str | None:
    """Why the decoder of a config.json cannot be recorded as a CUDA graph although it is fused; None if it can.

    Args:
        config: Its fields by name.
    """
    config = of_text(config)
    if caps_scores(config):
        return "torch's kernel for packed attention has no soft cap: attention is computed segment by segment"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if (kind := part.get("rope_type", part.get("type"))) in CHANGING_ROPE:
            return f"the frequencies of its rotary positions ({kind}) are chosen on the host"
    return None
