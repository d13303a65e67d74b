"""A model's generation_config.json: its end-of-sequence tokens are used, other fields are not applied but logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from job.evaluation.generation import GenerationOptions, end_tokens
from job.log import get_logger
from job.model.files import MAX_CONFIG_BYTES, read_json

NEUTRAL: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "diversity_penalty": 0.0,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "num_beams": 1,
    "watermarking_config": None,
}
"""Field that changes greedy decoding in transformers -> its value without effect.

Fields of sampling (temperature, top_k and so on) are not among them: the task sets whether answers are sampled.
"""


def with_model_defaults(options: GenerationOptions, folder: Path, model: Any, tokenizer: Any) -> GenerationOptions:
    """Adds all tokens that end an answer: the tokenizer's, and those of config.json and generation_config.json.

    All of them, so that the way to generate is equal for a base in the quantized cache, whose generation_config.json
    may name what only config.json named before. Fields of that file that would change greedy answers are not applied;
    the log names them once.
    """
    return replace(options, ends=tuple(sorted({*end_tokens(model, tokenizer), *_read(folder)})))


@cache
def _read(folder: Path) -> tuple[int, ...]:
    if not (folder / "generation_config.json").is_file():
        return ()
    config = read_json(folder / "generation_config.json", MAX_CONFIG_BYTES)
    not_applied = {
        name: config[name] for name, value in NEUTRAL.items() if config.get(name) not in (None, value, [], {})
    }
    if not_applied:
        why = "answers are decoded greedily, or sampled as the task says"
        get_logger().warning("the model's generation_config.json is not applied", fields=not_applied, why=why)
    ends = config.get("eos_token_id")
    return tuple(sorted({end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int}))
