"""A tiny random model of any causal family of the installed transformers, built from its default configuration.

Sizes are made small by their names. Other requirements of a family are in `SPECIAL`, one line each.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

VOCABULARY = 400
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "hidden_size_global", "d_model", "n_embd", "dim", "model_dim", "embed_dim", "emb_dim"), 64
    ),
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
"""Small sizes by name; names that a configuration lacks, or has as None, are skipped."""
TOKENS = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}

LAYERS = 4
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_GEMMA4 = {"head_dim": 16, "global_head_dim": 16}
"""Gemma 4 does not divide scores by the root of the head size, but learns norms of queries and keys. With random
norms and its heads of 256 and 512, scores have a standard deviation of 16 to 23, most queries attend to a single token,
and rounding grows so much that results cannot be compared."""
_SHARED = {"num_kv_shared_layers": LAYERS, "num_hidden_layers": LAYERS}
"""An assistant model for another model's generation, without keys and values of its own."""
_LEFT: dict[str, Any] = {"head_dim": None}
"""For classes without such an argument, or with a property instead."""
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 100, "encoder_hash_byte_group_size": [3], "cross_attn_k": 2},
    "cohere_compass_text": {"layer_types": ["full_attention", "sliding_attention"] * 2}
    | {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "ctrl": {"dff": 128},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24, "kv_lora_rank": 16}
    | {"qk_nope_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16}
    | {"swa_kv_lora_rank": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16},
    "dots3_note": {"vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64}}
    | {"audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64}},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}}
    | {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2, "num_hidden_layers": 8}
    | {"layer_types": ["sliding_attention", "full_attention"] * 4},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6, "<|visual token 000000|>": 7}},
    "falcon": _LEFT,
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "intermediate_size": [128] * 4, "laurel_rank": 8},
    "gemma4_assistant": {"text_config": {**_SHARED, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_text": {**_GEMMA4, "num_kv_shared_layers": 2},
    "gemma4_unified_assistant": {"text_config": _SHARED},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2, "num_experts": 4},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY, "n_layers_per_attn_res_block": 1}
    | {"loop_layer_index_start": 1, "loop_layer_index_end": 3},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4, "qk_head_dim": 24},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "ministral": {"head_dim": 16, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "musicgen": {},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "chunk_size": 16},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2},
    "qwen4_exp_text": {"indexer_budget": 16, "indexer_compress_ratio": 4, "indexer_head_dim": 16, "indexer_n_heads": 2}
    | {"indexer_kv_heads": 1, "ngram_vocab_size_base": 100, "hc_lowrank": 16, "ple_embed_dim": 16}
    | {"split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 1},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"] * 2, "axial_pos_embds_dim": [16, 48]}
    | {"axial_pos_shape": [16, 32], "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "num_buckets": 4},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "shape_vocab_size": 400},
    "xmod": {"default_language": "en_XX"},
    "xlnet": {"max_position_embeddings": None, "d_inner": 128, "d_head": 16},
    "xlstm": {"v_head_dim": None, "num_blocks": 4},
    "zamba": {"attention_head_dim": 32, "attention_hidden_size": 128, "num_key_value_heads": 4, "mamba_dt_rank": 4}
    | {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 32}
    | {"attention_hidden_size": 128, "mamba_headdim": 16, "n_mamba_heads": 8, "chunk_size": 16, "adapter_rank": 8}
    | {"num_key_value_heads": 4, "kv_channels": 16, "num_query_groups": 4, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "layer_types": ["hybrid"] * 4},
}
"""Requirements of a family in addition to small sizes; None leaves an argument out."""

_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
_KEYS_AS_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
"""Layers without a window have no value projection: the keys, before their norm, are the values."""
_PLAIN = {**_GEMMA4, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4 (experts, keys as values)": ("gemma4", {"text_config": {**_PLAIN, **_EXPERTS, **_KEYS_AS_VALUES}}),
    "gemma4_text (experts)": ("gemma4_text", {**_PLAIN, **_EXPERTS}),
    "gemma4_text (experts, keys as values)": ("gemma4_text", {**_PLAIN, **_EXPERTS, **_KEYS_AS_VALUES}),
    "gemma4_text (keys as values)": ("gemma4_text", {**_PLAIN, **_KEYS_AS_VALUES}),
    "gemma4_unified_text (keys as values)": ("gemma4_unified_text", {**_GEMMA4, **_KEYS_AS_VALUES}),
}
"""Name -> model type and arguments: parts of a family that only some of its checkpoints have."""


def tiny_config(family: str) -> Any:
    """A small configuration of a family or a variant."""
    from transformers import CONFIG_MAPPING

    model_type, special = VARIANTS.get(family, (family, SPECIAL.get(family, {})))
    kind = CONFIG_MAPPING[model_type]
    given = _shrunk(kind, model_type, special)
    return kind(**given)


def _shrunk(kind: Any, model_type: str, special: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration class that make it small, its sub-configurations within."""
    defaults = _defaults(kind, model_type)
    given: dict[str, Any] = {}
    for name, small in SMALL.items():
        real = kind.attribute_map.get(name, name) if hasattr(kind, "attribute_map") else name
        value = _value(defaults, name)
        if name in getattr(kind, "attribute_map", {}) and real in SMALL:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool) and value:
            given[name] = small
    given |= {name: token for name, token in TOKENS.items() if hasattr(defaults, name)}
    for name in getattr(kind, "sub_configs", None) or {}:
        part = getattr(defaults, name, None)
        if part is not None:
            given[name] = _shrunk(type(part), part.model_type, SPECIAL.get(part.model_type, {}))
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if kinds := list(dict.fromkeys(_value(defaults, name) or [])):
            given[name] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
    if "qk_rope_head_dim" in given:
        given |= {"head_dim": None, "num_key_value_heads": 4}  # these derive it, and share no heads
    for name, value in special.items():
        part = name in (getattr(kind, "sub_configs", None) or {})
        given[name] = given[name] | value if part and isinstance(given.get(name), dict) else value
    renamed = getattr(kind, "attribute_map", {})
    computed = {n for n in given if isinstance(inspect.getattr_static(kind, renamed.get(n, n), None), property)}
    return {name: value for name, value in given.items() if value is not None and name not in computed}


def _defaults(kind: Any, model_type: str) -> Any:
    try:
        return kind()
    except Exception:  # noqa: BLE001 - a class that does not accept its own defaults
        return kind(**SPECIAL.get(model_type, {}))


def _value(config: Any, name: str) -> Any:
    """An attribute; None if it is missing, or differs between layers."""
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 - of a stranger's property
        return None


def make_model(family: str, folder: Path, **changes: Any) -> None:
    """Writes a random model of the family or variant: with all its parts, as its checkpoints are published.

    If its class cannot be built, only the configuration is written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    whole = type(config) in AutoModelForImageTextToText._model_mapping
    kind = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # some classes initialize with zeros or equal numbers, which hide errors
        for parameter in model.parameters():
            if parameter.ndim == 1 and float(parameter.float().std(correction=0)) == 0:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def families() -> list[str]:
    """All model types with a causal language model in the installed transformers, and the variants."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]
