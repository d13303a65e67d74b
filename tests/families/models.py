"""A tiny random model of any causal family that the installed transformers knows, built from its default configuration.

Numbers are made small by their names. What a family wants beside that stands in `SPECIAL`, a line each.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

VOCABULARY = 400
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embed_dim", "emb_dim"), 64),
    **dict.fromkeys(("embedding_size", "embedding_dim", "attention_hidden_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "n_inner", "dim_ff"), 128),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "attention_head_dim", "swa_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim",), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("sliding_window", "attention_window", "window_size", "attention_chunk_size"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_source_positions"), 512),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("lru_width",), 64),
    **dict.fromkeys(("hidden_size_per_layer_input",), 16),
    "initializer_range": 0.1,
}
"""Sizes by name; a name that a configuration does not have, or has as None, is left."""
TOKENS = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}

SPECIAL: dict[str, dict[str, Any]] = {}


def tiny_config(model_type: str) -> Any:
    """The family's configuration, small."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    given = _shrunk(kind, model_type)
    return kind(**given)


def _shrunk(kind: Any, model_type: str) -> dict[str, Any]:
    """Arguments of a configuration class that make it small, its sub-configurations within."""
    defaults = kind()
    given: dict[str, Any] = {}
    for name, small in SMALL.items():
        real = kind.attribute_map.get(name, name) if hasattr(kind, "attribute_map") else name
        value = getattr(defaults, name, None)
        if name in getattr(kind, "attribute_map", {}) and real in SMALL:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool) and value:
            given[name] = small
    for name, token in TOKENS.items():
        if hasattr(defaults, name):
            given[name] = token
    for name, sub in (getattr(kind, "sub_configs", None) or {}).items():
        part = getattr(defaults, name, None)
        if part is not None:
            given[name] = _shrunk(type(part), part.model_type)
    given |= SPECIAL.get(model_type, {})
    return given


def make_model(model_type: str, folder: Path, **changes: Any) -> None:
    """Writes a random model of the family."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # some classes begin with zeros or equal numbers, under which errors hide
        for parameter in model.parameters():
            if parameter.ndim == 1 and float(parameter.float().std(correction=0)) == 0:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def families() -> list[str]:
    """All types of models of which the installed transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


__all__ = ["VOCABULARY", "families", "inspect", "make_model", "tiny_config"]
