"""One optimizer step's gradient: micro-batch by micro-batch, summed over all processes. No trainer and no TRL in it.

A step is a function of the run's seed, the step number and the process: its examples come from the batch plan, its loss
is the sum over all target tokens of the global batch divided by their number, and dropout is seeded from these three.
So no state of a random generator has to be saved for a restart, and a step can be repeated.

If a GPU's memory runs out in a step, the step is repeated with less memory: first without the optimizations that only
save time (`ExecutionPlan.droppable`), which does not change the result's bits; when none is left, with all long rows
divided over the processes where that is possible, else with half the token budget, in all processes.

A micro-batch is computed by `micro_batch`; what the host launches before it has read the step before: `launch_ahead`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch

from job.checkpoints.trainer_state import ComputationOptions
from job.common.out_of_memory import free_caches, too_small
from job.common.resources import available_bytes
from job.data.batch_plan import Steps, by_weight, weighted_targets
from job.data.examples import lengths_of
from job.distributed.processes import Processes
from job.errors import JobError
from job.log import get_logger
from job.model.fused.dropout import reseed
from job.model.packed_attention import is_packed
from job.records import Example, ExecutionPlan
from job.training.config import Hooks, Recipe, StepAbandoned, step_seed
from job.training.flat_parameters import FlatParameters
from job.training.launch_ahead import LaunchedSum, use_new_stream
from job.training.long_rows import has_long_row
from job.training.memory_fallback import unless_memory_runs_out
from job.training.memory_model import LONG_ROW
from job.training.micro_batch import MicroBatchGradient, PackedGradient, padded_at_most
from job.training.objectives import Totals, totals_of
from job.training.padded_shapes import RunShapes, Shapes, recording_tokens_of
from job.training.preference_gradient import PreferenceGradient
from job.training.resumed_shapes import resume_shapes


@dataclass(frozen=True)
class _StepTotals:
    """Figures of a whole step of preferences, on which the loss of each of its examples depends.

    Attributes:
        totals: Counts over the step's examples.
        kl: KTO's estimate of the divergence, () float32, the same in all processes; 0 for other methods.
    """

    totals: Totals
    kl: torch.Tensor


class StepGradient:
    """Computes the gradient of one optimizer step per call.

    Args:
        model: A PEFT model over a base loaded with packed attention.
        steps: The batch plan; it also says which examples this process computes.
        parameters: The adapter. The gradient is left in `parameters.gradient`.
        recipe: Only the seed, the initial token budget and label smoothing are used.
        plan: The initial execution plan.
        hooks: Only `stop`, `has_time` and `on_progress` are used.
        processes: The processes that compute the step together.
        packed_gradient: Used if the plan is not `padded`.
        preference: Used in place of `packed_gradient` for preferences (DPO, KTO, ORPO), whose loss is a mean over
            examples and not over tokens.
        scaler: torch's `GradScaler` in fp16; `packed_gradient` and `preference` multiply the loss by it themselves.
        meanwhile: Called in each step while the GPU computes the gradient; if the step is not launched at once, also
            before its gradient is launched.
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
        preference: PreferenceGradient | None = None,
        scaler: Any = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self.budget = recipe.micro_batch_tokens
        """Tokens of a micro-batch; halved when memory runs out. A resumed run continues with the budget it had."""
        self._model, self._steps, self._parameters = model, steps, parameters
        self._seed, self._hooks, self._processes = recipe.seed, hooks, processes
        self._preference, self._meanwhile = preference, meanwhile
        self._device = parameters.gradient.device
        self._shapes = RunShapes(recording_tokens_of(model), padded_at_most(plan))
        self.micro_batch = MicroBatchGradient(
            model,
            steps,
            parameters,
            recipe=recipe,
            plan=plan,
            hooks=hooks,
            processes=processes,
            packed_gradient=packed_gradient,
            shapes=self.shapes,
            scaler=scaler,
        )
        self.gradient_sum = LaunchedSum(processes, self._device)
        """The sum over the processes; `finish` has to be called before the step counts as done."""
        self._ahead = False
        """Whether the host launches this step before `meanwhile` has waited for the end of the step before."""
        self.metrics: dict[str, float] = {}
        """Metrics of the last step of preferences: TRL's name -> value."""
        self.divide_above(plan.divided_above)

    @property
    def plan(self) -> ExecutionPlan:
        """The current execution plan: the initial one, less the optimizations dropped when memory ran out."""
        return self.micro_batch.plan

    def __call__(self, number: int) -> torch.Tensor:
        """Starts to compute the gradient of step `number` (from 0), summed over all processes, in the flat parameters.

        `gradient_sum.finish` has to be called before the step counts as done.

        Returns:
            The step's loss, () float32 on the device, without history: the mean over its target tokens.

        Raises:
            StepAbandoned: The step cannot be finished.
            TrainingFailed: Memory ran out, and neither an optimization nor the token budget can be reduced further.
        """
        self._ahead = self.launched_at_once(number)
        if not self._ahead:
            self._meanwhile()
        if self._preference is None:
            return self._from_sum(self._summed(lambda: self._own_gradient(number)))[0]
        totals = totals_of(self._steps.of(number))
        kl = torch.zeros((), device=self._device)
        if self._preference.estimates_kl:
            # A separate sum over the processes, because each example's loss depends on the divergence over the step.
            kl = self._summed(lambda: self._own_kl(number, totals))[0].clamp(min=0)
            self.gradient_sum.finish()
        sums = self._from_sum(self._summed(lambda: self._own_gradient(number, _StepTotals(totals, kl))))
        self.gradient_sum.finish()
        names = self._preference.names(totals)
        self.metrics = dict(zip(names, sums[1:].tolist(), strict=True))
        return sums[0]

    def launched_at_once(self, number: int) -> bool:
        """Whether the host launches step `number` in a few milliseconds, and the GPU computes it afterwards."""
        if not self.plan.recorded or self._preference is not None or not is_packed(self._model):
            return False
        return self.plan.tile_tokens is None or not has_long_row(self._steps.of(number))

    # The part of a step that this process computes.

    def _own_gradient(self, number: int, known: _StepTotals | None = None) -> torch.Tensor:
        """Computes this process's part of a step; its gradient is also left in the flat parameters.

        Args:
            number: Number of the step, from 0.
            known: The step's totals; None for SFT, whose loss does not need them.

        Returns:
            (n,) float32, to be summed over the processes: the flat gradient (with several processes only), then the
            loss, then the metrics of a step of preferences.
        """
        seed = step_seed(self._seed, number, self._processes.place.rank)
        torch.manual_seed(seed)
        self._parameters.clear()
        metrics = 0 if known is None or self._preference is None else len(self._preference.names(known.totals))
        sums = torch.zeros(1 + metrics, device=self._device)
        items = weighted_targets(self._steps.of(number))
        self.micro_batch.begin_step()
        sequences = count()
        if divided := [example for example in self._steps.divided(number) if example.weight]:
            with self.micro_batch.together():
                for example in divided:
                    sums += self.micro_batch([example], items if example.weight == 1 else items / example.weight)
        for group in self._groups(number):
            # Each loss is added before the next micro-batch: a CUDA graph's next launch overwrites what it returned.
            if known is None or self._preference is None:
                # Only rows of equal weight are computed together, because the weight is part of the divisor.
                for part, weight in by_weight(group):
                    reseed(self._model, seed, next(sequences))
                    sums += self.micro_batch(part, items if weight == 1 else items / weight)
            else:
                reseed(self._model, seed, next(sequences))
                sums += self._preference(group, known.totals, known.kl)
        if known is None:
            self._lay_out(number + 1)
        # One tensor, so that the processes sum in one all-reduce.
        return sums if self._processes.place.world_size == 1 else self._parameters.gradient_and(sums)

    def _own_kl(self, number: int, totals: Totals) -> torch.Tensor:
        """This process's part of KTO's estimate of the divergence, (1,) float32."""
        seed = step_seed(self._seed, number, self._processes.place.rank)
        torch.manual_seed(seed)
        kl = torch.zeros(1, device=self._device)
        if self._preference is not None:
            for index, group in enumerate(self._groups(number)):
                reseed(self._model, seed, index)
                kl += self._preference.kl(group, totals)
        return kl

    def _groups(self, number: int) -> Iterator[list[Example]]:
        """This process's micro-batches of a step.

        Raises:
            StepAbandoned: There is no time for the rest.
        """
        groups = self._steps.micro_batches(number, self.budget)
        for done, group in enumerate(groups):
            if self._hooks.stop() and not self._hooks.has_time(1 - done / len(groups)):
                raise StepAbandoned
            yield group

    def _lay_out(self, number: int) -> None:
        """Lays out the first sequence of a step while the GPU still computes the step before."""
        if number < self._steps.total and self.micro_batch.pads:
            groups = self._steps.micro_batches(number, self.budget)
            if parts := by_weight(groups[0]) if groups else []:
                self.micro_batch.lay_out(parts[0][0])

    # The sum over the processes; if memory runs out in any of them, all compute the step again with less.

    def _summed(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Starts the sum over all processes of the results of `compute`, (n,) float32, and returns it.

        If memory runs out in any process, all processes call `compute` again with less memory. Work that is launched on
        the GPU afterwards waits for the sum; the host waits in `gradient_sum.finish`.

        With several processes the result begins with the flat gradient, so that one all-reduce sums everything.

        Raises:
            StepAbandoned: Another process has ended, or there is no time for the step.
            TrainingFailed: Memory ran out, and nothing is left to reduce.
        """
        while True:
            sums, full = unless_memory_runs_out(self._model, compute, self._check_less_is_possible)
            self._call_meanwhile()
            try:
                if not self._processes.agree(repeat=sums is None) and sums is not None:
                    self.gradient_sum.start(sums)
                    return sums
                # If a process ran out of memory and has no optimization left to drop, all of them take less.
                if self._processes.agree(repeat=full and not self.micro_batch.free_memory()):
                    self._divide_or_halve()
            except JobError as error:
                use_new_stream(self._device)
                raise StepAbandoned from error
            free_caches()

    def _from_sum(self, sums: torch.Tensor) -> torch.Tensor:
        """A copy of what follows the gradient in `sums`: the loss, then metrics. The gradient was summed in place."""
        return sums if self._processes.place.world_size == 1 else sums[self._parameters.gradient.shape[0] :].clone()

    def _call_meanwhile(self) -> None:
        """Calls `meanwhile`, which waits for the end of the step before; the GPU then begins to compute this step.

        Raises:
            StepAbandoned: There is no time for this step, which was launched before the host knew that.
        """
        self._meanwhile()
        if self._ahead and self._hooks.stop() and not self._hooks.has_time(1.0):
            use_new_stream(self._device)
            raise StepAbandoned

    def _check_less_is_possible(self, error: RuntimeError) -> None:
        """Called when memory ran out in this process.

        Raises:
            TrainingFailed: No optimization is left to drop, no row to divide, and the micro-batch had a single row.
        """
        longest = self.micro_batch.longest_undivided(lengths_of(self._steps.examples))
        if self.budget <= longest // 2 and not self.plan.droppable and not self._may_divide:
            where, free = self._hooks.place_of(longest), available_bytes()
            raise too_small("training", longest, error, where, free_bytes=free) from error

    def _divide_or_halve(self) -> None:
        """Divides all long rows over the processes where that is possible, else halves the token budget; says so."""
        if self._may_divide:
            self.divide_above(LONG_ROW)
            message = "out of memory: all long rows are divided over the processes from now on"
            change = "GPUs with more memory, or a smaller JOB_TRAIN__MAX_LENGTH"
            get_logger().warning(message, longer_than=LONG_ROW, change=change)
            return
        self.budget //= 2
        message = "out of memory: micro-batches have half as many tokens from now on, which is slower"
        get_logger().warning(message, micro_batch_tokens=self.budget, change="JOB_TRAIN__MICRO_BATCH_TOKENS")

    # Long rows that all processes compute together (sequence parallelism).

    @property
    def divided_above(self) -> int | None:
        """All processes compute a row of more tokens than this together; None if no row is divided."""
        return self._steps.divided_above

    def divide_above(self, tokens: int | None) -> None:
        """Sets `divided_above`; lowered when memory runs out, and set to the checkpoint's value on resume.

        Has no effect unless the plan computes long rows layer by layer: otherwise each process would compute all of a
        divided row, and its gradient would be counted once per process.
        """
        if tokens is not None:
            tokens = max(tokens, LONG_ROW) if self.plan.padded and self.plan.tile_tokens is not None else None
        self._steps = replace(self._steps, divided_above=tokens)

    @property
    def _may_divide(self) -> bool:
        """Whether there is a long row that one process computes alone, and that all processes could divide."""
        if self.divided_above is None or self.divided_above <= LONG_ROW:
            return False
        return any(LONG_ROW < length <= self.divided_above for length in lengths_of(self._steps.examples))

    # What a checkpoint records about how its gradients were computed.

    def shapes(self) -> Shapes:
        """The shapes to which packed sequences are padded with the present token budget, the same in all processes."""
        return self._shapes.of(self._steps, self.budget)

    def computation_options(self) -> ComputationOptions:
        """What a checkpoint records about how its gradients were computed."""
        padded = list(self.shapes().shapes) if self.plan.padded else None
        return ComputationOptions(
            self.plan.forward, self.plan.tile_tokens, self._steps.world_size, padded, self.divided_above
        )

    def resume_as(self, before: ComputationOptions | None) -> None:
        """Takes over a checkpoint's padding and its limit for divided rows; warns where this attempt has to differ.

        To be called after the token budget was set to the checkpoint's.

        Args:
            before: What the checkpoint recorded; None in checkpoints of older versions, which did not record it.
        """
        if before is not None and None not in {self.divided_above, before.divided_above}:
            self.divide_above(before.divided_above)
        resume_shapes(self._shapes, before, plan=self.plan, steps=self._steps, budget=self.budget)
