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

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import environment as accelerate_environment
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTTrainer

from job.checkpoints.trainer_state import (
    TrainerFiles,
    read_computation_options,
    read_trainer_state,
    write_trainer_state,
)
from job.common.optimizers import OPTIMIZERS
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
from job.training.config import Hooks, Recipe, StepAbandoned, TrainingResult
from job.training.flat_parameters import FlatParameters
from job.training.gpu_memory import memory_in_use
from job.training.launch_ahead import DeferredMetrics, OptimizerBehindSum, without_bitsandbytes_sync
from job.training.lm_head_loss import alone_loss, can_sum, logits_loss, summed_head
from job.training.muon import FlatMuon
from job.training.neftune import add_noise
from job.training.packing import alone_inputs, packed_inputs
from job.training.preference_gradient import PreferenceGradient, head_of, token_log_probs
from job.training.step import StepGradient
from job.training.trainer_callbacks import AroundOptimizerStep, StopOnFlag, ValidateOnSchedule
from job.training.trl_config import trl_config
from job.training.validation import Validation
from job.training.validation_history import ValidationHistory


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
) -> TrainingResult:
    """Trains the adapter of `model` in place; called in all processes.

    At the end the model has the adapter that the recipe keeps: that of the last step, or of the best validation.

    Args:
        model: A PEFT model over a frozen base loaded with packed attention, prepared for the plan (`prepare.py`).
        tokenizer: The base's.
        examples: The data set; the batch plan's rows are indices into it.
        recipe: Everything that determines the result.
        plan: How the recipe is carried out, which affects time and memory.
        hooks: Called for metrics, checkpoints and progress, and asked whether to stop.
        folder: Checkpoints are written into it, each into a folder `step-NUMBER`.
        resume: A checkpoint folder that the same recipe wrote; training continues after its step.
        processes: The processes that share the work; only process 0 writes checkpoints and calls `on_save`.
        validation: The rows for validation; at least one where the recipe validates.

    Raises:
        TrainingFailed: The loss of a step or of a validation is not finite, or memory is too small for one example.
        JobError: Another process ended, with this error.
        ValueError: The checkpoint to resume from is not of this model.
    """
    with _environment_untouched():
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
        with without_bitsandbytes_sync(OPTIMIZERS[recipe.optimizer]):
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except StepAbandoned as abandoned:
        trainer.deferred.report()
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
    trainer.step.micro_batch.release()
    if complete := trainer.is_complete():
        trainer.validations.use_kept_adapter()
    validations = tuple(trainer.validations.metrics)
    plan = replace(trainer.step.plan, divided_above=trainer.step.divided_above)
    return TrainingResult(
        tuple(trainer.history), trainer.step.budget, complete=complete, plan=plan, validations=validations
    )


