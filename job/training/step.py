"""One optimizer step's gradient: micro-batch by micro-batch, summed over all processes. No trainer and no TRL in it.

A step is a function of the run's seed, the step number and the process: its examples come from the batch plan, its loss
is the sum over all target tokens of the global batch divided by their number, and dropout is seeded from these three.
So no state of a random generator has to be saved for a restart, and a step can be repeated.

If a GPU's memory runs out in a step, the step is repeated with less memory: first without the optimizations that only
save time (`ExecutionPlan.droppable`), which does not change the result's bits; when none is left, with half the token
budget, in all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch

from job.checkpoints.trainer_state import HowComputed
from job.common.out_of_memory import free_caches, out_of_memory, too_small
from job.data.batch_plan import Steps, by_weight, weighted_targets
from job.data.examples import lengths_of
from job.distributed.processes import Processes
from job.errors import JobError
from job.log import get_logger
from job.model.fused.dropout import reseed
from job.model.fused.sequence_parallel import SequenceParallelGroup
from job.model.packed_attention import is_packed
from job.model.placed_weights import OtherOutOfMemory, computing_together, taking_part
from job.records import Example, ExecutionPlan
from job.training.config import Hooks, Recipe, step_seed
from job.training.flat_parameters import FlatParameters
from job.training.free_memory import drop_optimization
from job.training.lm_head_loss import Logits, head_loss, logits_of
from job.training.long_rows import LongRows, has_long_row
from job.training.memory_model import LONG_ROW
from job.training.objectives import Totals, totals_of
from job.training.packing import PaddedSequence, alone_inputs, packed_inputs, padded_sequence
from job.training.padded_gradient import PaddedGradient
from job.training.padded_shapes import RunShapes, Shapes, longest_segment, recording_tokens_of
from job.training.preference_gradient import PreferenceGradient
from job.training.resume import resume_shapes

PackedGradient = Callable[[dict[str, Any], float], torch.Tensor]
"""Adds a micro-batch's gradient to the parameters', and returns its part of the loss, () float32, without history.

