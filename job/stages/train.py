"""Training: resumes from the newest valid checkpoint, uploads new ones meanwhile, and publishes the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from job import log
from job.checkpoints import checkpoint_store
from job.checkpoints.async_uploader import AsyncUploader
from job.checkpoints.trainer_state import validate_trainer_state, write_metrics
from job.common import host
from job.common.hashing import hash_facts
from job.common.methods import FIRST_STAGE_SETTINGS, METHODS
from job.common.optimizers import substitute, too_high
from job.common.resources import check_disk, checkpoint_bytes, required_bytes
from job.common.schedulers import make_schedule
from job.common.validation import adapter_of
from job.data.batch_plan import steps_per_epoch
from job.data.examples import Examples, lengths_of
from job.errors import Preempted, Unreachable, environment_name
from job.model.adapter_files import save_adapter
from job.model.lora import trainable
from job.model.tokenizer_files import copy_tokenizer
from job.preemption.stop_flag import Stopwatch, decide
from job.records import (
    AdapterRecord,
    Artifact,
    Example,
    ExecutionPlan,
    StepMetrics,
    Trained,
    TrainingProgress,
    TrainingRecord,
    ValidationMetrics,
    ValidationRecord,
)
from job.results.adapter_facts import CONFIG, WEIGHTS, adapter_facts
from job.results.exported_run import refuse_training
from job.results.first_stage import read_first_stage
from job.results.public_bases import public_base
from job.results.training_totals import training_totals
from job.runs.attempt import Attempt
from job.runs.layout import ARTIFACTS, METRICS, VALIDATIONS
from job.settings.load import Settings
from job.stages.handoff import Loaded, Sources
from job.stages.reference import with_reference
from job.storage.open import open_store, storage_options
from job.tracking.tensorboard import write_events
from job.training import config
from job.training.config import Hooks, Preference, Recipe, total_steps
from job.training.early_stopping import validation_record
from job.training.remaining_time import StepPace
from job.training.trainer import train


def train_adapter(attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded) -> Trained | None:
    """Resumes from the newest valid checkpoint, trains, and publishes the adapter and the metrics.

    Raises:
        DataError: The run exports a finished one, whose adapter is missing here.
        Preempted: The job was asked to stop; the newest checkpoint is uploaded, as far as there was time.
    """
    refuse_training(attempt, settings.export.run)
    model, processes = loaded.model, attempt.processes
    optimizer, substituted = substitute(settings.train.optimizer, model.device.type)
    if substituted is not None and processes.leads:
        log.get_logger().warning("substituted", what=substituted)
    recipe = _recipe(settings, len(sources.examples), loaded.micro_batch_tokens, optimizer)
    if processes.leads:
        _note_warmup(recipe)
        _note_learning_rate(recipe, first_stage=settings.part_of is not None)
    examples, validation, reference = sources.examples, sources.validation, list[Artifact]()
    if METHODS[settings.train.last_method].reference:
        shared = open_store(settings.run.output, storage_options(settings.storage))
        examples, validation, reference = with_reference(attempt, settings.run.id, sources, loaded, shared)
    restored = _restore(attempt, software_of(loaded.plan))
    if restored.folder is not None:
        log.get_logger().info("resuming", step=restored.step, of=recipe.total_steps)
    check_disk(attempt.work, required_bytes([], checkpoint_bytes(_parameter_count(model), recipe.optimizer)))
    folder = attempt.work / "artifacts"
    if processes.leads:
        # Now: the base's folder may be deleted during training.
        copy_tokenizer(sources.folder, folder / "adapter", sources.tokenizer, settings.model.add_tokens)
    trained = _train(
        attempt,
        settings,
        sources.tokenizer,
        loaded,
        recipe=recipe,
        examples=examples,
        validation=validation,
        restored=restored,
        longest_at=sources.record.dataset.longest_at,
    )
    if not processes.leads:
        return None
    artifacts, adapter = _publish_adapter(attempt, settings, sources, loaded, folder=folder, trained=trained)
    record = _training_record(
        recipe,
        trained,
        substitutions=[] if substituted is None else [substituted],
        rows=len(sources.examples),
        world_size=processes.place.world_size,
        compared_with=_compared_with(sources) if reference else None,
        start_sha256=sources.record.start_sha256,
        adapter=adapter,
    )
    if not settings.train.is_one_stage:
        record = replace(record, first_stage=read_first_stage(attempt.store))
    return Trained(record, [*artifacts, *reference])


def _train(
    attempt: Attempt,
    settings: Settings,
    tokenizer: Any,
    loaded: Loaded,
    *,
    recipe: Recipe,
    examples: Examples,
    validation: Sequence[Example],
    restored: checkpoint_store.Restored,
    longest_at: str,
) -> config.TrainingResult:
    """Trains from the restored checkpoint to the end, while checkpoints are uploaded.

    `longest_at` is the file and line of the longest example, for messages; empty if they are not known.

    Raises:
        Preempted: The job was asked to stop; the newest checkpoint is uploaded, as far as there was time.
    """
    with (
        log.progress("steps", recipe.total_steps, every=settings.train.log_every_steps) as show_progress,
        AsyncUploader(
            checkpoint_store.make_committer(
                attempt.store,
                checkpoint_store.MarkerFields(
                    attempt.number, attempt.processes.place.world_size, software_of(loaded.plan), attempt.run
                ),
                keep=settings.checkpoint.keep,
                settle_seconds=settings.checkpoint.settle_seconds,
                verified=restored.step,
                on_committed=partial(_committed, attempt),
            ),
            seconds_left=attempt.stop.waiting_seconds,
        ) as uploader,
    ):
        watch = Stopwatch()
        trained = train(
            loaded.model,
            tokenizer,
            examples,
            recipe=recipe,
            plan=loaded.plan,
            hooks=Hooks(
                on_metrics=_step_logger(attempt, show_progress, watch, recipe.total_steps, uploader.check),
                on_save=uploader.submit,
                stop=attempt.stop,
                has_time=_has_time(attempt, watch, uploader),
                on_write=lambda seconds: watch.add("save", seconds),
                on_validation=partial(_validated, attempt),
                on_progress=attempt.report_progress,
                place_of=lambda tokens: longest_at if tokens == max(lengths_of(examples)) else "",
            ),
            folder=attempt.work / "states",
            resume=restored.folder,
            processes=attempt.processes,
            validation=validation,
        )
        if not trained.complete:
            uploader.finish(attempt.stop.waiting_seconds())
            raise _stopped(attempt, restored, recipe.total_steps)
    return trained


def _note_warmup(recipe: Recipe) -> None:
    """Warns if the run has too few steps for its learning rate to reach the peak."""
    if 0 < recipe.total_steps <= recipe.warmup_steps and recipe.learning_rate > 0:
        log.get_logger().warning(
            "the learning rate never reaches its peak: the warmup takes all optimizer steps",
            warmup_steps=recipe.warmup_steps,
            total_steps=recipe.total_steps,
            change="JOB_TRAIN__WARMUP_RATIO=0.1; or more JOB_TRAIN__EPOCHS, or a smaller JOB_TRAIN__GLOBAL_BATCH_SIZE",
        )


def _note_learning_rate(recipe: Recipe, *, first_stage: bool) -> None:
    """Warns of a learning rate that is likely a mistake; the first of two training stages has a setting of its own."""
    if (why := too_high(recipe.learning_rate)) is not None:
        name = "train.learning_rate"
        setting = environment_name(FIRST_STAGE_SETTINGS[name] if first_stage else name)
        log.get_logger().warning("the learning rate is very high", setting=setting, why=why)


def _publish_adapter(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    loaded: Loaded,
    *,
    folder: Path,
    trained: config.TrainingResult,
) -> tuple[list[Artifact], AdapterRecord]:
    """Uploads the adapter, with the tokenizer that is in `folder` already, and the metrics of training."""
    name, revision = public_base(settings.model.id, sources.record.model_revision, settings.model.name)
    save_adapter(loaded.model, folder / "adapter", base=name, revision=revision, names=loaded.names)
    write_metrics(folder / "metrics.jsonl", trained.history)
    facts = {METRICS: hash_facts(folder / "metrics.jsonl")}
    if trained.validations:
        write_metrics(folder / "validation.jsonl", trained.validations)
        facts[VALIDATIONS] = hash_facts(folder / "validation.jsonl")
    write_events(folder / "tensorboard", trained.history, trained.validations)
    parts = ("adapter", "metrics.jsonl", "validation.jsonl", "tensorboard")
    files = [path for part in parts if (folder / part).exists() for path in _files(folder / part)]
    keys = {path: f"{ARTIFACTS}{path.relative_to(folder).as_posix()}" for path in files}
    artifacts = [attempt.publish(path, key, facts.get(key)) for path, key in keys.items()]
    adapter = AdapterRecord(
        init=settings.lora.init, **adapter_facts(folder / "adapter" / CONFIG, folder / "adapter" / WEIGHTS)
    )
    return artifacts, adapter


def _stopped(attempt: Attempt, restored: checkpoint_store.Restored, total_steps: int) -> Preempted:
    """The error of a stopped attempt; in process 0 it names the newest checkpoint that is not damaged."""
    why = f"stopped by {attempt.stop.reason}"
    if not attempt.processes.leads:
        return Preempted(why)
    damaged = {skipped.step for skipped in restored.skipped}
    saved_step = max((step for step in checkpoint_store.steps(attempt.store) if step not in damaged), default=0)
    return Preempted(f"{why}; step {saved_step} of {total_steps} is saved")


def software_of(plan: ExecutionPlan) -> dict[str, str]:
    """What the bits of a checkpoint depend on: versions, and the attention kernel of this machine for long rows."""
    return host.software() | ({} if plan.attention is None else {"attention of long rows": plan.attention})


def _restore(attempt: Attempt, software: dict[str, str]) -> checkpoint_store.Restored:
    """Downloads and verifies the newest valid checkpoint, once on each machine; all must find the same one."""
    processes = attempt.processes

    def restore() -> str:
        size, folder = processes.place.world_size, attempt.work / "restored"
        restored = checkpoint_store.restore(
            attempt.store, folder, software, validate_trainer_state, world_size=size, run=attempt.run
        )
        return adapter_of(checkpoint_store.Restored).dump_json(restored).decode()

    record = processes.broadcast_on_machine("checkpoint", restore)
    restored = adapter_of(checkpoint_store.Restored).validate_json(record)
    if len(set(steps := processes.gather("restored step", restored.step))) > 1:
        raise Unreachable(f"the machines see different valid checkpoints, of steps {steps}; start the run again")
    return restored


def _recipe(settings: Settings, rows: int, micro_batch_tokens: int, optimizer: str) -> Recipe:
    t = settings.train
    schedule = make_schedule(
        total_steps(rows, t.global_batch_size, t.epochs, t.max_steps),
        warmup_steps=t.warmup_steps,
        warmup_ratio=t.warmup_ratio,
        min_lr_ratio=t.min_lr_ratio,
        decay_ratio=t.decay_ratio,
    )
    return Recipe(
        seed=settings.run.seed,
        total_steps=schedule.total_steps,
        learning_rate=t.learning_rate,
        scheduler=t.scheduler,
        warmup_steps=schedule.warmup_steps,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        global_batch_size=t.global_batch_size,
        micro_batch_tokens=micro_batch_tokens,
        optimizer=optimizer,
        save_every_steps=settings.checkpoint.every_steps,
        validate_every_steps=None if settings.data.validation is None else _validation_interval(settings, rows),
        stop_after=t.stop_after,
        keep=t.keep,
        data_seed=settings.data.seed,
        min_lr_ratio=schedule.min_lr_ratio,
        decay_steps=schedule.decay_steps,
        neftune_noise_alpha=t.neftune_noise_alpha,
        label_smoothing=t.label_smoothing if t.last_method == "sft" else 0.0,
        preference=None
        if t.last_method == "sft"
        else Preference(
            method=t.last_method,
            beta=t.beta,
            loss=t.preference_loss,
            label_smoothing=t.label_smoothing,
            desirable_weight=t.desirable_weight,
            undesirable_weight=t.undesirable_weight,
        ),
    )


def _validation_interval(settings: Settings, rows: int) -> int:
    return settings.train.validate_every_steps or steps_per_epoch(rows, settings.train.global_batch_size)


def _step_logger(
    attempt: Attempt,
    show_progress: log.Progress,
    watch: Stopwatch,
    total_steps: int,
    check_upload: Callable[[], None],
) -> Callable[[StepMetrics], None]:
    """The hook that counts, times and logs a step, and raises what the upload of a checkpoint has failed with."""
    pace = StepPace(total_steps)

    def on_metrics(metrics: StepMetrics) -> None:
        seconds = float(metrics.measured["seconds"] or 0)
        watch.add("step", seconds)
        show_progress(
            metrics.step,
            loss=round(metrics.loss, 4),
            learning_rate=metrics.learning_rate,
            tokens_per_second=round(metrics.measured["tokens_per_second"] or 0, 1),
            memory_bytes=metrics.measured["memory_bytes"],
            **{name: round(value, 4) for name, value in metrics.preference.items()},
        )
        attempt.training = TrainingProgress(
            metrics.step,
            total_steps,
            metrics.loss if math.isfinite(metrics.loss) else None,  # records are JSON, which has no NaN
            metrics.measured["tokens_per_second"],
            pace.remaining_seconds(metrics.step),
        )
        attempt.step_done(metrics.step, seconds)
        attempt.on_metrics(metrics)
        check_upload()  # steps after a checkpoint that was not saved would have to be repeated

    return on_metrics


def _validated(attempt: Attempt, metrics: ValidationMetrics) -> None:
    """Logs a validation, and sends it to the trackers."""
    seconds = round(float(metrics.measured["seconds"] or 0), 3)
    rewards = {f"eval_{name}": round(value, 4) for name, value in metrics.preference.items()}
    log.get_logger().info(
        "validation", step=metrics.step, validation_loss=round(metrics.loss, 4), seconds=seconds, **rewards
    )
    attempt.validated(metrics)


def _committed(attempt: Attempt, step: int, seconds: float) -> None:
    """Records that a checkpoint is committed; called in the upload thread."""
    attempt.note("running")
    log.get_logger().info("checkpoint", step=step, seconds=round(seconds, 3))


def _has_time(attempt: Attempt, watch: Stopwatch, uploader: AsyncUploader) -> Callable[[float], bool]:
    """Returns `Hooks.has_time`: whether time is left for a part of a step and for saving, after any current upload."""

    def has_time(share: float) -> bool:
        uploads = 2 * max(uploader.seconds, default=0.0)
        decision = decide(replace(watch.timings, upload=uploads), attempt.stop.remaining(), share)
        return decision == ("finish_step" if share > 0 else "save_now")

    return has_time


def _parameter_count(model: Any) -> int:
    return sum(parameter.numel() for parameter in trainable(model).values())


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _compared_with(sources: Sources) -> str:
    return "base" if sources.start is None else "start"


def _training_record(
    recipe: Recipe,
    trained: config.TrainingResult,
    *,
    substitutions: list[str],
    rows: int,
    world_size: int,
    compared_with: str | None,
    start_sha256: str | None,
    adapter: AdapterRecord,
) -> TrainingRecord:
    return TrainingRecord(
        **training_totals(trained.history, steps_per_epoch(rows, recipe.global_batch_size), recipe.global_batch_size),
        optimizer=recipe.optimizer,
        micro_batch_tokens=trained.micro_batch_tokens,
        substitutions=substitutions,
        world_size=world_size,
        execution=trained.plan,
        method="sft" if recipe.preference is None else recipe.preference.method,
        beta=None if recipe.preference is None else recipe.preference.beta,
        reference=compared_with,
        validation=_validation_record(recipe, trained),
        start_sha256=start_sha256,
        adapter=adapter,
    )


def _validation_record(recipe: Recipe, trained: config.TrainingResult) -> ValidationRecord | None:
    if recipe.validate_every_steps is None:
        return None
    return validation_record(
        trained.validations,
        every_steps=recipe.validate_every_steps,
        total_steps=recipe.total_steps,
        stop_after=recipe.stop_after,
        keep=recipe.keep,
    )
