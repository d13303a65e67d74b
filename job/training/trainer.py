"""Training with TRL: its SFTTrainer, adapted to the batch plan and to packed sequences.

What TRL and transformers do here: the loop over the steps, the optimizer and its schedule, clipping, mixed precision
with its loss scaling, the trainer's state, and, unless all layers of the decoder are fused, the loss of a packed batch
(`SFTTrainer.compute_loss`). What this module replaces:

- the unit is the optimizer step of the batch plan (`training/step.py`), not a batch of a data loader: `training_step`
  gets the number of a step and computes its whole gradient, over all processes; Trainer itself sees one process;
- the optimizer, clipping and the sums over processes see the adapter as one flat tensor;
- checkpoints are in the job's own format without pickle (`checkpoints/trainer_state.py`).

Every method of `_PlannedTrainer` that Trainer calls overrides one of the same name and signature; a test checks this.
"""

from __future__ import annotations

import importlib
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTTrainer

from job.checkpoints.trainer_state import (
    TrainerFiles,
    read_how_computed,
    read_trainer_state,
    read_validations,
    write_trainer_state,
    write_validations,
)
from job.common.device_copies import to_host
from job.common.optimizers import OPTIMIZERS, OptimizerSpec
from job.data.batch_plan import Steps, targets_of
from job.distributed.processes import ALONE, Processes
from job.errors import TrainingFailed
from job.log import get_logger
from job.model.adalora import add_penalty_gradient, allocate, is_adalora
from job.model.decomposed_init import trained_parts
from job.model.gradient_checkpointing import recompute_activations
from job.model.lora import trainable
from job.model.packed_attention import is_packed
from job.records import Example, ExecutionPlan, StepMetrics, ValidationMetrics
from job.training.config import Hooks, Recipe, Trained
from job.training.early_stopping import is_due, progress
from job.training.flat_parameters import FlatParameters
from job.training.lm_head_loss import alone_loss, can_sum, logits_loss, summed_head
from job.training.muon import FlatMuon
from job.training.neftune import add_noise
from job.training.packing import alone_inputs, packed_inputs
from job.training.preference_gradient import PreferenceGradient, head_of, token_log_probs
from job.training.step import OptimizerStep, StepAbandoned
from job.training.trl_config import trl_config
from job.training.validation import Validation


def train(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    recipe: Recipe,
    plan: ExecutionPlan,
    hooks: Hooks,
    folder: Path,
    resume: Path | None = None,
    processes: Processes = ALONE,
    validation: Sequence[Example] = (),
) -> Trained:
    """Trains the adapter of `model` in place; called in all processes.

    At the end the model has the adapter that the recipe keeps: that of the last step, or of the best validation.

    Args:
        model: A PEFT model over a frozen base loaded with packed attention, prepared for the plan (`prepare.py`).
        tokenizer: The base's.
        examples: The data set; the batch plan's rows are indices into it.
        recipe: Everything that determines the result.
        plan: How the work is carried out.
        hooks: Callbacks.
        folder: Where checkpoints are written, one folder each.
        resume: A checkpoint folder that the same recipe wrote; training continues after its step.
        processes: The processes that share the work; only process 0 writes checkpoints and calls `on_save`.
        validation: The rows for validation; at least one where the recipe validates.

    Raises:
        TrainingFailed: The loss of a step or of a validation is not finite, or memory is too small for one example.
        JobError: Another process ended, with this error.
        ValueError: The checkpoint to resume from is not of this model.
    """
    trainer = _PlannedTrainer(
        model,
        tokenizer,
        examples=examples,
        recipe=recipe,
        plan=plan,
        hooks=hooks,
        folder=folder,
        processes=processes,
        validation=validation,
    )
    recompute_activations(model, on=not plan.kept_activations, random=not plan.padded)
    remove_noise = add_noise(model.get_base_model(), recipe.neftune_noise_alpha) if recipe.neftune_noise_alpha else None
    model.train()
    # Trainer sets the gradients to None after every step, module by module; here they are views that must be kept.
    model.zero_grad = lambda: None
    try:
        with without_waiting(OPTIMIZERS[recipe.optimizer]):
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except StepAbandoned as abandoned:
        trainer.report_metrics()
        trainer.save_if_it_fits()
        if abandoned.__cause__ is not None:
            raise abandoned.__cause__ from None
    del model.zero_grad
    if remove_noise is not None:
        remove_noise()
    # Trainer wraps the model's forward for mixed precision; the wrapper is removed, so that both evaluations run the
    # same code.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    recompute_activations(model, on=False)
    model.eval()
    trainer.step.release()
    validations = tuple(trainer.validations)
    if complete := trainer.is_complete():
        trainer.use_kept_adapter()
    plan = replace(trainer.step.plan, divided_above=trainer.step.divided_above)
    return Trained(tuple(trainer.history), trainer.step.budget, complete=complete, plan=plan, validations=validations)


