"""Training: TRL's SFTTrainer, driven by the batch plan over flat rows. The only room that knows trl.

One optimizer step asks the plan which examples it trains on, cuts this process's share into micro-batches by a token
budget and sums their losses, divided by the target tokens of the whole global batch; the gradients of all processes are
added up once a step, here, and Trainer believes to be alone. What is random in a step (dropout) is drawn from a seed of
the run's seed, the step and the process, so no generator's state has to survive a restart.
"""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from job.checkpoints.trainer_state import TrainerFiles, read_trainer_state, write_trainer_state
from job.data.batch_plan import Steps, targets_of
from job.distributed.processes import ALONE, Processes
from job.errors import JobError
from job.model.base import recompute_activations
from job.model.lora import trainable
from job.records import Example, StepMetrics
from job.training.config import Hooks, Recipe, Trained, step_seed
from job.training.cuda_graphs import out_of_memory
from job.training.flat_parameters import FlatParameters
from job.training.micro_batch import Learner


class _StepAbandoned(Exception):
    """The step in hand cannot be finished: the state is that of the step before, untouched.

    There is no time for the rest of it, or another process has ended, which is then the cause.
    """


def train(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    recipe: Recipe,
    hooks: Hooks,
    folder: Path,
    resume: Path | None = None,
    processes: Processes = ALONE,
) -> Trained:
    """Trains the adapter of `model` in place, in all processes alike.

    Args:
        model: A PEFT model over a frozen base loaded with flat attention.
        tokenizer: The base's.
        examples: The data set; the plan's rows are positions in it.
        recipe: How.
        hooks: Whom to tell.
        folder: Where states are written, one folder a saved step.
        resume: A folder written earlier by the same recipe; training goes on after its step.
        processes: Those that share the work; process 0 writes states, and tells of them.
    """
    trainer = _FlatTrainer(
        model, tokenizer, examples=examples, recipe=recipe, hooks=hooks, folder=folder, processes=processes
    )
    recompute_activations(model, on=recipe.gradient_checkpointing, random=not recipe.padded)
    model.train()
    # Trainer takes the gradients off after every step, module by module; they are parts of a vector that clears itself.
    model.zero_grad = lambda: None
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except _StepAbandoned as abandoned:
        trainer.save_if_it_fits()
        if abandoned.__cause__ is not None:
            raise abandoned.__cause__ from None
    del model.zero_grad
    # Trainer wraps the model's forward for mixed precision: taken off, so that both evaluations run the same code.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    recompute_activations(model, on=False)
    model.eval()
    given_up = tuple(trainer.learner.given_up)
    trainer.learner.release()
    done = trainer.state.global_step
    return Trained(tuple(trainer.history), trainer.budget, complete=done >= recipe.total_steps, given_up=given_up)


