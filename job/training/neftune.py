"""NEFTune: uniform noise on the embeddings in training.

The noise is drawn from torch's generator, which every step seeds (`training/step.py`), so a resumed run draws the same
noise. The scale of an example's noise depends on its own length, also in a packed sequence. transformers' own hook uses
the length of the whole batch, so packing would make the noise smaller.

Source: Jain et al. 2023, NEFTune (arXiv:2310.05914), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from job.model.fused.fused_decoder import decoder_of


def add_noise(base: Any, alpha: float) -> Callable[[], None]:
    """Adds noise to the embedding's output while the model is in training mode.

    Args:
        base: The causal language model.
        alpha: The noise of an example of n tokens is uniform in +- alpha / sqrt(n * hidden).

    Returns:
        A function that removes the hooks.
    """
    positions: list[torch.Tensor | None] = [None]

    def note(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        positions[0] = inputs.get("position_ids")

    def noise(module: Any, _args: Any, embedded: torch.Tensor) -> torch.Tensor | None:
        """(1, tokens, hidden) -> the same with noise."""
        if not module.training:
            return None
        if positions[0] is None:  # one example alone
            lengths = torch.full(embedded.shape[:-1], embedded.shape[1], device=embedded.device)
        else:
            lengths = segment_lengths(positions[0])
        scale = alpha / (lengths[..., None] * embedded.shape[-1]).float().sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * scale.to(embedded.dtype)

    # In a model that also reads images, the decoder may be called without the rest of the model.
    called = dict.fromkeys((base.base_model, decoder_of(base)))
    hooks = [
        *(module.register_forward_pre_hook(note, with_kwargs=True) for module in called),
        base.get_input_embeddings().register_forward_hook(noise),
    ]

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove


def segment_lengths(positions: torch.Tensor) -> torch.Tensor:
    """The length of each token's segment, (1, tokens) int64, from the positions in the segments, of the same shape.

    The intermediate tensor has one entry for each token, because the number of segments is not known on the host
    without a synchronization.
    """
    flat = positions[0]
    segments = (flat == 0).cumsum(0) - 1
    lengths = torch.zeros_like(flat).scatter_reduce_(0, segments, flat + 1, "amax")
    return lengths[segments][None]
