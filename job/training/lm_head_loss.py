"""The loss over the vocabulary on a CPU, in full precision, by torch's own means.

TRL's head for machines without Triton scores every position, whether it learns something or not, and forms all logits
twice. torch's `linear_cross_entropy` takes a few rows at a time and finds the gradient on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from job.model.fused import lora_forward
from job.model.packing_check import Losses
from job.records import Example
from job.training.packing import IGNORED, packed_inputs

ROWS = 256
"""Positions whose logits are formed at a time. torch's own choice, a few dozen, reads all weights for each of them."""
_linear_cross_entropy: Any = getattr(functional, "linear_cross_entropy", None)
"""torch 2.13 has it."""


def packed_loss(model: Any, examples: Sequence[Example], device: torch.device) -> torch.Tensor:
    """The summed negative log-likelihood of all tokens that are learned, of examples laid end to end.

    Args:
        model: A PEFT model, used packed, that has TRL's fused head where `can_sum` says no.
        examples: A micro-batch.
        device: The model's.
    """
    packed = packed_inputs(examples, device)
    if can_sum(base := model.get_base_model()):
        return summed_loss(base, **packed)
    loss: torch.Tensor = -model(**packed, fused_lm_head=True).log_probs.sum()
    return loss


def alone_loss(model: Any, example: Example, device: torch.device) -> torch.Tensor:
    """The same of one example, by the model's own forward: right for every causal language model."""
    ids = torch.tensor([example.input_ids], device=device)
    learned = [i - 1 for i, target in enumerate(example.targets) if target]
    logits = model(input_ids=ids).logits[0, learned]
    return functional.cross_entropy(logits.float(), ids[0, 1:][learned], reduction="sum")


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


def losses_of(model: Any) -> Losses:
    """Both ways to the loss of examples, for the check that they agree; gives the model TRL's fused head where needed."""
    from trl.trainer.utils import add_fused_lm_head

    if not can_sum(base := model.get_base_model()):
        add_fused_lm_head(base)
    return Losses(
        packed=lambda examples: packed_loss(model, examples, model.device),
        alone=lambda example: alone_loss(model, example, model.device),
    )
