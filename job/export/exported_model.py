"""Loads an exported model to be scored: as readers load it, with the job's packed attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from job.errors import DataError, Problem
from job.model.device import short_name
from job.model.files import MAX_CONFIG_BYTES, read_json
from job.model.free_model import free_model
from job.model.load_base import PLAIN, load_base
from job.model.loading_errors import loading_weights
from job.model.packed_attention import NAME, register, use


@dataclass(frozen=True)
class ScoringOptions:
    """How the run scores its models.

    Attributes:
        device: Where the model is placed.
        compute_dtype: That of the run, for a GPU that does not compute in the dtype of the files.
        max_length: Longest sequence in tokens.
        packed: Whether sequences are packed, as in the run's other evaluations.
        processes: Of this run on this machine, which share its processor.
        check_stop: Called while another program computes; may raise what ends the job.
    """

    device: torch.device
    compute_dtype: torch.dtype
    max_length: int
    packed: bool
    processes: int = 1
    check_stop: Callable[..., None] = lambda **_: None


@dataclass(frozen=True)
class ExportedModel:
    """A loaded exported model.

    Attributes:
        model: What `scoring` scores.
        dtype: That of most of its weights that are not quantized, as the settings write it.
        scored_in: That in which it computes.
        scoring: As `evaluation.scorer.ScoreSequences`: model, questions, and by number the questions of each packed
            sequence -> (number, scores). None for a model of transformers.
        facts: What else decides the bits of its scores, JSON-able: which library computes, in which version.
        close: Frees its memory.
        one_by_one: Whether it scores one question at a time, and scores are to be kept after each.
    """

    model: Any
    dtype: str
    scored_in: str
    scoring: Callable[..., Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None
    one_by_one: bool = False


def gpu_bytes(device: torch.device) -> int:
    """Memory of a GPU, whoever holds it."""
    return torch.cuda.mem_get_info(device)[1]


def load_exported(folder: Path, scoring: ScoringOptions) -> ExportedModel:
    """Loads the model in the dtype of its files, in which `from_pretrained` loads it, too.

    Args:
        folder: Of the exported model.
        scoring: Device, dtype and packing.

    Raises:
        DataError: The folder holds no complete model.
    """
    dtype, scored_in = _dtypes(folder, scoring)
    model = load_base(
        folder,
        quantization="none",
        double_quantization=False,
        dtype=scored_in,
        device=scoring.device,
        max_length=scoring.max_length,
    )
    use(model, NAME if scoring.packed else PLAIN)
    return ExportedModel(model, short_name(dtype), short_name(scored_in), close=lambda: free_model(model))


def load_quantized(folder: Path, scoring: ScoringOptions, *, ignored: str = "\0", **options: Any) -> ExportedModel:
    """Loads a model whose config.json says how its weights are quantized, by transformers' own quantizer of that kind.

    Args:
        folder: Of the exported model.
        scoring: Device, dtype and packing.
        ignored: Ending of the names of tensors that the model need not have a place for.
        options: Arguments of `from_pretrained`.

    Raises:
        DataError: The folder holds no complete model.
    """
    from transformers import AutoModelForCausalLM

    register()
    dtype, scored_in = _dtypes(folder, scoring)
    with loading_weights(folder):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=scored_in,
            attn_implementation=PLAIN,
            device_map={"": scoring.device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    # transformers would fill what is missing with random numbers, and leave out what it has no place for
    more = {name for name in loaded["unexpected_keys"] if not name.endswith(ignored)}
    wrong = sorted({*loaded["missing_keys"], *more, *map(str, loaded["mismatched_keys"])})
    if wrong:
        what = f"{folder.name} does not have the weights of {type(model).__name__}: {', '.join(wrong[:5])}"
        raise DataError([Problem("JOB_EXPORT__FORMATS", what)])
    model.config.use_cache = False
    use(model, NAME if scoring.packed else PLAIN)
    return ExportedModel(model, short_name(dtype), short_name(scored_in), close=lambda: free_model(model))


def _dtypes(folder: Path, scoring: ScoringOptions) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the files' weights that are not quantized, and that in which the model is to compute."""
    dtype: torch.dtype = getattr(torch, read_json(folder / "config.json", MAX_CONFIG_BYTES)["dtype"])
    computes = scoring.device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(False)  # noqa: FBT003
    return dtype, dtype if computes else scoring.compute_dtype
