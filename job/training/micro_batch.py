"""The gradient of one micro-batch, computed as the execution plan says. No trainer and no TRL in it.

A micro-batch goes through the model in one of four ways:

- one example at a time, where the model's sequences are not packed (`model.packing_check`);
- as one packed sequence, with the loss that the trainer passes in;
- as a packed sequence that is padded to one of few shapes, by the fused layers, perhaps launched as a CUDA graph
  (`padded_gradient`);
- layer by layer, if it has a long row (`long_rows`), which all processes may compute together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from job.common.out_of_memory import free_caches
from job.data.batch_plan import Steps
from job.distributed.processes import Processes
from job.model.fused.sequence_parallel import SequenceParallelGroup
from job.model.packed_attention import is_packed
from job.model.placed_weights import computing_together
from job.records import Example, ExecutionPlan
from job.training.config import Hooks, Recipe, StepAbandoned
from job.training.flat_parameters import FlatParameters
from job.training.lm_head_loss import Logits, head_loss, logits_of
from job.training.long_rows import LongRows, has_long_row
from job.training.memory_fallback import drop_optimization
from job.training.memory_model import LONG_ROW
from job.training.packing import PaddedSequence, alone_inputs, packed_inputs, padded_sequence
from job.training.padded_gradient import PaddedGradient
from job.training.padded_shapes import Shapes, longest_segment

PackedGradient = Callable[[dict[str, Any], float], torch.Tensor]
"""Adds a micro-batch's gradient to the parameters', and returns its part of the loss, () float32, without history.

