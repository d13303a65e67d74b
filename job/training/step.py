"""One optimizer step's gradient: micro-batch by micro-batch, summed over all processes. No trainer and no TRL in it.

A step is a function of the run's seed, the step number and the process: its examples come from the batch plan, its loss
is the sum over all target tokens of the global batch divided by their number, and dropout is seeded from these three.
So no state of a random generator has to be saved for a restart, and a step can be repeated.

If a GPU's memory runs out in a step, the step is repeated with less memory: first without the optimizations that only
save time (`ExecutionPlan.droppable`), which does not change the result's bits; when none is left, with half the token
budget, in all processes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from job.common.out_of_memory import out_of_memory
from job.data.batch_plan import Steps, targets_of
from job.distributed.processes import Processes
from job.errors import JobError, TrainingFailed
from job.log import get_logger
from job.model.base import recompute_activations
from job.model.fused.frozen_weights import forget_dequantized
from job.model.packed_attention import Layout, Segment, is_packed
from job.records import Example, ExecutionPlan
from job.training.config import Hooks, Recipe, step_seed
from job.training.cuda_graphs import CudaGraphs
from job.training.flat_parameters import FlatParameters
from job.training.lm_head_loss import padded_loss
from job.training.packing import alone_inputs, length_increment, longest_segment, packed_inputs, padded_sequence

PackedGradient = Callable[[dict[str, Any], int], torch.Tensor]
"""Adds a micro-batch's gradient to the parameters', and returns its part of the loss, () float32, without history.

