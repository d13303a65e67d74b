"""How a micro-batch's gradient is found, and what is given up when a GPU's memory runs out.

What is given up costs time and changes no bit: kept weights and activations are computed anew instead, and work is
launched piece by piece instead of replayed. The trainer's budget, which does change bits, comes after all that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from trl.kernels import ChunkedLogProbFunction

from job.log import get_logger
from job.model.base import recompute_activations
from job.model.fused.frozen_weights import forget_dequantized
from job.model.packed_attention import Layout, Segment, is_packed
from job.records import Example
from job.training.config import Recipe
from job.training.cuda_graphs import CudaGraphs
from job.training.lm_head_loss import alone_loss, packed_loss
from job.training.packing import IGNORED, grain, longest_segment, padded_sequence

VOCABULARY_CHUNK = 32768
"""Logits are formed for so many entries of the vocabulary at a time."""


class Learner:
    """Adds micro-batches' gradients to the adapter's.

    Args:
        model: A PEFT model.
        recipe: How it is trained.
        examples: All of the data set: no row will be longer than theirs allow.
        largest: The examples of the largest micro-batch that this process will meet. It is recorded first: the
            recordings share memory, and in that of the largest there is room for the others.
        backward: What takes a loss backwards where there is autocast.
        autocast: Opens a context for it.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        examples: Sequence[Example],
        *,
        largest: Callable[[], Sequence[Example]],
        backward: Callable[[Any], None],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._model, self._recipe, self._largest = model, recipe, largest
        self._backward, self._autocast = backward, autocast
        self._longest = longest_segment(examples, recipe.micro_batch_tokens)
        self._replayed: CudaGraphs | None = None
        kept = {
            "kept_base": recipe.kept_base,
            "kept_activations": not recipe.autocast and not recipe.gradient_checkpointing,
            "recorded": recipe.replayed,
        }
        self._spare = [name for name, holds in kept.items() if holds]
        """What can still be given up, in that order."""
        self._given_up: list[str] = []

    def __call__(self, model: Any, examples: Sequence[Example], weight: float, device: torch.device) -> torch.Tensor:
        """Adds the gradient of the examples' summed loss times `weight`; returns that loss, valid until the next.

        Args:
            model: As Trainer wraps it.
            examples: A micro-batch.
            weight: One by the number of the step's target tokens.
            device: The model's.
        """
        if not self._recipe.padded:
            total = torch.zeros((), device=device)
            for part in [examples] if is_packed(self._model) else [[example] for example in examples]:
                with self._autocast():
                    summed = (
                        packed_loss(model, part, device)
                        if is_packed(self._model)
                        else alone_loss(model, part[0], device)
                    )
                loss: torch.Tensor = summed * weight
                self._backward(loss)
                total += loss.detach()
            return total
        row = padded_sequence(examples, device)
        inputs = row.tokens, row.ends, torch.tensor(weight, device=device)
        if "recorded" not in self._spare:
            return self._learn_row(*inputs, segments=row.segments)
        return self._recorded(device)(*inputs)

    @property
    def given_up(self) -> list[str]:
        """Names of fields of `Execution` that do not hold any more."""
        unrecorded = self._replayed is not None and not self._replayed.possible
        return self._given_up + ["recorded"] * unrecorded

    def release(self) -> None:
        """Lets go of the recordings and their memory; they are made again when they are needed."""
        self._replayed = None

    def can_make_room(self) -> bool:
        """Whether anything is left that can be given up."""
        return bool(self._spare)

    def make_room(self) -> bool:
        """Gives up one thing that takes memory; returns whether there was one."""
        self.release()  # recordings are of memory that may be gone now
        if not self._spare:
            return False
        name = self._spare.pop(0)
        self._given_up.append(name)
        if name == "kept_base":
            forget_dequantized(self._model)
        elif name == "kept_activations":
            recompute_activations(self._model, on=True, random=not self._recipe.padded)
        get_logger().warning("the GPU's memory ran out: something is given up that only saves time", what=name)
        return True

    def _recorded(self, device: torch.device) -> CudaGraphs:
        """What replays; made, with its largest recording, where it is not there."""
        if self._replayed is None:
            nothing = padded_sequence([Example((0,), (False,))], device)
            weight = torch.tensor(0.0, device=device)
            self._replayed = CudaGraphs(self._learn_row, (nothing.tokens, nothing.ends, weight))
            largest = padded_sequence(self._largest(), device)
            self._replayed.prepare(largest.tokens, largest.ends, weight)
        return self._replayed

    def _learn_row(self, tokens: Any, ends: Any, weight: Any, segments: tuple[Segment, ...] = ()) -> torch.Tensor:
        """The same for a padded row, in shapes that depend on those of its inputs alone.

        TRL's own head would pick out the positions that learn something, whose number the CPU would have to wait for.
        """
        base = self._model.get_base_model()
        ids, labels, positions = tokens.unbind()
        # A budget that an earlier attempt had may be larger than this one's, and then the padding.
        longest = max(self._longest, grain(ids.shape[0]))
        layout = Layout(segments, ends, ends, None, longest, longest)
        hidden = base.base_model(
            input_ids=ids[None], position_ids=positions[None], layout=layout, use_cache=False
        ).last_hidden_state[0]
        head, targets = base.get_output_embeddings(), labels.clamp(min=0)
        log_probs = ChunkedLogProbFunction.apply(
            hidden, head.weight, head.bias, targets, 1.0, VOCABULARY_CHUNK, None, 1.0, ()
        )[0]
        loss = -log_probs.masked_fill(labels == IGNORED, 0).sum() * weight
        loss.backward()
        detached: torch.Tensor = loss.detach()
        return detached
