"""The stages between pulling and publishing, each built from its settings: load, evaluate, train."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from job import checkpoints, log, manifest
from job.attempts import Attempt
from job.batches import steps_per_epoch
from job.errors import JobError, Preempted
from job.evaluate import evaluate, write_records
from job.events import write_events
from job.hashes import hash_file
from job.limits import check_disk, checkpoint_bytes, required_bytes
from job.model import (
    adapter_off,
    add_adapter,
    choose_device,
    choose_dtype,
    describe_model,
    load_adapter,
    load_base,
    make_deterministic,
    save_adapter,
    trainable,
)
from job.objects import ObjectStore
from job.preemption import Stopwatch, decide
from job.publisher import Publisher
from job.pull import Sources
from job.recipe import Hooks, Recipe, auto_micro_batch_tokens, substitute, total_steps
from job.records import ChoiceScore, Evaluated, ModelRecord, Question, StepMetrics, Trained, TrainingRecord
from job.scores import KeptScores, score_key
from job.scoring import plan_rows, score_row
from job.settings import Settings
from job.states import validate_state, write_metrics
from job.train import train

Scored = list[list[ChoiceScore]]


@dataclass(frozen=True)
class Loaded:
    """The model in memory, and what the manifest says of it."""

    model: Any
    record: ModelRecord


def load(settings: Settings, sources: Sources) -> Loaded:
    """The quantized base with a fresh adapter on it."""
    device = choose_device(settings.run.device)
    if device.type == "cuda":
        make_deterministic()
    base = load_base(
        sources.folder,
        quantization=settings.model.quantization,
        double_quantization=settings.model.double_quantization,
        dtype=choose_dtype(settings.model.dtype, device),
        device=device,
        max_length=settings.train.max_length,
    )
    model = add_adapter(
        base,
        rank=settings.lora.rank,
        alpha=settings.lora.alpha,
        dropout=settings.lora.dropout,
        target_modules=settings.lora.target_modules,
        seed=settings.run.seed,
    )
    record = describe_model(
        model,
        name=settings.model.id,
        revision=sources.record.model_revision,
        sha256=sources.record.model_sha256,
        quantization=settings.model.quantization,
        double=settings.model.double_quantization,
    )
    log.get_logger().info(
        "model is loaded", device=str(device), dtype=record.dtype, trainable_parameters=record.trainable_parameters
    )
    return Loaded(model, record)


def evaluate_base(
    attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded, shared: ObjectStore
) -> Evaluated:
    """Scores all questions with the adapter off; `shared` is where runs leave the scores of their bases."""
    kept = KeptScores(shared, "scores", settings.run.id)
    # Not the names, nor what belongs to the adapter: a base scores the same whatever is trained on it.
    base = asdict(replace(loaded.record, id="", revision=None, trainable_parameters=0))
    scorer = _Scorer(loaded.model, settings.eval.batch_tokens, kept, base, attempt)
    with adapter_off(loaded.model):
        found = _evaluate(attempt, settings, sources, scorer, "base")
    others = kept.runs - {settings.run.id}
    if not others or scorer.scored:
        return found
    origin = f"{shared.uri}/{scorer.folder} (run {', '.join(sorted(others))})"
    log.get_logger().info("base evaluation is reused", origin=origin)
    return replace(found, scores={task: replace(s, reused_from=origin) for task, s in found.scores.items()})


def evaluate_adapter(
    attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded, trained: Trained
) -> Evaluated:
    """Scores all questions with the published adapter: what is evaluated is what ships."""
    weights = [artifact for artifact in trained.artifacts if "/adapter/adapter_" in artifact.path]
    paths = [attempt.fetch(artifact) for artifact in weights]
    load_adapter(loaded.model, paths[0].parent)
    conditions = {**asdict(loaded.record), "adapter": [artifact.sha256 for artifact in weights]}
    kept = KeptScores(attempt.store, "scores", settings.run.id)
    scorer = _Scorer(loaded.model, settings.eval.batch_tokens, kept, conditions, attempt)
    return _evaluate(attempt, settings, sources, scorer, "adapter")


class _Scorer:
    """Scores questions row by row, skipping what is kept already, with progress, ready to stop between two rows."""

    def __init__(
        self, model: Any, batch_tokens: int, kept: KeptScores, conditions: dict[str, Any], attempt: Attempt
    ) -> None:
        self.model, self.batch_tokens, self.kept, self.attempt = model, batch_tokens, kept, attempt
        machine = manifest.hardware()
        self.conditions = {
            **conditions,
            "software": manifest.software(),
            "cpu": machine["cpu"],
            "gpus": machine["gpus"],
            "driver": machine["driver"],
            "code": [hash_file(Path(__file__).with_name(f"{room}.py")) for room in ("attention", "model", "scoring")],
        }
        self.scored = 0
        """Rows that were scored here and now."""
        self.folder = ""

    def __call__(self, questions: list[Question]) -> Scored:
        rows = plan_rows(questions, self.batch_tokens)
        self.folder = self.kept.open(score_key(questions, rows, self.conditions))
        known = self.kept.load(questions, rows)
        scores: Scored = []
        self.model.eval()
        with log.progress("questions", len(questions), every=max(1, len(questions) // 10)) as tell:
            try:
                for number, row in enumerate(rows):
                    self.attempt.alive()
                    if number not in known:
                        known[number] = _finite(score_row(self.model, questions[row.start : row.stop]))
                        self.kept.add(number, known[number])
                        self.scored += 1
                    scores += known[number]
                    tell(len(scores))
            finally:
                self.kept.save()
        return scores


def _finite(scores: Scored) -> Scored:
    """The scores, if they are numbers: a model that diverged answers with NaN, and NaN has a first choice too."""
    if all(math.isfinite(choice.log_likelihood) for choices in scores for choice in choices):
        return scores
    raise JobError("the model's scores are not finite: it diverged. Lower JOB_TRAIN__LEARNING_RATE")


def _evaluate(attempt: Attempt, settings: Settings, sources: Sources, scorer: _Scorer, side: str) -> Evaluated:
    artifacts, figures = [], {}
    for task, (scores, records) in evaluate(
        sources.tasks, sources.tokenizer, scorer, limit=settings.eval.limit
    ).items():
        key = f"artifacts/evaluation/{task}.{side}.jsonl"
        write_records(attempt.work / key, records)
        artifacts.append(attempt.publish(attempt.work / key, key))
        figures[task] = scores
        log.get_logger().info("evaluated", task=task, n=scores.n, acc=scores.acc, acc_norm=scores.acc_norm)
    return Evaluated(figures, artifacts)


def train_adapter(attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded) -> Trained:
    """Trains from the newest whole checkpoint on, and publishes the adapter and the metrics."""
    model = loaded.model
    recipe, substitutions = substitute(_recipe(settings, len(sources.examples), model), model.device.type)
    for sentence in substitutions:
        log.get_logger().warning("substituted", what=sentence)
    restored = checkpoints.restore(attempt.store, attempt.work / "restored", manifest.software(), validate_state)
    if restored.folder is not None:
        log.get_logger().info("resuming", step=restored.step, of=recipe.total_steps)
    check_disk(attempt.work, required_bytes([], checkpoint_bytes(_size(model), recipe.optimizer)))
    with (
        log.progress("steps", recipe.total_steps, every=settings.train.log_every_steps) as tell,
        Publisher(_publishing(attempt, settings.checkpoint.keep, restored.step)) as publisher,
    ):
        watch = Stopwatch()
        trained = train(
            model,
            sources.tokenizer,
            sources.examples,
            recipe=recipe,
            hooks=Hooks(
                on_metrics=_teller(attempt, tell, watch),
                on_save=publisher.submit,
                stop=attempt.stop,
                fits=_fits(attempt, watch, publisher),
                on_write=lambda seconds: watch.add("save", seconds),
            ),
            folder=attempt.work / "states",
            resume=restored.folder,
        )
        if not trained.complete:
            publisher.finish(attempt.stop.remaining())
            damaged = {skipped.step for skipped in restored.skipped}
            kept = max((step for step in checkpoints.steps(attempt.store) if step not in damaged), default=0)
            raise Preempted(f"stopped by {attempt.stop.reason}; step {kept} of {recipe.total_steps} is saved")
    folder = attempt.work / "artifacts"
    save_adapter(model, folder / "adapter", base=settings.model.id, revision=sources.record.model_revision)
    sources.tokenizer.save_pretrained(folder / "adapter")
    write_metrics(folder / "metrics.jsonl", trained.history)
    write_events(folder / "tensorboard", trained.history)
    facts = checkpoints.hash_facts(folder / "metrics.jsonl")
    files = [path for part in ("adapter", "metrics.jsonl", "tensorboard") for path in _files(folder / part)]
    artifacts = [
        attempt.publish(
            path, f"artifacts/{path.relative_to(folder).as_posix()}", facts if path.name == "metrics.jsonl" else None
        )
        for path in files
    ]
    used = replace(recipe, micro_batch_tokens=trained.micro_batch_tokens)
    return Trained(_training_record(used, trained.history, substitutions, len(sources.examples)), artifacts)


def _recipe(settings: Settings, rows: int, model: Any) -> Recipe:
    t = settings.train
    return Recipe(
        seed=settings.run.seed,
        total_steps=total_steps(rows, t.global_batch_size, t.epochs, t.max_steps),
        learning_rate=t.learning_rate,
        scheduler=t.scheduler,
        warmup_steps=t.warmup_steps,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        global_batch_size=t.global_batch_size,
        micro_batch_tokens=t.micro_batch_tokens or auto_micro_batch_tokens(model.device.type),
        optimizer=t.optimizer,
        gradient_checkpointing=t.gradient_checkpointing,
        save_every_steps=settings.checkpoint.every_steps,
    )


def _teller(attempt: Attempt, tell: log.Progress, watch: Stopwatch) -> Callable[[StepMetrics], None]:
    """Counts, times and shows a step."""

    def on_metrics(metrics: StepMetrics) -> None:
        watch.add("step", float(metrics.measured["seconds"] or 0))
        tell(
            metrics.step,
            loss=round(metrics.loss, 4),
            learning_rate=metrics.learning_rate,
            tokens_per_second=round(metrics.measured["tokens_per_second"] or 0, 1),
            memory_bytes=metrics.measured["memory_bytes"],
        )
        attempt.step_done(metrics.step)

    return on_metrics


def _publishing(attempt: Attempt, keep: int, verified: int) -> Callable[[Path, int], None]:
    """Publishes a checkpoint and deletes those that are not needed any more; runs beside training."""

    def publish(folder: Path, step: int) -> None:
        began = time.monotonic()
        checkpoints.publish(
            attempt.store, folder, step=step, epoch=attempt.number, world_size=1, software=manifest.software()
        )
        checkpoints.prune(attempt.store, keep, epoch=attempt.number, verified=verified)
        attempt.note("running")
        log.get_logger().info("checkpoint", step=step, seconds=round(time.monotonic() - began, 3))

    return publish


def _fits(attempt: Attempt, watch: Stopwatch, publisher: Publisher) -> Callable[[float], bool]:
    """Whether there is time for a share of a step and for saving; an upload that is under way has to end first."""

    def fits(share: float) -> bool:
        uploads = 2 * max(publisher.seconds, default=0.0)
        plan = decide(replace(watch.timings, upload=uploads), attempt.stop.remaining(), share)
        return plan == ("finish_step" if share > 0 else "save_now")

    return fits


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in trainable(model).values())


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _training_record(
    recipe: Recipe, history: Sequence[StepMetrics], substitutions: list[str], rows: int
) -> TrainingRecord:
    """Sums up the steps. A step that was repeated after a restart counts once, as it went the last time."""
    last_epoch = history[-steps_per_epoch(rows, recipe.global_batch_size) :]
    targets = sum(step.target_tokens for step in history)
    seconds = sum(float(step.measured["seconds"] or 0) for step in history)
    return TrainingRecord(
        steps=len(history),
        examples=sum(step.examples for step in history),
        target_tokens=targets,
        loss=sum(s.loss * s.target_tokens for s in last_epoch) / sum(s.target_tokens for s in last_epoch),
        tokens_per_second=targets / seconds if seconds else None,
        seconds=seconds,
        peak_memory_bytes=max(int(step.measured["memory_bytes"] or 0) for step in history),
        optimizer=recipe.optimizer,
        global_batch_size=recipe.global_batch_size,
        micro_batch_tokens=recipe.micro_batch_tokens,
        substitutions=substitutions,
    )