It gets what `packed_inputs` makes, or `alone_inputs` where the model is not used packed, and the target tokens of the
whole step, by which the summed loss is divided.
"""


class StepAbandoned(Exception):
    """The current step cannot be finished; parameters and optimizer are unchanged since the step before.

    Either there is no time to finish it, or another process has ended, whose error is then `__cause__`.
    """


class OptimizerStep:
    """Computes the gradient of one optimizer step per call.

    Args:
        model: A PEFT model over a base loaded with packed attention.
        steps: The batch plan, and which share of it is this process's.
        parameters: The adapter. The gradient is left in `parameters.gradient`.
        recipe: Only the seed and the initial token budget are used.
        plan: The initial execution plan.
        hooks: Only `stop` and `fits` are used.
        processes: The processes that share the step.
        packed_gradient: Used if the plan is not `padded`.
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
    ) -> None:
        self.budget = recipe.micro_batch_tokens
        """Tokens of a micro-batch; halved when memory runs out. A resumed run continues with the budget it had."""
        self.plan = plan
        self._model, self._steps, self._parameters = model, steps, parameters
        self._seed, self._hooks, self._processes = recipe.seed, hooks, processes
        self._packed_gradient = packed_gradient
        self._longest = longest_segment(steps.examples, recipe.micro_batch_tokens)
        self._graphs: CudaGraphs | None = None

    def __call__(self, number: int) -> torch.Tensor:
        """Leaves the gradient of step `number` (from 0), summed over all processes, in the flat parameters.

        Returns:
            The step's loss, () float32 on the device, without history: the mean over its target tokens.

        Raises:
            StepAbandoned: The step cannot be finished.
            TrainingFailed: Memory ran out, and neither an optimization nor the token budget can be reduced further.
        """
        while True:
            sums = None
            try:
                sums = self._to_sum(self._own_gradient(number))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                longest = max(len(example.input_ids) for example in self._steps.examples)
                if self.budget <= longest // 2 and not self.plan.droppable:
                    raise TrainingFailed(_too_small(longest, error)) from error
            try:
                if not self._processes.agree(repeat=sums is None):
                    self._processes.add_up(sums)
                    return self._from_sum(sums)
                # If a process ran out of memory and has no optimization left to drop, all of them halve the budget.
                if self._processes.agree(repeat=sums is None and not self.free_memory()):
                    self.budget //= 2
            except JobError as error:
                raise StepAbandoned from error
            gc.collect()  # the caught error's frames keep tensors alive in reference cycles
            torch.cuda.empty_cache()

    def release(self) -> None:
        """Frees the CUDA graphs and their memory; they are recorded again when they are needed."""
        self._graphs = None

    def _own_gradient(self, number: int) -> torch.Tensor:
        """This process's part of the gradient, left in the flat parameters, and of the loss, () float32."""
        torch.manual_seed(step_seed(self._seed, number, self._processes.place.rank))
        self._parameters.clear()
        loss = torch.zeros((), device=self._parameters.gradient.device)
        targets = targets_of(self._steps.of(number))
        groups = self._steps.micro_batches(number, self.budget)
        for done, group in enumerate(groups):
            if self._hooks.stop() and not self._hooks.fits(1 - done / len(groups)):
                raise StepAbandoned
            # Added at once: what a CUDA graph returns is overwritten by its next launch.
            loss += self._micro_batch(group, targets)
        return loss

    def _to_sum(self, loss: torch.Tensor) -> torch.Tensor:
        """The tensor to sum over the processes in one all-reduce: the flat gradient, followed by the loss."""
        alone = self._processes.place.world_size == 1
        return loss.reshape(1) if alone else torch.cat([self._parameters.gradient, loss.reshape(1)])

    def _from_sum(self, sums: Any) -> torch.Tensor:
        """Copies the summed gradient into the flat parameters, and returns the loss."""
        if self._processes.place.world_size > 1:
            # In place: the optimizer's `.grad` and the parameters' are views of this memory.
            self._parameters.gradient.copy_(sums[:-1])
        loss: torch.Tensor = sums[-1]
        return loss

    def _micro_batch(self, examples: Sequence[Example], targets: int) -> torch.Tensor:
        """Adds the gradient of the examples' summed loss divided by `targets`; returns that loss, () float32."""
        device = self._parameters.gradient.device
        if not is_packed(self._model):
            parts = [self._packed_gradient(alone_inputs(example, device), targets) for example in examples]
            return torch.stack(parts).sum()
        if not self.plan.padded:
            return self._packed_gradient(packed_inputs(examples, device), targets)
        sequence = padded_sequence(examples, device)
        # A tensor, not a number: a CUDA graph would always use the number with which it was recorded.
        weight = torch.tensor(1 / targets, device=device)
        if not self.plan.recorded:
            return self._padded_gradient(sequence.tokens, sequence.ends, weight, segments=sequence.segments)
        graphs = self._recorded(device)
        loss = graphs(sequence.tokens, sequence.ends, weight)
        if not graphs.possible:
            self.plan = self.plan.give_up("recorded")
            self.release()
        return loss

    def _padded_gradient(
        self, tokens: torch.Tensor, ends: torch.Tensor, weight: torch.Tensor, segments: tuple[Segment, ...] = ()
    ) -> torch.Tensor:
        """The same for a padded sequence. Fulfils the requirements of `CudaGraphs` on its `work`.

        Args:
            tokens: (3, length) int64, `PaddedSequence.tokens`.
            ends: (segments + 1,) int32, `PaddedSequence.ends`.
            weight: () float32: what the summed loss is multiplied by.
            segments: Used where attention is computed segment by segment; empty in a CUDA graph, which must not depend
                on their number.
        """
        loss = self.padded_sum(tokens, ends, segments) * weight
        loss.backward()  # type: ignore[no-untyped-call] # adds to the flat gradient in place
        return loss.detach()

    def padded_sum(self, tokens: torch.Tensor, ends: torch.Tensor, segments: tuple[Segment, ...] = ()) -> torch.Tensor:
        """The summed loss of a padded sequence, () float32; arguments as for its gradient."""
        base = self._model.get_base_model()
        ids, labels, positions = tokens.unbind()
        # An earlier attempt may have had a larger budget, and so a longer padding, than this one's.
        longest = max(
            self._longest, length_increment(ids.shape[0]), *(segment.end - segment.start for segment in segments), 0
        )
        layout = Layout(segments, ends, ends, None, longest, longest)
        hidden = base.base_model(
            input_ids=ids[None], position_ids=positions[None], layout=layout, use_cache=False
        ).last_hidden_state[0]
        return padded_loss(hidden, base.get_output_embeddings(), labels)

    def _recorded(self, device: torch.device) -> CudaGraphs:
        """The CUDA graphs. If there are none yet, that of the largest micro-batch of this process is recorded first.

        All graphs share one memory pool, so the memory of the largest graph serves the smaller ones, too.
        """
        if self._graphs is None:
            first = padded_sequence([Example((0,), (False,))], device)
            weight = torch.tensor(0.0, device=device)
            self._graphs = CudaGraphs(self._padded_gradient, (first.tokens, first.ends, weight))
            largest = padded_sequence(self._steps.largest(self.budget), device)
            self._graphs.prepare(largest.tokens, largest.ends, weight)
        return self._graphs

    def free_memory(self) -> bool:
        """Drops one optimization that takes memory and only saves time; returns whether there was one."""
        self.release()  # graphs write to fixed addresses, in memory that is freed now
        if not self.plan.droppable:
            return False
        name = self.plan.droppable[0]
        self.plan = self.plan.give_up(name)
        if name == "kept_base":
            forget_dequantized(self._model)
        elif name == "kept_activations":
            recompute_activations(self._model, on=True, random=not self.plan.padded)
        get_logger().warning("the GPU's memory ran out: something is given up that only saves time", what=name)
        return True


def _too_small(longest: int, error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0][:200]
    return (
        f"memory ran out in training with one example at a time, the longest of {longest} tokens; lower "
        f"JOB_TRAIN__MAX_LENGTH or JOB_LORA__RANK, or take a GPU with more memory ({first})"
    )
