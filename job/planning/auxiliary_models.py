"""Time of the auxiliary models: the classifier of JOB_DATA__SAFETY_MODEL and the judge of JOB_EVAL__JUDGE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from job.model.files import quantization_method
from job.model.text_classifier import BATCH_TOKENS
from job.planning.gpu_prices import Gpu
from job.planning.time_model import UTILISATION
from job.training.memory_model import FP32

FP32_SHARE = 1 / 16
"""Operations a second in fp32, as a share of those in half precision: by the data sheets of A100 and H100. Others have
more, up to a quarter (L4)."""
_WIDTHS = {"float64": 8, "float32": FP32, "float16": 2, "bfloat16": 2}
"""Bytes of a weight, by the `dtype` of config.json."""


@dataclass(frozen=True)
class AuxiliaryModel:
    """The texts that a model other than the base reads, each once.

    Attributes:
        name: What it does, as the plan calls it.
        texts: Number of texts.
        tokens: Tokens of all texts, including those for the CPU; counted by the base's tokenizer or estimated from
            characters.
        on_processor: How many of them the CPU computes, while the GPU is idle.
        passes: Forward passes on the GPU.
        weights: Weights that every token is multiplied by; None if unknown, or if another machine computes.
        value_bytes: Bytes of a number as the model computes.
        note: Where the figures come from, or why there is no time.
    """

    name: str
    texts: int
    tokens: int
    on_processor: int
    passes: int
    weights: int | None
    value_bytes: int
    note: str

    @property
    def flops(self) -> int | None:
        """Operations of all texts: two a weight and token, without attention."""
        return None if self.weights is None else 2 * self.weights * self.tokens


def screening(rows: int, tokens: int, answers: int, answer_tokens: int, weights: int | None) -> AuxiliaryModel:
    """The classifier, in fp32: it computes all rows in batches on the GPU, and all sample answers on the CPU.

    Args:
        rows: Rows to train and to validate on.
        tokens: Number of tokens of all of them.
        answers: Number of answers of base and adapter to JOB_EVAL__PROMPTS.
        answer_tokens: Largest number of tokens of an answer.
        weights: As `AuxiliaryModel` has it.
    """
    generated = answers * answer_tokens
    note = "by the base's tokenizer" if weights is not None else "the size of its weights is unknown: not in the hours"
    return AuxiliaryModel(
        name="safety screen",
        texts=rows + answers,
        tokens=tokens + generated,
        on_processor=generated,
        passes=ceil(tokens / BATCH_TOKENS),
        weights=weights,
        value_bytes=FP32,
        note=note,
    )


def judging(judgements: int, tokens: int, weights: int | None, value_bytes: int, *, served: bool) -> AuxiliaryModel:
    """The judge, which reads one question at a time: each pair of answers in both orders.

    Args:
        judgements: Questions.
        tokens: Number of tokens of all of them, with answers of the largest length.
        weights: As `AuxiliaryModel` has it.
        value_bytes: As `AuxiliaryModel` has it.
        served: Whether it is a server's.
    """
    note = "at most; equal answers are not judged"
    if served:
        note = "at most; the server's time is not in the hours"
    elif weights is None:
        note = "at most; the size of its weights is unknown: not in the hours"
    return AuxiliaryModel(
        name="judge",
        texts=judgements,
        tokens=tokens,
        on_processor=0,
        passes=judgements,
        weights=None if served else weights,
        value_bytes=value_bytes,
        note=note,
    )


def count_weights(folder: Path, weight_bytes: int | None, *, heads: bool) -> int | None:
    """Number of weights that every token is multiplied by: all but those of the embedding and the output layer.

    Args:
        folder: With its config.json.
        weight_bytes: Bytes of its weight files; None if unknown.
        heads: Whether it has an output layer over the vocabulary, which is computed once a text.

    Returns:
        None if it is unknown, as for a quantized model, whose files do not tell.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantized = quantization_method(config) is not None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    if weight_bytes is None or quantized:
        return None
    text = config.get("text_config")
    text_config: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    width = _WIDTHS.get(str(text_config.get("dtype") or text_config.get("torch_dtype") or config.get("dtype")), FP32)
    sizes = [text_config.get(name) for name in ("vocab_size", "hidden_size")]
    table = sizes[0] * sizes[1] if isinstance(sizes[0], int) and isinstance(sizes[1], int) else 0
    tables = 2 if heads and not text_config.get("tie_word_embeddings", True) else 1
    return max(0, weight_bytes // width - tables * table)


def seconds(model: AuxiliaryModel, gpu: Gpu, *, disk: float, processor: float) -> float:
    """Seconds of loading it and of all its texts; 0 where they are not known.

    Args:
        model: The model.
        gpu: The GPU.
        disk: Bytes a second that are loaded.
        processor: Operations a second of the processor.
    """
    if model.weights is None:
        return 0.0
    weight_bytes = model.weights * model.value_bytes
    flops = 2 * model.weights * (model.tokens - model.on_processor)
    rate = UTILISATION * gpu.flops * (FP32_SHARE if model.value_bytes == FP32 else 1.0)
    reading = max(flops / rate, model.passes * weight_bytes / gpu.bandwidth)
    return weight_bytes / disk + reading + 2 * model.weights * model.on_processor / processor
