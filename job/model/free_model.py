"""Frees the memory of a model while references to it remain."""

from __future__ import annotations

from typing import Any

import torch

from job.model.fused.frozen_weights import forget_dequantized
from job.model.placed_weights import release


def free_model(model: Any) -> None:
    """Frees the memory of a model that is used no more: others still hold references to it, and there is one GPU."""
    forget_dequantized(model)
    release(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