@contextmanager
def _environment_untouched() -> Iterator[None]:
    """Context manager in which accelerate does not clear `os.environ` while it reads the defaults of a class.

    The job's other threads read variables at the same time, from C as well, to upload files and renew the lease. They
    would miss them, or crash, since C's getenv must not run concurrently with setenv. The only defaults that Trainer
    asks for, those of GradientAccumulationPlugin, depend on no variable.
    """
    clear_environment = accelerate_environment.clear_environment
    accelerate_environment.clear_environment = nullcontext
    try:
        yield
    finally:
        accelerate_environment.clear_environment = clear_environment


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
        fp32_adapter = {name: parameter.data for name, parameter in trainable(model).items()}
        super().__init__(
            model=model,
            args=trl_config(recipe, plan, folder, model),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"input_ids": list(examples[0].input_ids)}]),  # TRL wants a row
            data_collator=list,
            callbacks=self.callbacks_for(hooks, processes),
        )
        # TRL rounds the adapter of a quantized model to bf16, in which a resumed run cannot be exact.
        for name, parameter in trainable(model).items():
            parameter.data = fp32_adapter[name]
        self.recipe, self.hooks, self.folder, self.leads = recipe, hooks, folder, processes.leads
        # Which examples a step has, the flat adapter, and the loss.
        self.steps = steps_of(examples, recipe, processes)
        self.parameters = flat_adapter(model, OPTIMIZERS[recipe.optimizer].block)
        base = model.get_base_model()
        self.summed_head = partial(summed_head, base, smoothing=recipe.label_smoothing) if can_sum(base) else None
        self.adalora = is_adalora(model)
        self.history: list[StepMetrics] = []
        self.saved_step = 0
        # The gradient of a step, and what the host launches after it (`launch_ahead`).
        preference, scaler = self.preference_gradient(), self.accelerator.scaler
        self.deferred = DeferredMetrics(self.log)
        self.step = StepGradient(
            model,
            self.steps,
            self.parameters,
            recipe=recipe,
            plan=plan,
            hooks=hooks,
            processes=processes,
            packed_gradient=self.packed_gradient,
            preference=preference,
            scaler=scaler,
            meanwhile=self.deferred.report,
        )
        self.behind_sum = OptimizerBehindSum(
            self.step.gradient_sum,
            OPTIMIZERS[recipe.optimizer],
            on_gpu=self.parameters.gradient.is_cuda,
            reads_gpu=self.adalora or (scaler is not None and scaler.is_enabled()),
        )
        # Validations, whose micro-batches are computed like those of steps.
        self.validations = ValidationHistory(model, recipe)
        self.validation = Validation(
            model,
            validation,
            block=recipe.global_batch_size,
            step=self.step,
            summed_loss=self.summed_loss,
            hooks=hooks,
            processes=processes,
            preference=preference,
        )

    def callbacks_for(self, hooks: Hooks, processes: Processes) -> list[TrainerCallback]:
        """The callbacks around the optimizer's step and at the end of a step."""
        # If the flag is set after the processes agreed for this step, all of them see it in the next step.
        alone = processes.place.world_size == 1
        return [
            AroundOptimizerStep(self.before_optimizer_step, self.after_optimizer_step),
            StopOnFlag(hooks.stop if alone else lambda: processes.stopping, hooks.has_time),
            ValidateOnSchedule(self.validation_is_due, self.evaluate),
        ]

    def preference_gradient(self) -> PreferenceGradient | None:
        """The gradient of the method's objective; None for SFT."""
        if self.recipe.preference is None:
            return None
        return PreferenceGradient(self.recipe.preference, self.log_probs, self.accelerator.backward)

    # The data loader: step numbers of the batch plan, from the next step on.

    def get_train_dataloader(self) -> Any:
        return _RemainingSteps(self.steps.total, self.steps_done)

    def steps_done(self) -> int:
        """Number of steps that are done; the number of all steps if training has stopped early."""
        return self.steps.total if self.validations.stopped_early else self.state.global_step

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Does nothing: every step seeds torch's generator itself."""

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002 - Trainer's signature
        return 0

    # The gradient of a step, and the operations on the whole flat adapter.

    def training_step(self, model: Any, inputs: tuple[int], num_items_in_batch: Any = None) -> Any:  # noqa: ARG002 - Trainer's signature
        self.deferred.step_begins()
        loss = self.step(*inputs)
        self.parameters.before_step()
        if self.adalora:
            # Before reading the scale, which waits for the GPU: the end of another process would not be noticed then.
            self.step.gradient_sum.finish()
            scaler = self.accelerator.scaler
            add_penalty_gradient(self.model, 1.0 if scaler is None else scaler.get_scale())
        return loss

    def packed_gradient(self, inputs: dict[str, Any], targets: float) -> torch.Tensor:
        """Adds the gradient of a packed batch by TRL's own loss; see `micro_batch.PackedGradient`."""
        with self.compute_loss_context_manager():
            # `model_wrapped` is the model as Trainer wrapped it for mixed precision.
            loss = self.packed_loss(inputs, targets)
        self.accelerator.backward(loss)
        detached: torch.Tensor = loss.detach()
        return detached

    def packed_loss(self, inputs: dict[str, Any], targets: float) -> torch.Tensor:
        """The summed loss of a packed batch, or of one example, divided by `targets`; () float32 with history."""
        if not is_packed(self.model):
            return alone_loss(self.model_wrapped, smoothing=self.recipe.label_smoothing, **inputs) / targets
        if self.summed_head is None and self.recipe.label_smoothing:
            return logits_loss(self.model_wrapped, smoothing=self.recipe.label_smoothing, **inputs) / targets
        loss: torch.Tensor = self.compute_loss(
            self.summed_head or self.model_wrapped, inputs, num_items_in_batch=targets
        )
        return loss

    def before_optimizer_step(self) -> None:
        """Called when Trainer has clipped the gradient, before `optimizer.step()`; see `OptimizerBehindSum`."""
        self.behind_sum.before_step(self.optimizer)

    def after_optimizer_step(self, done: int) -> None:
        """Called after `optimizer.step()`: restores what must not be trained, and lets AdaLoRA reduce ranks.

        Raises:
            StepAbandoned: Another process has ended, and the optimizer's step, which was launched, is never computed.
        """
        self.behind_sum.after_step(self.optimizer)
        self.parameters.after_step()
        if self.adalora:
            allocate(self.model, done)

    def log_probs(self, sequences: Sequence[Example]) -> list[torch.Tensor]:
        """The log-probabilities of sequences' tokens; see `preference_gradient.TokenLogProbs`."""
        with self.compute_loss_context_manager():
            return token_log_probs(self.model, head_of(self.model, self.model_wrapped), sequences)

    def create_optimizer(self, model: Any = None) -> Any:  # noqa: ARG002 - Trainer's signature
        if self.recipe.optimizer == "muon":
            options = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
            self.optimizer = FlatMuon(self.parameters.whole, self.parameters.views, **options)
            return self.optimizer
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = optimizer_class([self.parameters.whole], weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> Any:  # noqa: ARG002 - Trainer's signature
        return self.accelerator.clip_grad_norm_([self.parameters.whole], self.args.max_grad_norm)

    # Validation: Trainer calls `evaluate` after a step's metrics and before its checkpoint.

    def validation_is_due(self) -> bool:
        """Whether this step has a validation that was not made yet."""
        return self.validations.is_due(self.state.global_step)

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
        self.validations.add(metrics)
        if self.validations.stopped_early:
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
                return self.step.micro_batch.summed_loss(examples)
            return self.packed_loss(packed_inputs(examples, device), 1)

    def is_complete(self) -> bool:
        """Whether all steps and validations are done, or training has stopped early."""
        return self.validations.stopped_early or (
            self.state.global_step >= self.recipe.total_steps and not self.validation_is_due()
        )

    # Metrics; saving and restoring checkpoints.

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
        """As Trainer's, but metrics are reported after the next step is launched, if that is quick (`launch_ahead`)."""
        control, step = self.control, self.state.global_step
        pauses = control.should_evaluate or control.should_save or control.should_training_stop
        if control.should_log and not pauses and step < self.steps.total and self.step.launched_at_once(step):
            rate = self._get_learning_rate() if learning_rate is None else learning_rate
            self.deferred.defer(tr_loss, grad_norm, rate)
            tr_loss.zero_()  # in place, as Trainer does; it adds the next step's loss to this tensor
            self._globalstep_last_logged = step
            return
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002 - Trainer's signature
        """Called by Trainer after every step, and once at the end, then without a loss."""
        self._metrics["train"].clear()  # entropy and accuracy, which TRL's loss collects for its own log
        if "loss" not in logs:
            return
        metrics = self.metrics_of(logs, self.deferred.seconds)
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
            write_trainer_state(path, self.trainer_files(), self.history, self.step.computation_options())
            if self.recipe.validate_every_steps is not None:
                self.validations.write(path, self.state.global_step)
            self.hooks.on_write(time.monotonic() - began)
            if self.behind_sum.may_have_begun():
                message = (
                    "checkpoint not saved: another process ended, but its gradient arrived while the files were written"
                )
                get_logger().warning(message, step=self.state.global_step)
                shutil.rmtree(path)
                return
            self.saved_step = self.state.global_step
            self.hooks.on_save(path, self.state.global_step)

    def save_if_it_fits(self) -> None:
        """Saves the state after the last finished step, unless it is saved already or there is no time."""
        if self.state.global_step > self.saved_step and self.hooks.has_time(0.0):
            self._save_checkpoint(self.model, None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Does nothing: the adapter is restored together with the optimizer, once that exists."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.history = read_trainer_state(Path(checkpoint), self.trainer_files())
            self.saved_step = self.state.global_step
            self.step.budget = int(self.history[-1].measured["micro_batch_tokens"] or self.step.budget)
            self.step.resume_as(read_computation_options(Path(checkpoint)))
            if self.recipe.validate_every_steps is not None:
                self.validations.restore(Path(checkpoint), self.state.global_step)
                before = self.validations.metrics[-1].measured["micro_batch_tokens"]
                self.validation.budget = int(before or self.validation.budget)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Does nothing: the scaler is restored together with the optimizer."""

    def trainer_files(self) -> TrainerFiles:
        """The live objects that a checkpoint is written from and restored into."""
        stateful = self.optimizer, self.lr_scheduler, self.accelerator.scaler, self.state
        return TrainerFiles(self.model, *stateful, optimizer_name=self.recipe.optimizer)


def steps_of(examples: Sequence[Example], recipe: Recipe, processes: Processes) -> Steps:
    """The batch plan over the examples, as this process uses it."""
    seed = recipe.seed if recipe.data_seed is None else recipe.data_seed
    place = processes.place
    return Steps(examples, seed, recipe.global_batch_size, recipe.total_steps, place.rank, place.world_size)


def flat_adapter(model: Any, block: int) -> FlatParameters:
    """The adapter as one flat tensor, of which the parameters become views; `block` as for `FlatParameters`."""
    parameters = FlatParameters(trainable(model).values(), block)
    masks = trained_parts(model)
    for index, name in enumerate(trainable(model)):
        if name in masks:
            parameters.freeze(index, masks[name])
    return parameters


class _RemainingSteps:
    """The remaining step numbers, over which Trainer iterates instead of batches; the length is that of all steps."""

    def __init__(self, total: int, done: Callable[[], int]) -> None:
        self.total, self.done = total, done

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[tuple[int]]:
        return ((step,) for step in range(self.done(), self.total))
