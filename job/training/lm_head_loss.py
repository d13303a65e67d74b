"""The loss over the vocabulary on a CPU, in full precision, by torch's own means.

TRL's head for machines without Triton scores every position, whether it learns something or not, and forms all logits
twice. torch's `linear_cross_entropy` takes a few rows at a time and finds the gradient on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from job.model.fused import lora_forward
from job.training.packing import IGNORED

ROWS = 256
"""Positions whose logits are formed at a time. torch's own choice, a few dozen, reads all weights for each of them."""
_linear_cross_entropy: Any = getattr(functional, "linear_cross_entropy", None)
"""torch 2.13 has it."""


def can_sum(base: Any) -> bool:
    """Whether the head of a causal language model is a plain linear layer, and this the machine for it.

    Without autocast: what is multiplied has to be of one dtype.
    """
    known = _linear_cross_entropy is not None and lora_forward.knows(base)
    plain = type(base.get_output_embeddings()) is torch.nn.Linear
    return known and plain and base.device.type == "cpu" and base.dtype is torch.float32


def summed_loss(base: Any, *, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The summed negative log-likelihood of all tokens that are learned.

    Args:
        base: The causal language model, its adapter within.
        labels: (1, tokens) int64: token ids, or -100 where nothing is learned.
        inputs: The others of `rows.flat_inputs`.
    """
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[0]
    following = labels[0, 1:]
    learned = (following != IGNORED).nonzero()[:, 0]
    head = base.get_output_embeddings()
    loss: torch.Tensor = _linear_cross_entropy(
        hidden[learned],
        head.weight,
        following[learned],
        linear_bias=head.bias,
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=ROWS),
    )
    return loss