It gets what `packed_inputs` makes, or `alone_inputs` where the model is not used packed, and the target tokens of the
whole step, by which the summed loss is divided; see `batch_plan.weighted_targets` where rows have weights.
"""


@dataclass(frozen=True)
class _LaidOut:
    """A padded sequence that was laid out before its step, and what it was made of."""

    examples: Sequence[Example]
    shapes: Shapes
    sequence: PaddedSequence


@dataclass(frozen=True)
class _StepTotals:
    """What the loss of every example needs to know of a whole step of preferences.

    Attributes:
        totals: Counts over the step's examples.
        kl: KTO's estimate of the divergence, () float32, the same in all processes; 0 for other methods.
    """

    totals: Totals
    kl: torch.Tensor


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
        recipe: Only the seed, the initial token budget and label smoothing are used.
        plan: The initial execution plan.
        hooks: Only `stop`, `fits` and `on_progress` are used.
        processes: The processes that share the step.
        packed_gradient: Used if the plan is not `padded`.
        preference: Used in place of `packed_gradient` for preferences (DPO, KTO, ORPO), whose loss is a mean over
            examples and not over tokens.
        scaler: torch's `GradScaler` in fp16; both functions above scale by it themselves.
        meanwhile: Called once a step, while the GPU computes its gradient; before that where launching it takes long.
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
        self.plan = plan
        self._model, self._steps, self._parameters = model, steps, parameters
        self._seed, self._hooks, self._processes = recipe.seed, hooks, processes
        self._packed_gradient, self._preference, self._meanwhile = packed_gradient, preference, meanwhile
        self._scaler = scaler
        self._loss_scale: torch.Tensor | None = None
        self._wait_for_sum: Callable[[], None] = lambda: None
        self._ahead = False
        """Whether the host has launched this step, of which the GPU has computed nothing when `meanwhile` returns."""
        self._behind_sum: Any = None
        """The CUDA event behind the last sum over processes; None on a CPU."""
        self.metrics: dict[str, float] = {}
        """Metrics of the last step of preferences, by TRL's names."""
        self._padded_at_most = None if plan.tile_tokens is None else LONG_ROW
        """Tokens of the longest example that goes into a padded sequence; None where any may."""
        self._was_long = False
        """Whether the last micro-batch was computed layer by layer (`LongRows`)."""
        self._sp_group: SequenceParallelGroup | None = None
        """Set while all processes compute a row together."""
        self._laid_out: _LaidOut | None = None
        """The first sequence of the next step."""
        self._shapes = RunShapes(recording_tokens_of(model), self._padded_at_most)
        base = model.get_base_model()
        loss = head_loss(base, recipe.label_smoothing, logits_of(base) if plan.padded else Logits())
        self._padded = PaddedGradient(
            model,
            parameters,
            loss,
            shapes=self.shapes,
            longest=longest_segment(steps.examples, recipe.micro_batch_tokens, self._padded_at_most),
            record_all=steps.world_size > 1,
        )
        self._long_rows = LongRows(model, loss, self._check, hooks.on_progress)
        self.divide_above(plan.divided_above)

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

    def __call__(self, number: int) -> torch.Tensor:
        """Starts to compute the gradient of step `number` (from 0), summed over all processes, in the flat parameters.

        `finish_sum` has to be called before the step counts as done.

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
        kl = torch.zeros((), device=self._parameters.gradient.device)
        if self._preference.estimates_kl:
            # Its own sum over the processes: the loss of every example depends on the divergence over the whole step.
            kl = self._summed(lambda: self._own_kl(number, totals))[0].clamp(min=0)
            self.finish_sum()
        found = self._from_sum(self._summed(lambda: self._own_gradient(number, _StepTotals(totals, kl))))
        self.finish_sum()
        names = self._preference.names(totals)
        self.metrics = dict(zip(names, found[1:].tolist(), strict=True))
        return found[0]

    def launched_at_once(self, number: int) -> bool:
        """Whether the host launches step `number` in a few milliseconds, and the GPU computes it afterwards."""
        if not self.plan.recorded or self._preference is not None or not is_packed(self._model):
            return False
        return self.plan.tile_tokens is None or not has_long_row(self._steps.of(number))

    def finish_sum(self) -> None:
        """Waits until the gradient is summed over all processes.

        On a GPU the host launches the sum, and clipping and the optimizer's step behind it, without waiting. If another
        process is lost, the sum never ends, and neither do they begin: the parameters are those of the step before.

        Raises:
            StepAbandoned: Another process has ended.
        """
        try:
            self._wait_for_sum()
        except JobError as error:
            self._leave_stream()
            raise StepAbandoned from error

    def _leave_stream(self) -> None:
        """Launches everything from now on, such as the copies for a checkpoint, beside what was launched so far.

        That is the gradient of an abandoned step, or waits for a sum that never comes. The step before has ended: its
        metrics were read.
        """
        if self._parameters.gradient.is_cuda:
            torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]

    def sum_has_come(self) -> bool:
        """Whether the last sum has come, although `finish_sum` failed: what is launched behind it may have begun.

        Another process may tell that it ends, and its GPU still complete what it has launched.
        """
        return self._behind_sum is not None and bool(self._behind_sum.query())

    def _summed(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Starts to sum over all processes what `compute` returns, (n,) float32; with less memory again if it ran out.

        What is launched on the GPU afterwards waits for the sum; the host waits in `finish_sum`.

        With several processes `compute` puts the flat gradient in front, so that one all-reduce sums both.

        Raises:
            StepAbandoned: Another process has ended, or there is no time for the step.
            TrainingFailed: Memory ran out, and nothing is left to reduce.
        """
        while True:
            sums, full = None, False
            try:
                with taking_part(self._model):
                    sums = compute()
            except JobError as error:  # another process has ended while weights were gathered
                raise StepAbandoned from error
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                full = not isinstance(error, OtherOutOfMemory)
                longest = self.longest_undivided(lengths_of(self._steps.examples))
                if full and self.budget <= longest // 2 and not self.plan.droppable and not self._may_divide:
                    raise too_small("training", longest, error) from error
            self._call_meanwhile()
            try:
                if not self._processes.agree(repeat=sums is None) and sums is not None:
                    self._wait_for_sum = self._processes.start_add_up(sums)
                    self._behind_sum = torch.cuda.current_stream().record_event() if sums.is_cuda else None
                    return sums
                # If a process ran out of memory and has no optimization left to drop, all of them halve the budget,
                # once all long rows are divided.
                if self._processes.agree(repeat=full and not self.free_memory()):
                    if self._may_divide:
                        self.divide_above(LONG_ROW)
                        what = "out of GPU memory: all long rows are divided over the processes from now on"
                        change = "GPUs with more memory, or a smaller JOB_TRAIN__MAX_LENGTH"
                        get_logger().warning(what, longer_than=LONG_ROW, change=change)
                    else:
                        self.budget //= 2
                        what = "out of GPU memory: micro-batches have half as many tokens from now on, which is slower"
                        how = {"micro_batch_tokens": self.budget, "change": "JOB_TRAIN__MICRO_BATCH_TOKENS"}
                        get_logger().warning(what, **how)
            except JobError as error:
                self._leave_stream()
                raise StepAbandoned from error
            free_caches()

    def _call_meanwhile(self) -> None:
        """Calls `meanwhile`, after which the GPU has ended the step before, and has this one still to compute.

        Raises:
            StepAbandoned: There is no time for it. It was launched when the end of the step before was still to come.
        """
        self._meanwhile()
        if self._ahead and self._hooks.stop() and not self._hooks.fits(1.0):
            self._leave_stream()
            raise StepAbandoned

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

    @property
    def _may_divide(self) -> bool:
        """Whether a long row is still computed by one process, which all processes could divide."""
        if self.divided_above is None or self.divided_above <= LONG_ROW:
            return False
        return any(LONG_ROW < length <= self.divided_above for length in lengths_of(self._steps.examples))

    def release(self) -> None:
        """Frees CUDA graphs with their memory, and buffers in host memory; both are created anew when needed."""
        self._padded.release()
        self._long_rows.release()

    def _own_gradient(self, number: int, known: _StepTotals | None = None) -> torch.Tensor:
        """Computes this process's part of a step; its gradient is also left in the flat parameters.

        Args:
            number: The step's, from 0.
            known: For a step of preferences.

        Returns:
            (n,) float32, to be summed over the processes: with several processes the flat gradient; the loss; for a
            step of preferences its metrics.
        """
        seed = step_seed(self._seed, number, self._processes.place.rank)
        torch.manual_seed(seed)
        self._parameters.clear()
        metrics = 0 if known is None or self._preference is None else len(self._preference.names(known.totals))
        found = torch.zeros(1 + metrics, device=self._parameters.gradient.device)
        items = weighted_targets(self._steps.of(number))
        self._loss_scale = self._scaler_factor(found.device)
        sequences = count()
        if divided := [example for example in self._steps.divided(number) if example.weight]:
            with self.together():
                for example in divided:
                    found += self._micro_batch([example], items if example.weight == 1 else items / example.weight)
        for group in self._groups(number):
            # Each loss is added before the next micro-batch: a CUDA graph's next launch overwrites what it returned.
            if known is None or self._preference is None:
                # Rows of another weight go through the model by themselves: the weight is part of the divisor.
                for part, weight in by_weight(group):
                    reseed(self._model, seed, next(sequences))
                    found += self._micro_batch(part, items if weight == 1 else items / weight)
            else:
                reseed(self._model, seed, next(sequences))
                found += self._preference(group, known.totals, known.kl)
        if known is None:
            self._lay_out(number + 1)
        # One tensor, so that the processes sum in one all-reduce.
        return found if self._processes.place.world_size == 1 else self._parameters.gradient_and(found)

    def _lay_out(self, number: int) -> None:
        """Lays out the first sequence of a step while the GPU still computes the one before, which it is behind."""
        if number >= self._steps.total or not self.plan.padded or not is_packed(self._model):
            return
        groups = self._steps.micro_batches(number, self.budget)
        parts = by_weight(groups[0]) if groups else []
        if parts and not (self.plan.tile_tokens is not None and has_long_row(parts[0][0])):
            sequence = padded_sequence(parts[0][0], self._parameters.gradient.device, self.shapes())
            self._laid_out = _LaidOut(parts[0][0], self.shapes(), sequence)

    def _sequence(self, examples: Sequence[Example], device: torch.device) -> PaddedSequence:
        """The padded sequence of a micro-batch."""
        ready, self._laid_out = self._laid_out, None
        if ready is not None and ready.shapes is self.shapes() and ready.examples == examples:
            return ready.sequence
        return padded_sequence(examples, device, self.shapes())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it, all processes compute the same long rows, each process a part of the tokens of every row.

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

    def _own_kl(self, number: int, totals: Totals) -> torch.Tensor:
        """This process's part of KTO's estimate of the divergence, (1,) float32."""
        seed = step_seed(self._seed, number, self._processes.place.rank)
        torch.manual_seed(seed)
        found = torch.zeros(1, device=self._parameters.gradient.device)
        if self._preference is not None:
            for index, group in enumerate(self._groups(number)):
                reseed(self._model, seed, index)
                found += self._preference.kl(group, totals)
        return found

    def _groups(self, number: int) -> Iterator[list[Example]]:
        """This process's micro-batches of a step.

        Raises:
            StepAbandoned: There is no time for the rest.
        """
        groups = self._steps.micro_batches(number, self.budget)
        for done, group in enumerate(groups):
            if self._hooks.stop() and not self._hooks.fits(1 - done / len(groups)):
                raise StepAbandoned
            yield group

    def _from_sum(self, sums: torch.Tensor) -> torch.Tensor:
        """A copy of what `sums` has beside the gradient, which was summed where it is: the loss, then metrics."""
        return sums if self._processes.place.world_size == 1 else sums[self._parameters.gradient.shape[0] :].clone()

    def _micro_batch(self, examples: Sequence[Example], targets: float) -> torch.Tensor:
        """Adds the gradient of the examples' summed loss divided by `targets`; returns that loss, () float32."""
        device = self._parameters.gradient.device
        if not is_packed(self._model):
            parts = [self._packed_gradient(alone_inputs(example, device), targets) for example in examples]
            return torch.stack(parts).sum()
        if not self.plan.padded:
            return self._packed_gradient(packed_inputs(examples, device), targets)
        # A tensor, not a number: a CUDA graph would always use the number with which it was recorded.
        weight = torch.full((), 1 / targets, device=device)  # filled on the GPU: a copy from the host would wait for it
        if self._loss_scale is not None:
            weight = weight * self._loss_scale
        loss = self._padded_micro_batch(examples, weight)
        # The factor is a power of two, so multiplying and dividing by it change no bit.
        return loss if self._loss_scale is None else loss / self._loss_scale

    def _padded_micro_batch(self, examples: Sequence[Example], weight: torch.Tensor) -> torch.Tensor:
        """`_micro_batch` for a padded plan; `weight`, () float32, multiplies the summed loss."""
        if self._in_tiles(examples):
            return self._long_rows.gradient(examples, weight, self.plan, self._sp_group)
        sequence = self._sequence(examples, weight.device)
        loss = self._padded(sequence, weight, recorded=self.plan.recorded)
        if self.plan.recorded and not self._padded.recordable:
            self.plan = self.plan.give_up("recorded")
            self.release()
            free_caches()  # the memory of the graphs
        return loss

    def _scaler_factor(self, device: torch.device) -> torch.Tensor | None:
        """What fp16's loss scaling multiplies losses by in this step, () float32; None without it.

        Not read on the host, which would wait for the GPU. The scaler has to scale something in each step, or the
        optimizer step refuses to take the factor out of the gradient again.
        """
        if self._scaler is None or not self._scaler.is_enabled():
            return None
        factor: torch.Tensor = self._scaler.scale(torch.ones((), device=device))
        return factor

    def _check(self) -> None:
        """Called before each layer of a long row, which may take minutes: tells the watchdog, and looks for a stop.

        Raises:
            StepAbandoned: The job has to stop, and the time left is too short for a whole step.
        """
        self._hooks.on_progress()
        if self._hooks.stop() and not self._hooks.fits(1.0):
            raise StepAbandoned

    def _in_tiles(self, examples: Sequence[Example]) -> bool:
        """Whether this micro-batch, the next to be computed, goes layer by layer; noted for `longest_undivided`."""
        self._was_long = self.plan.tile_tokens is not None and has_long_row(examples)
        return self._was_long

    def summed_loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """The summed loss of a micro-batch, () float32, without a gradient; for a padded plan."""
        if self._in_tiles(examples):
            return self._long_rows.summed_loss(examples, self.plan, self._sp_group)
        return self._padded.summed_loss(padded_sequence(examples, self._parameters.gradient.device))

    def shapes(self) -> Shapes:
        """The shapes to which packed sequences are padded with the present token budget, the same in all processes."""
        return self._shapes.of(self._steps, self.budget)

    def how_computed(self) -> HowComputed:
        """What a checkpoint records of how its gradients were computed."""
        padded = list(self.shapes().shapes) if self.plan.padded else None
        return HowComputed(self.plan.forward, self.plan.tile_tokens, self._steps.world_size, padded, self.divided_above)

    def resume_as(self, before: HowComputed | None) -> None:
        """Takes over a checkpoint's padding and its limit for divided rows; warns where this attempt has to differ.

        To be called after the token budget was set to the checkpoint's.

        Args:
            before: What the checkpoint recorded; None in checkpoints of older versions, which did not record it.
        """
        if before is not None and None not in {self.divided_above, before.divided_above}:
            self.divide_above(before.divided_above)
        resume_shapes(self._shapes, before, plan=self.plan, steps=self._steps, budget=self.budget)

    def free_memory(self) -> bool:
        """Drops one optimization that takes memory and only saves time; returns whether there was one."""
        self.release()  # graphs write to fixed addresses, in memory that is freed now
        if not self.plan.droppable:
            return False
        self.plan = drop_optimization(self._model, self.plan)
        return True