class _FlatTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose unit is the optimizer step of the batch plan."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        examples: Sequence[Example],
        recipe: Recipe,
        hooks: Hooks,
        folder: Path,
        processes: Processes,
    ) -> None:
        exact = {name: parameter.data for name, parameter in trainable(model).items()}
        super().__init__(
            model=model,
            args=trl_config(recipe, folder, model),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"input_ids": list(examples[0].input_ids)}]),  # TRL wants to see one
            data_collator=list,
            # A flag that goes up between the agreement and the step's end counts in the next step, in all of them.
            callbacks=[StopOnFlag(self._stopping, hooks.fits)],
        )
        # TRL rounds the adapter of a quantized model to bf16, in which a resumed run cannot be exact.
        for name, parameter in trainable(model).items():
            parameter.data = exact[name]
        self.vector = FlatParameters(trainable(model).values())
        self.recipe, self.hooks, self.folder, self.processes = recipe, hooks, folder, processes
        place, batch_size = processes.place, recipe.global_batch_size
        self.steps = Steps(examples, recipe.seed, batch_size, recipe.total_steps, place.rank, place.world_size)
        self.budget = recipe.micro_batch_tokens
        self.history: list[StepMetrics] = []
        self.saved_step = 0
        self.clock = time.monotonic()
        self.learner = Learner(
            model,
            recipe,
            examples,
            largest=lambda: self.steps.largest(self.budget),
            backward=self.accelerator.backward,
            autocast=self.compute_loss_context_manager,
        )

    # Which examples: the plan's, from the step that comes next.

    def get_train_dataloader(self) -> Any:
        return _Numbers(self.steps.total, lambda: self.state.global_step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to restore: every step seeds itself."""

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002 - Trainer's signature
        return 0

    # What is done to the adapter as a whole.

    def create_optimizer(self, model: Any = None) -> Any:  # noqa: ARG002 - Trainer's signature
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = kind([self.vector.whole], weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> Any:  # noqa: ARG002 - Trainer's signature
        return self.accelerator.clip_grad_norm_([self.vector.whole], self.args.max_grad_norm)

    def training_step(self, model: Any, inputs: tuple[int], num_items_in_batch: Any = None) -> Any:  # noqa: ARG002
        """One optimizer step's gradient; makes room and repeats itself when the memory of a GPU runs out."""
        self.clock = time.monotonic()
        while True:
            sums = None
            try:
                sums = self._lay_out(self._gradient_of(model, *inputs))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                least = max(len(e.input_ids) for e in self.steps.examples) // 2
                if self.budget <= least and not self.learner.can_make_room():
                    raise
            try:
                if not self.processes.agree(repeat=sums is None):
                    self.processes.add_up(sums)
                    return self._put_back(sums)
                # Where one that ran out finds nothing to give up, all of them go on with half the budget.
                if self.processes.agree(repeat=sums is None and not self.learner.make_room()):
                    self.budget //= 2
            except JobError as error:
                raise _StepAbandoned from error
            gc.collect()  # errors hold on to what their frames had made
            torch.cuda.empty_cache()

    def _lay_out(self, loss: Any) -> Any:
        """What is added up over the processes, end to end: the adapter's gradient, and the loss."""
        alone = self.processes.place.world_size == 1
        return loss.reshape(1) if alone else torch.cat([self.vector.gradient, loss.reshape(1)])

    def _put_back(self, sums: Any) -> Any:
        """Makes the sum the adapter's gradient, and returns the loss."""
        if self.processes.place.world_size > 1:
            self.vector.gradient.copy_(sums[:-1])
        return sums[-1]

    def _stopping(self) -> bool:
        return self.hooks.stop() if self.processes.place.world_size == 1 else self.processes.stopping

    def _gradient_of(self, model: Any, step: int) -> Any:
        torch.manual_seed(step_seed(self.recipe.seed, step, self.processes.place.rank))
        self.vector.clear()
        loss = torch.zeros((), device=self.args.device)
        weight = 1 / targets_of(self.steps.of(step))
        groups = self.steps.micro_batches(step, self.budget)
        for number, group in enumerate(groups, start=1):
            if self.hooks.stop() and not self.hooks.fits(1 - (number - 1) / len(groups)):
                raise _StepAbandoned
            loss += self.learner(model, group, weight, self.args.device)
        return loss

    # What is told, kept and restored.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002
        """Called by Trainer after every step, and once at the end, then without a loss."""
        if "loss" not in logs:
            return
        metrics = self._metrics_of(logs, time.monotonic() - self.clock)
        self.history.append(metrics)
        self.hooks.on_metrics(metrics)
        if not math.isfinite(metrics.loss):
            raise JobError(
                f"the loss of step {metrics.step} is {metrics.loss}; the last good checkpoint is kept. "
                "Lower JOB_TRAIN__LEARNING_RATE or look at the rows of that step"
            )

    def _metrics_of(self, logs: dict[str, float], seconds: float) -> StepMetrics:
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
                "micro_batch_tokens": self.budget,
            },
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002
        if self.processes.leads:
            path = self.folder / f"step-{self.state.global_step:08d}"
            began = time.monotonic()
            write_trainer_state(path, self._files(), self.history)
            self.hooks.on_write(time.monotonic() - began)
            self.saved_step = self.state.global_step
            self.hooks.on_save(path, self.state.global_step)

    def save_if_it_fits(self) -> None:
        """Saves the last finished step, whose state nothing has touched since, unless it is saved or time is up."""
        if self.state.global_step > self.saved_step and self.hooks.fits(0.0):
            self._save_checkpoint(self.model, None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter is restored with the rest, once the optimizer exists."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.history = read_trainer_state(Path(checkpoint), self._files())
            self.saved_step = self.state.global_step
            self.budget = int(self.history[-1].measured["micro_batch_tokens"] or self.budget)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Restored with the optimizer."""

    def _files(self) -> TrainerFiles:
        return TrainerFiles(self.model, self.optimizer, self.lr_scheduler, self.accelerator.scaler, self.state)


def memory_in_use() -> int:
    """Bytes: the peak that torch allocated on the GPU since the process began, or the process's peak on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Numbers:
    """What Trainer iterates over instead of batches: the numbers of the steps that are still to be done."""

    def __init__(self, total: int, done: Callable[[], int]) -> None:
        self.total, self.done = total, done

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[tuple[int]]:
        return ((step,) for step in range(self.done(), self.total))


class StopOnFlag(TrainerCallback):  # type: ignore[misc]
    """Ends training after the step in hand once the flag is up, with its state saved where there is time for that."""

    def __init__(self, stop: Callable[[], bool], fits: Callable[[float], bool]) -> None:
        self.stop, self.fits = stop, fits

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Reads the flag."""
        if self.stop():
            control.should_training_stop = True
            control.should_save = self.fits(0.0)


SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def trl_config(recipe: Recipe, folder: Path, model: Any) -> SFTConfig:
    """How Trainer is to train.

    Args:
        recipe: The same in the job's words.
        folder: Where Trainer may write.
        model: The one that is trained.
    """
    on_gpu = model.device.type == "cuda"
    dtype = model.get_base_model().dtype
    return SFTConfig(
        output_dir=str(folder),
        max_steps=recipe.total_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=SCHEDULERS[recipe.scheduler],
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optimizer,
        # Switched on by hand on the model: the argument's name changed between the versions that we admit.
        **dict.fromkeys(
            {"activation_checkpointing", "gradient_checkpointing"} & SFTConfig.__dataclass_fields__.keys(), False
        ),
        bf16=dtype is torch.bfloat16 and recipe.autocast,
        fp16=dtype is torch.float16,
        use_cpu=not on_gpu,
        seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite
        save_strategy="steps",
        save_steps=recipe.save_every_steps,
        ignore_data_skip=True,  # the plan seeks, nothing has to be skipped
        remove_unused_columns=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        disable_tqdm=True,
    )