class _PlannedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose unit is the optimizer step of the batch plan."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        examples: Sequence[Example],
        recipe: Recipe,
        plan: ExecutionPlan,
        hooks: Hooks,
        folder: Path,
        processes: Processes,
        validation: Sequence[Example],
    ) -> None:
        exact = {name: parameter.data for name, parameter in trainable(model).items()}
        alone = processes.place.world_size == 1
        super().__init__(
            model=model,
            args=trl_config(recipe, plan, folder, model),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"input_ids": list(examples[0].input_ids)}]),  # TRL wants a row
            data_collator=list,
            # If the flag is set after the processes agreed for this step, all of them see it in the next step.
            callbacks=[
                AroundOptimizerStep(self.before_optimizer_step, self.after_optimizer_step),
                StopOnFlag(hooks.stop if alone else lambda: processes.stopping, hooks.fits),
                ValidateOnSchedule(self.validation_is_due, self.evaluate),
            ],
        )
        # TRL rounds the adapter of a quantized model to bf16, in which a resumed run cannot be exact.
        for name, parameter in trainable(model).items():
            parameter.data = exact[name]
        self.parameters = FlatParameters(trainable(model).values(), OPTIMIZERS[recipe.optimizer].block)
        masks = trained_parts(model)
        for index, name in enumerate(trainable(model)):
            if name in masks:
                self.parameters.freeze(index, masks[name])
        self.adalora = is_adalora(model)
        self.hooks, self.folder, self.leads = hooks, folder, processes.leads
        place, batch_size = processes.place, recipe.global_batch_size
        seed = recipe.seed if recipe.data_seed is None else recipe.data_seed
        self.steps = Steps(examples, seed, batch_size, recipe.total_steps, place.rank, place.world_size)
        self.history: list[StepMetrics] = []
        self.saved_step = 0
        self.clock = time.monotonic()
        base = model.get_base_model()
        smoothing = recipe.label_smoothing
        self.summed_head = partial(summed_head, base, smoothing=smoothing) if can_sum(base) else None
        self.alone_loss = partial(alone_loss, smoothing=smoothing)
        preference = (
            None
            if recipe.preference is None
            else PreferenceGradient(recipe.preference, self.log_probs, self.accelerator.backward)
        )
        self.step = OptimizerStep(
            model,
            self.steps,
            self.parameters,
            recipe=recipe,
            plan=plan,
            hooks=hooks,
            processes=processes,
            packed_gradient=self.packed_gradient,
            preference=preference,
            scaler=self.accelerator.scaler,
            meanwhile=self.report_metrics,
        )
        self.launched_behind_sum = False
        """Whether the optimizer's step is launched before the sum over the processes is there.

        Not in the first step of an attempt, which creates the optimizer's state: copies of it wait for the GPU.
        """
        self.counts_before: list[dict[str, Any]] = []
        self.is_overwritten: Callable[[], bool] = lambda: False
        """Whether an optimizer's step that was given up may have begun."""
        self.unreported: Callable[[], None] | None = None
        """Reports the metrics of the last step, once the GPU has computed them; None if that is done."""
        self.recipe = recipe
        self.validations: list[ValidationMetrics] = []
        self.best: dict[str, torch.Tensor] | None = None
        """The adapter of the best validation, on the CPU by name; None unless the recipe keeps that one."""
        self.validation = Validation(
            model,
            validation,
            block=batch_size,
            step=self.step,
            summed_loss=self.summed_loss,
            hooks=hooks,
            processes=processes,
            preference=preference,
        )

    # Which examples: those of the batch plan, from the next step on.

    def get_train_dataloader(self) -> Any:
        return _Numbers(self.steps.total, lambda: self.steps.total if self.stopped_early() else self.state.global_step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to restore: every step seeds itself."""

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002 - Trainer's signature
        return 0

    # The gradient of a step, and the operations on the whole flat adapter.

    def training_step(self, model: Any, inputs: tuple[int], num_items_in_batch: Any = None) -> Any:  # noqa: ARG002 - Trainer's signature
        if self.unreported is None:
            self.clock = time.monotonic()
        loss = self.step(*inputs)
        self.parameters.before_step()
        if self.adalora:
            self.step.finish_sum()  # reading the scale waits for the GPU
            scaler = self.accelerator.scaler
            add_penalty_gradient(self.model, 1.0 if scaler is None else scaler.get_scale())
        return loss

    def packed_gradient(self, inputs: dict[str, Any], targets: float) -> torch.Tensor:
        """Adds the gradient of a packed batch by TRL's own loss; see `step.PackedGradient`."""
        with self.compute_loss_context_manager():
            # `model_wrapped` is the model as Trainer wrapped it for mixed precision.
            loss = self.packed_loss(inputs, targets)
        self.accelerator.backward(loss)
        detached: torch.Tensor = loss.detach()
        return detached

    def packed_loss(self, inputs: dict[str, Any], targets: float) -> torch.Tensor:
        """The summed loss of a packed batch, or of one example, divided by `targets`; () float32 with history."""
        if not is_packed(self.model):
            return self.alone_loss(self.model_wrapped, **inputs) / targets
        if self.summed_head is None and self.recipe.label_smoothing:
            return logits_loss(self.model_wrapped, smoothing=self.recipe.label_smoothing, **inputs) / targets
        loss: torch.Tensor = self.compute_loss(
            self.summed_head or self.model_wrapped, inputs, num_items_in_batch=targets
        )
        return loss

    def before_optimizer_step(self) -> None:
        """Waits for the sum over the processes unless the optimizer's step can be launched behind it."""
        if self.launched_behind_sum:
            self.counts_before = counts_of(self.optimizer)
        else:
            self.step.finish_sum()

    def after_optimizer_step(self, done: int) -> None:
        """What some adapters need: a frozen part is put back, and AdaLoRA takes ranks away.

        Raises:
            StepAbandoned: Another process has ended, and the optimizer's step, which was launched, is never computed.
        """
        if self.launched_behind_sum:
            try:
                self.step.finish_sum()
            except StepAbandoned:
                restore_counts(self.optimizer, self.counts_before)
                self.is_overwritten = self.step.sum_has_come
                raise
        self.parameters.after_step()
        if self.adalora:
            allocate(self.model, done)
        scaler, on_gpu = self.accelerator.scaler, self.parameters.gradient.is_cuda
        self.launched_behind_sum = can_launch_behind_sum(
            OPTIMIZERS[self.recipe.optimizer],
            on_gpu=on_gpu,
            reads_gpu=self.adalora or (scaler is not None and scaler.is_enabled()),
        )

    def log_probs(self, sequences: Sequence[Example]) -> list[torch.Tensor]:
        """The log-probabilities of sequences' tokens; see `preference_gradient.TokenLogProbs`."""
        with self.compute_loss_context_manager():
            return token_log_probs(self.model, head_of(self.model, self.model_wrapped), sequences)

    def create_optimizer(self, model: Any = None) -> Any:  # noqa: ARG002 - Trainer's signature
        if self.recipe.optimizer == "muon":
            how = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
            self.optimizer = FlatMuon(self.parameters.whole, self.parameters.views, **how)
            return self.optimizer
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = kind([self.parameters.whole], weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> Any:  # noqa: ARG002 - Trainer's signature
        return self.accelerator.clip_grad_norm_([self.parameters.whole], self.args.max_grad_norm)

    # Validation: Trainer calls `evaluate` after a step's metrics and before its checkpoint.

    def validation_is_due(self) -> bool:
        """Whether this step has a validation that was not made yet."""
        step, every = self.state.global_step, self.recipe.validate_every_steps
        made = self.validations[-1].step if self.validations else -1
        return every is not None and made < step and is_due(step, every, self.recipe.total_steps)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:  # noqa: ARG002 - Trainer's signature
        """Validates, keeps the adapter if it is the best one so far, and ends training if the patience is used up.

        Raises:
            StepAbandoned: The job has to stop. The next attempt validates again, before it trains on.
        """
        self.control.should_evaluate = False
        began, step = time.monotonic(), self.state.global_step
        loss = self.validation()
        self._metrics["eval"].clear()  # entropy and accuracy, which TRL's loss collects for its own log
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the validation loss after step {step} is {loss}. Lower JOB_TRAIN__LEARNING_RATE, or check the rows "
                "of JOB_DATA__VALIDATION"
            )
        metrics = ValidationMetrics(
            step=step,
            epoch=self.steps.epoch(step) if step else 0.0,
            loss=loss,
            examples=len(self.validation.examples),
            target_tokens=self.validation.target_tokens,
            measured={"seconds": time.monotonic() - began, "micro_batch_tokens": self.validation.budget},
            preference=dict(self.validation.metrics),
        )
        self.validations.append(metrics)
        if self.recipe.keep == "best" and progress(self.validations).best_step == step:
            self.best = {name: p.detach().to("cpu", copy=True) for name, p in trainable(self.model).items()}
        if self.stopped_early():
            self.control.should_training_stop = self.control.should_save = True
        self.hooks.on_validation(metrics)
        return {f"{metric_key_prefix}_{name}": value for name, value in {"loss": loss, **metrics.preference}.items()}

    def summed_loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """The summed loss of a micro-batch, () float32, computed as training computes it; see `SummedLoss`."""
        device = self.parameters.gradient.device
        with self.compute_loss_context_manager():
            if not is_packed(self.model):
                return torch.stack([self.packed_loss(alone_inputs(example, device), 1) for example in examples]).sum()
            if self.step.plan.padded:
                return self.step.summed_loss(examples)
            return self.packed_loss(packed_inputs(examples, device), 1)

    def stopped_early(self) -> bool:
        """Whether the patience is used up."""
        return bool(self.validations) and progress(self.validations).stopped(self.recipe.stop_after)

    def is_complete(self) -> bool:
        """Whether all steps and validations are done, or training has stopped early."""
        return self.stopped_early() or (
            self.state.global_step >= self.recipe.total_steps and not self.validation_is_due()
        )

    def use_kept_adapter(self) -> None:
        """Puts the adapter of the best validation into the model, if that one is kept."""
        if self.best is not None:
            with torch.no_grad():
                for name, parameter in trainable(self.model).items():
                    parameter.copy_(self.best[name])

    # Metrics, and saving and restoring checkpoints.

    def _maybe_log_save_evaluate(  # noqa: PLR0917 - Trainer's signature
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Trainer's; but metrics are reported when the next step is launched, where it is launched at once.

        Reading them waits for the GPU, which would then have nothing to do until the host has launched the next step.
        """
        control, step = self.control, self.state.global_step
        now = control.should_evaluate or control.should_save or control.should_training_stop or step >= self.steps.total
        if control.should_log and not now and self.step.launched_at_once(step):
            rate = self._get_learning_rate() if learning_rate is None else learning_rate
            read = to_host(tr_loss.detach().clone(), torch.as_tensor(grad_norm, device=tr_loss.device))
            tr_loss.zero_()  # in place, as Trainer does; it adds the next step's loss to this tensor
            self._globalstep_last_logged = step
            self.unreported = partial(self.log_step, read, rate)
            return
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )

    def report_metrics(self) -> None:
        """Reports the metrics of the last step, if that was put off.

        Raises:
            TrainingFailed: Its loss is not finite.
        """
        report, self.unreported = self.unreported, None
        if report is not None:
            report()
            self.clock = time.monotonic()

    def log_step(self, read: Callable[[], tuple[torch.Tensor, ...]], learning_rate: float) -> None:
        """Waits for a step's loss and the norm of its gradient, () each, and logs them."""
        loss, norm = (float(value) for value in read())
        self.log({"loss": loss, "grad_norm": norm, "learning_rate": learning_rate})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002 - Trainer's signature
        """Called by Trainer after every step, and once at the end, then without a loss."""
        self._metrics["train"].clear()  # entropy and accuracy, which TRL's loss collects for its own log
        if "loss" not in logs:
            return
        metrics = self.metrics_of(logs, time.monotonic() - self.clock)
        self.history.append(metrics)
        self.hooks.on_metrics(metrics)
        if not math.isfinite(metrics.loss):
            raise TrainingFailed(
                f"the loss of step {metrics.step} is {metrics.loss}; the last valid checkpoint is kept. "
                "Lower JOB_TRAIN__LEARNING_RATE, or check the rows of that step"
            )

    def metrics_of(self, logs: Mapping[str, float], seconds: float) -> StepMetrics:
        """The metrics and measurements of the step that has just ended."""
        step = self.state.global_step
        examples = self.steps.of(step - 1)
        targets = targets_of(examples)
        norm = float(logs.get("grad_norm", 0.0))
        return StepMetrics(
            step=step,
            epoch=self.steps.epoch(step),
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=norm if math.isfinite(norm) else None,
            examples=len(examples),
            target_tokens=targets,
            measured={
                "seconds": seconds,
                "tokens_per_second": targets / seconds,
                "memory_bytes": memory_in_use(),
                "micro_batch_tokens": self.step.budget,
            },
            preference=dict(self.step.metrics),
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002 - Trainer's signature
        if self.leads:
            path = self.folder / f"step-{self.state.global_step:08d}"
            began = time.monotonic()
            write_trainer_state(path, self.trainer_files(), self.history, self.step.how_computed())
            if self.recipe.validate_every_steps is not None:
                newest = progress(self.validations).best_step == self.state.global_step
                write_validations(path, self.validations, None if newest else self.best)
            self.hooks.on_write(time.monotonic() - began)
            if self.is_overwritten():
                what = "not saved: the sum that another process was thought to have left undone has come meanwhile"
                get_logger().warning(what, step=self.state.global_step)
                shutil.rmtree(path)
                return
            self.saved_step = self.state.global_step
            self.hooks.on_save(path, self.state.global_step)

    def save_if_it_fits(self) -> None:
        """Saves the last finished step, whose state is unchanged since, unless it is saved or there is no time."""
        if self.state.global_step > self.saved_step and self.hooks.fits(0.0):
            self._save_checkpoint(self.model, None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter is restored with the rest, once the optimizer exists."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.history = read_trainer_state(Path(checkpoint), self.trainer_files())
            self.saved_step = self.state.global_step
            self.step.budget = int(self.history[-1].measured["micro_batch_tokens"] or self.step.budget)
            self.step.resume_as(read_how_computed(Path(checkpoint)))
            if self.recipe.validate_every_steps is not None:
                self.restore_validations(Path(checkpoint))

    def restore_validations(self, checkpoint: Path) -> None:
        """Restores the validations so far, and the best adapter if that one is kept.

        Raises:
            ValueError: The checkpoint has none.
        """
        self.validations, best = read_validations(checkpoint)
        self.validation.budget = int(self.validations[-1].measured["micro_batch_tokens"] or self.validation.budget)
        if self.recipe.keep == "best":
            now = {name: p.detach().to("cpu", copy=True) for name, p in trainable(self.model).items()}
            if best is None and progress(self.validations).best_step != self.state.global_step:
                raise ValueError(f"the checkpoint in {checkpoint} lacks the adapter of the best validation")
            self.best = now if best is None else best

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Restored with the optimizer."""

    def trainer_files(self) -> TrainerFiles:
        """The live objects that a checkpoint is written from and restored into."""
        made = self.optimizer, self.lr_scheduler, self.accelerator.scaler, self.state
        return TrainerFiles(self.model, *made, optimizer_name=self.recipe.optimizer)


def counts_of(optimizer: Any) -> list[dict[str, Any]]:
    """What the host counts in an optimizer's state, for each parameter: everything that is not on the GPU."""
    return [
        {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in state.items()
            if not (isinstance(value, torch.Tensor) and value.is_cuda)
        }
        for state in optimizer.state.values()
    ]


def restore_counts(optimizer: Any, counts: Sequence[Mapping[str, Any]]) -> None:
    """Puts back what `counts_of` returned before a step that was launched and is never computed."""
    for state, before in zip(optimizer.state.values(), counts, strict=True):
        state.update(before)


def can_launch_behind_sum(optimizer: OptimizerSpec, *, on_gpu: bool, reads_gpu: bool) -> bool:
    """Whether launching the optimizer's step does not wait for the GPU.

    Where it waits, the end of another process could not be noticed before the sum is there, which may be never.

    Args:
        optimizer: Which.
        on_gpu: Whether the adapter is on one.
        reads_gpu: Whether fp16's loss scaling or AdaLoRA reads numbers of the GPU in the step.
    """
    return (
        on_gpu and not reads_gpu and not optimizer.paged and (not is_bitsandbytes(optimizer) or _WAIT in vars(_bnb()))
    )


_WAIT = "sync_gpu"
"""The function that bitsandbytes' optimizers call to wait for the GPU."""


def is_bitsandbytes(optimizer: OptimizerSpec) -> bool:
    """Whether it is one of bitsandbytes', whose state is quantized."""
    return "qmap1" in optimizer.state


def _bnb() -> Any:
    """The module of bitsandbytes' optimizers, which Trainer imports only when it makes one."""
    return importlib.import_module("bitsandbytes.optim.optimizer")


@contextmanager
def without_waiting(optimizer: OptimizerSpec) -> Iterator[None]:
    """Within it, bitsandbytes does not wait for the GPU after each parameter that it updates.

    Only a paged state needs that: the host may not touch it while the GPU does.
    """
    module = _bnb() if is_bitsandbytes(optimizer) else None
    wait = getattr(module, _WAIT, None)
    if wait is None or optimizer.paged:
        yield
        return
    setattr(module, _WAIT, lambda _parameter: None)
    try:
        yield
    finally:
        setattr(module, _WAIT, wait)


def memory_in_use() -> int:
    """Bytes: the peak that torch allocated on the GPU since the process began, or the process's peak on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Numbers:
    """The remaining step numbers, over which Trainer iterates instead of batches."""

    def __init__(self, total: int, done: Callable[[], int]) -> None:
        self.total, self.done = total, done

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[tuple[int]]:
        return ((step,) for step in range(self.done(), self.total))


class AroundOptimizerStep(TrainerCallback):  # type: ignore[misc]
    """Calls `before` each optimizer step, and `after` it, while the gradient is still there.

    Args:
        before: Called after clipping.
        after: Called with the number of steps done.
    """

    def __init__(self, before: Callable[[], None], after: Callable[[int], None]) -> None:
        self.before, self.after = before, after

    def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Trainer has clipped the gradient."""
        self.before()

    def on_optimizer_step(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """The step is not counted yet."""
        self.after(state.global_step + 1)


class StopOnFlag(TrainerCallback):  # type: ignore[misc]
    """Once the stop flag is set, ends training after the current step, and saves its state if there is time."""

    def __init__(self, stop: Callable[[], bool], fits: Callable[[float], bool]) -> None:
        self.stop, self.fits = stop, fits

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Reads the flag."""
        if self.stop():
            control.should_training_stop = True
            control.should_save = self.fits(0.0)


class ValidateOnSchedule(TrainerCallback):  # type: ignore[misc]
    """Validates before the first step of an attempt, where that is due, and has Trainer do so after later steps."""

    def __init__(self, due: Callable[[], bool], validate: Callable[[], object]) -> None:
        self.due, self.validate = due, validate

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Before training; or after the step that a checkpoint is of, where an attempt stopped in its validation."""
        if self.due():
            self.validate()

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Asks Trainer for a validation between the step's metrics and its checkpoint."""
        control.should_evaluate = control.should_evaluate or self.due()
