"""How the next token of an answer is chosen from the logits: the most likely one, or one that is drawn at random.

Each prompt has random numbers of its own (`Draws`), so that its answer depends neither on the batch that it is in nor
on the process that computes it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.errors import TrainingFailed

if TYPE_CHECKING:
    import torch

_DRAWN_ROWS = 32
"""Rows that are sampled at once: each takes about 50 bytes for each entry of the vocabulary meanwhile."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled, with transformers' names and semantics.

    Attributes:
        temperature: The logits are divided by it; above 0.
        top_k: Only this many of the most likely tokens are drawn from; 0 for all.
        top_p: Only the smallest set of most likely tokens whose probabilities sum to at least this is drawn from.
        seed: The random generator of a prompt is seeded with this and the prompt's number.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Draws:
    """The random numbers for the tokens of one prompt's answer, one for each token.

    Args:
        sampling: How tokens are sampled; None for greedy decoding, which uses no random numbers.
        number: Of the prompt; part of the seed.
    """

    def __init__(self, sampling: Sampling | None, number: int) -> None:
        self.sampling = sampling
        self._random = random.Random(f"{sampling.seed}:{number}") if sampling else None  # noqa: S311 - no secret

    def next(self) -> float:
        """Uniform in [0, 1); 0 in greedy decoding."""
        return self._random.random() if self._random else 0.0


def choose_tokens(logits: torch.Tensor, draws: Sequence[Draws]) -> list[int]:
    """The next token of each row.

    Args:
        logits: (rows, vocabulary), in the dtype that the model computes them in.
        draws: Of each row; all of the same sampling.

    Raises:
        TrainingFailed: The logits of a row are not finite; `max` of NaN would silently choose some token.
    """
    import torch

    sampling = draws[0].sampling
    best, tokens = logits.max(-1)
    if sampling is not None:
        uniform = torch.tensor([[one.next()] for one in draws], dtype=torch.float64, device=logits.device)
        parts = [slice(start, start + _DRAWN_ROWS) for start in range(0, len(draws), _DRAWN_ROWS)]
        tokens = torch.cat([_draw(logits[part], sampling, uniform[part]) for part in parts])
    # The only synchronization with the GPU of a token
    checked: list[int] = tokens.where(best.isfinite(), -1).tolist()
    if -1 in checked:
        raise TrainingFailed(
            "the model's logits are not finite. With an adapter: it diverged; lower JOB_TRAIN__LEARNING_RATE. "
            "Without: the base's numbers are too large for its dtype; set JOB_MODEL__DTYPE to bf16 or fp32"
        )
    return checked


def _draw(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor) -> torch.Tensor:
    """Samples by inverting the cumulative distribution; returns the tokens, (rows,) int64.

    Args:
        logits: (rows, vocabulary).
        sampling: How.
        uniform: (rows, 1) float64 in [0, 1): where the distribution is inverted.
    """
    scores, order = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        scores[:, sampling.top_k :] = float("-inf")
    shares = scores.softmax(-1)  # (rows, vocabulary), the likeliest token first
    before = shares.cumsum(-1) - shares
    shares = shares.where(before < sampling.top_p, 0)  # the most likely token always remains
    total = shares.cumsum(-1)
    # Clamped, since a rounded sum may give an index behind the last one
    at = (total <= uniform * total[:, -1:]).sum(-1, keepdim=True).clamp(max=order.shape[-1] - 1)
    return order.gather(1, at)[:, 0]
