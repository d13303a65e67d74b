"""Loads an exported model to be scored: as readers load it, with the job's packed attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from job.export.merge import short_name
from job.model.base import PLAIN, load_base
from job.model.files import MAX_CONFIG_BYTES, read_json
from job.model.packed_attention import NAME, use


@dataclass(frozen=True)
class ExportedModel:
    """A loaded exported model, the dtype of its files, and that in which it computes; as the settings write them."""

    model: Any
    dtype: str
    scored_in: str


def load_exported(
    folder: Path, *, device: torch.device, compute_dtype: torch.dtype, max_length: int, packed: bool
) -> ExportedModel:
    """Loads the model in the dtype of its files, in which `from_pretrained` loads it, too.

    Args:
        folder: Of the exported model.
        device: Where it is placed.
        compute_dtype: That of the run, for a GPU that does not compute in the dtype of the files.
        max_length: Longest sequence in tokens.
        packed: Whether sequences are packed, as in the run's other evaluations.

    Raises:
        DataError: The folder holds no complete model.
    """
    dtype: torch.dtype = getattr(torch, read_json(folder / "config.json", MAX_CONFIG_BYTES)["dtype"])
    computes = device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(False)  # noqa: FBT003
    scored_in = dtype if computes else compute_dtype
    model = load_base(
        folder,
        quantization="none",
        double_quantization=False,
        dtype=scored_in,
        device=device,
        max_length=max_length,
    )
    use(model, NAME if packed else PLAIN)
    return ExportedModel(model, short_name(dtype), short_name(scored_in))
