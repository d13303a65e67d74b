"""The validation loss: the mean over the target tokens of all validation rows, without dropout and without gradient.

For preferences it is the method's loss over all validation rows, with its metrics, as TRL's trainers would evaluate all
rows in one batch. (With several batches, the losses of ORPO and KTO depend on how the rows are divided into batches.)

The rows are computed in blocks. A block has as many rows as a training step, and is packed and divided among the
processes like a training step. The sum is in float64, in a fixed order, so the loss is the same in every attempt, and
token budget and number of processes change it by rounding only.

With several processes, they agree between two blocks on whether to stop; a single process reads the stop flag between
two micro-batches. A validation that has to stop thus ends within the time of a third of a training step. The next
attempt repeats it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from job.common.out_of_memory import free_caches, too_small
from job.common.resources import available_bytes
from job.data.batch_plan import assign, by_weight, micro_batches, weighted_targets, without_divided
from job.data.examples import lengths_of, target_counts_of
from job.distributed.processes import Processes
from job.errors import JobError
from job.log import get_logger
from job.records import Example
from job.training.config import Hooks, StepAbandoned
from job.training.memory_fallback import unless_memory_runs_out
from job.training.objectives import totals_of
from job.training.preference_gradient import PreferenceGradient
from job.training.step import StepGradient

SummedLoss = Callable[[Sequence[Example]], torch.Tensor]
"""The summed negative log-likelihood of the examples' target tokens, () float32."""


class Validation:
    """Computes the validation loss at each call; all processes call it together.

    Args:
        model: The model that is trained.
        examples: The validation rows, at least one.
        block: Rows in a block: the global batch size.
        step: The training step, whose optimizations are switched off when memory runs out in a validation.
        summed_loss: The loss of one micro-batch; called without gradient.
        hooks: `stop` and `on_progress` are used.
        processes: The processes that share the work.
        preference: For preferences, used instead of `summed_loss`.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        *,
        block: int,
        step: StepGradient,
        summed_loss: SummedLoss,
        hooks: Hooks,
        processes: Processes,
        preference: PreferenceGradient | None = None,
    ) -> None:
        self.budget = step.budget
        """Token budget of validation, separate from training's: halved when memory runs out in a validation."""
        self.examples = examples
        self.target_tokens = sum(target_counts_of(examples))
        self._model, self._step, self._summed_loss = model, step, summed_loss
        self._hooks, self._processes, self._preference = hooks, processes, preference
        self.metrics: dict[str, float] = {}
        """Metrics of preferences in the last validation, by TRL's names without their `eval_`."""
        self._blocks = [examples[start : start + block] for start in range(0, len(examples), block)]

    def __call__(self) -> float:
        """The loss: the mean over target tokens, in nats; for preferences the method's loss.

        Raises:
            StepAbandoned: The job has to stop.
            TrainingFailed: Memory is too small for one row, or the loss is not finite.
        """
        with _evaluating(self._model), torch.no_grad():
            if self._preference is None:
                return float(self._summed(self._weighted_loss, 1)) / weighted_targets(self.examples)
            return self._of_preferences(self._preference)

    def _weighted_loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """The summed loss of a micro-batch, each row's loss times its weight, (1,)."""
        total = torch.zeros(1, device=self._model.device)
        for part, weight in by_weight(examples):
            loss = self._summed_loss(part)
            total = total + (loss if weight == 1 else weight * loss)
        return total

    def _of_preferences(self, preference: PreferenceGradient) -> float:
        """The method's loss; also sets `metrics`."""
        totals = totals_of(self.examples)
        kl = torch.zeros((), device=self._model.device)
        if preference.estimates_kl:
            # First, and over all rows: the loss of each depends on it.
            kl = self._summed(lambda group: preference.kl(group, totals)[None], 1)[0].clamp(min=0).float()
        names = preference.names(totals)
        loss_and_metrics = self._summed(lambda group: preference.measure(group, totals, kl), 1 + len(names))
        self.metrics = dict(zip(names, loss_and_metrics[1:].tolist(), strict=True))
        return float(loss_and_metrics[0])

    def _summed(self, compute: Callable[[Sequence[Example]], torch.Tensor], numbers: int) -> torch.Tensor:
        """The results of `compute` for micro-batches, (numbers,), summed over all rows and processes in float64."""
        sums = torch.zeros(numbers, dtype=torch.float64, device=self._model.device)
        for block in self._blocks:
            sums += self._own_sum(block, compute, numbers)
            self._hooks.on_progress()
        try:
            self._processes.all_reduce(sums)
        except JobError as error:
            raise StepAbandoned from error
        return sums

    def _own_sum(
        self, block: Sequence[Example], compute: Callable[[Sequence[Example]], torch.Tensor], numbers: int
    ) -> torch.Tensor:
        """This process's part of a block, (numbers,) float64; repeated with less memory after any process ran out."""
        place = self._processes.place
        lengths = lengths_of(block)
        divided, others = without_divided(lengths, self._step.divided_above)
        mine = [block[others[i]] for i in assign([lengths[i] for i in others], place.world_size)[place.rank]]
        together = [block[i] for i in divided]

        def check_less_is_possible(error: RuntimeError) -> None:
            longest = self._step.micro_batch.longest_undivided(lengths)
            if self.budget <= longest // 2 and not self._step.plan.droppable:
                raise too_small("a validation", longest, error, free_bytes=available_bytes()) from error

        while True:
            own, full = unless_memory_runs_out(
                self._model, lambda: self._micro_batches(mine, compute, numbers, together), check_less_is_possible
            )
            try:
                repeat = self._processes.agree(repeat=own is None)
                if self._processes.stopping:
                    raise StepAbandoned
                if not repeat and own is not None:
                    return own
                if self._processes.agree(repeat=full and not self._step.micro_batch.free_memory()):
                    self.budget //= 2
                    get_logger().warning("memory ran out in a validation", micro_batch_tokens=self.budget)
            except JobError as error:
                raise StepAbandoned from error
            free_caches()

    def _micro_batches(
        self,
        examples: Sequence[Example],
        compute: Callable[[Sequence[Example]], torch.Tensor],
        numbers: int,
        together: Sequence[Example],
    ) -> torch.Tensor:
        alone = self._processes.place.world_size == 1
        sums = torch.zeros(numbers, dtype=torch.float64, device=self._model.device)
        if together:
            with self._step.micro_batch.together():
                for example in together:
                    sums += compute([example])
        for group in micro_batches([len(example.input_ids) for example in examples], self.budget):
            # Several processes stop together, after a block: if one left alone, the others would wait for it.
            if alone and self._hooks.stop():
                raise StepAbandoned
            sums += compute([examples[i] for i in group])
        return sums


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Context manager: the model is in evaluation mode (without dropout), and afterwards in its previous mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