Its arguments are the result of `packed_inputs`, or of `alone_inputs` if the model's sequences are not packed, and the
divisor of the summed loss: the target tokens of the whole step (`batch_plan.weighted_targets` if rows have weights).
"""


@dataclass(frozen=True)
class _LaidOut:
    """A padded sequence that was laid out in advance, and the examples and shapes it was made of."""

    examples: Sequence[Example]
    shapes: Shapes
    sequence: PaddedSequence


class MicroBatchGradient:
    """Called with a micro-batch's examples, adds the gradient of their loss to that of the flat parameters.

    Args:
        model: A PEFT model over a base loaded with packed attention.
        steps: The batch plan; only its examples and the number of processes are used.
        parameters: The adapter, to whose gradient this adds.
        recipe: Only the initial token budget and label smoothing are used.
        plan: The initial execution plan.
        hooks: Only `stop`, `has_time` and `on_progress` are used.
        processes: The processes that compute divided rows together.
        packed_gradient: Used if the plan is not `padded`.
        shapes: Returns the shapes to which packed sequences are padded at present.
        scaler: torch's `GradScaler` in fp16; `packed_gradient` multiplies the loss by it itself.
    """

    def __init__(
        self,
        model: Any,
        steps: Steps,
        parameters: FlatParameters,
        *,
        recipe: Recipe,
        plan: ExecutionPlan,
        hooks: Hooks,
        processes: Processes,
        packed_gradient: PackedGradient,
        shapes: Callable[[], Shapes],
        scaler: Any = None,
    ) -> None:
        self.plan = plan
        """The current plan: the initial one, less the optimizations dropped when memory ran out."""
        self._model, self._hooks, self._processes = model, hooks, processes
        self._device = parameters.gradient.device
        self._packed_gradient, self._shapes, self._scaler = packed_gradient, shapes, scaler
        self._loss_scale: torch.Tensor | None = None
        """() float32; None without fp16's loss scaling."""
        self._laid_out: _LaidOut | None = None
        self._was_long = False
        """Whether the last micro-batch was computed layer by layer (`LongRows`)."""
        self._sp_group: SequenceParallelGroup | None = None
        """Set while all processes compute a row together."""
        self._padded_at_most = padded_at_most(plan)
        base = model.get_base_model()
        loss = head_loss(base, recipe.label_smoothing, logits_of(base) if plan.padded else Logits())
        self._padded = PaddedGradient(
            model,
            parameters,
            loss,
            shapes=shapes,
            longest=longest_segment(steps.examples, recipe.micro_batch_tokens, self._padded_at_most),
            record_all=steps.world_size > 1,
        )
        self._long_rows = LongRows(model, loss, self._check, hooks.on_progress)

    def begin_step(self) -> None:
        """Reads the loss scale of fp16's scaler; called before a step's first micro-batch.

        It stays on the GPU, since the host would have to wait for it. It is read by scaling a 1, because the scaler
        unscales gradients only if it has scaled something in the same step.
        """
        enabled = self._scaler is not None and self._scaler.is_enabled()
        self._loss_scale = self._scaler.scale(torch.ones((), device=self._device)) if enabled else None

    def __call__(self, examples: Sequence[Example], targets: float) -> torch.Tensor:
        """Adds the gradient of the examples' summed loss divided by `targets`.

        Returns:
            That loss, () float32, without history. The next call may overwrite it.

        Raises:
            StepAbandoned: The job has to stop, and the time left is too short for the step with this long row.
            OtherOutOfMemory: Memory ran out in another process, within `together`.
        """
        if not is_packed(self._model):
            parts = [self._packed_gradient(alone_inputs(example, self._device), targets) for example in examples]
            return torch.stack(parts).sum()
        if not self.plan.padded:
            return self._packed_gradient(packed_inputs(examples, self._device), targets)
        # A tensor, not a number: a CUDA graph would always use the number with which it was recorded.
        # Filled on the GPU: a copy from the host would wait for it.
        weight = torch.full((), 1 / targets, device=self._device)
        if self._loss_scale is not None:
            weight = weight * self._loss_scale
        loss = self._fused(examples, weight)
        # The factor is a power of two, so multiplying and dividing by it change no bit.
        return loss if self._loss_scale is None else loss / self._loss_scale

    def _fused(self, examples: Sequence[Example], weight: torch.Tensor) -> torch.Tensor:
        """Adds the gradient for a padded plan; returns `weight`, () float32, times the summed loss, () float32."""
        if self._note_long(examples):
            return self._long_rows.gradient(examples, weight, self.plan, self._sp_group)
        loss = self._padded(self._sequence(examples), weight, recorded=self.plan.recorded)
        if self.plan.recorded and not self._padded.recordable:
            self.plan = self.plan.give_up("recorded")
            self.release()
            free_caches()  # the memory of the graphs
        return loss

    def summed_loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """The summed loss of a micro-batch, () float32, without a gradient; for a padded plan."""
        if self._note_long(examples):
            return self._long_rows.summed_loss(examples, self.plan, self._sp_group)
        return self._padded.summed_loss(padded_sequence(examples, self._device))

    @property
    def pads(self) -> bool:
        """Whether packed sequences without a long row are padded."""
        return self.plan.padded and is_packed(self._model)

    def lay_out(self, examples: Sequence[Example]) -> None:
        """Lays out the sequence of a later micro-batch where sequences are padded, while the GPU still computes."""
        if self.pads and not self._is_long(examples):
            shapes = self._shapes()
            self._laid_out = _LaidOut(examples, shapes, padded_sequence(examples, self._device, shapes))

    def _sequence(self, examples: Sequence[Example]) -> PaddedSequence:
        """The padded sequence of a micro-batch: the one laid out in advance, if it has these examples and shapes."""
        ready, self._laid_out = self._laid_out, None
        shapes = self._shapes()
        if ready is not None and ready.shapes is shapes and ready.examples == examples:
            return ready.sequence
        return padded_sequence(examples, self._device, shapes)

    def _is_long(self, examples: Sequence[Example]) -> bool:
        """Whether a micro-batch is computed layer by layer."""
        return self.plan.tile_tokens is not None and has_long_row(examples)

    def _note_long(self, examples: Sequence[Example]) -> bool:
        """As `_is_long`, for the micro-batch that is computed now; remembered for `longest_undivided`."""
        self._was_long = self._is_long(examples)
        return self._was_long

    def _check(self) -> None:
        """Called before each layer of a long row, which may take minutes: reports progress, and checks the stop flag.

        Raises:
            StepAbandoned: The job has to stop, and the time left is too short for a whole step.
        """
        self._hooks.on_progress()
        if self._hooks.stop() and not self._hooks.has_time(1.0):
            raise StepAbandoned

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context manager in which all processes compute the same long rows, each a part of the tokens of every row.

        To be used within `taking_part`.

        Raises:
            JobError: Another process has ended.
            OtherOutOfMemory: Memory ran out in another process.
        """
        with computing_together(self._model, self._processes) as barrier:
            self._sp_group = SequenceParallelGroup(self._processes, barrier)
            try:
                yield
            finally:
                self._sp_group = None

    def longest_undivided(self, lengths: Sequence[int]) -> int:
        """Tokens of the longest row that may have made up the micro-batch that ran out of memory.

        A smaller token budget cannot make a micro-batch smaller than one row. Rows of more than `LONG_ROW` tokens count
        only if that micro-batch was computed layer by layer; otherwise it consisted of shorter rows.

        Args:
            lengths: Tokens of each row.
        """
        if self._padded_at_most is None or self._was_long:
            return max(lengths)
        return max((length for length in lengths if length <= self._padded_at_most), default=max(lengths))

    def free_memory(self) -> bool:
        """Drops one optimization that takes memory and only saves time; returns whether there was one."""
        self.release()  # graphs write to fixed addresses, in memory that is freed now
        if not self.plan.droppable:
            return False
        self.plan = drop_optimization(self._model, self.plan)
        return True

    def release(self) -> None:
        """Frees CUDA graphs with their memory, and buffers in host memory; both are created anew when needed."""
        self._padded.release()
        self._long_rows.release()


def padded_at_most(plan: ExecutionPlan) -> int | None:
    """The most tokens of an example in a padded sequence (a longer one is a long row); None if there is no limit."""
    return None if plan.tile_tokens is None else LONG_ROW
