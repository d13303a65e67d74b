"""The job, told once: pull, evaluate the base, train, evaluate the adapter, publish."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from job import checkpoints, log, manifest
from job.attempts import Attempt, now, open_attempt
from job.dataset import load_examples
from job.errors import DataError, GateError, Preempted, Problem
from job.hub import download_model
from job.objects import fetch, open_store
from job.preemption import Stop
from job.records import (
    Artifact,
    ChoiceScore,
    DatasetRecord,
    Example,
    ModelRecord,
    Question,
    StepMetrics,
    TaskScores,
    TrainingRecord,
)
from job.settings import Settings, describe, redacted

# These change how a run is carried out, never what it computes; an attempt may differ in them from the one before.
EXECUTION = {
    *("run.id", "run.output", "run.grace_seconds", "run.spot_notices", "preset", "train.micro_batch_tokens"),
    *("train.log_every_steps", "train.stall_seconds", "train.gradient_checkpointing", "eval.batch_tokens"),
}
EXECUTION_GROUPS = ("storage.", "log.", "cost.", "checkpoint.", "gate.")


@dataclass(frozen=True)
class Pulled:
    """What the record of the pull stage keeps: a later attempt must see the same data."""

    dataset: DatasetRecord
    model_sha256: str
    model_revision: str | None


@dataclass(frozen=True)
class Sources:
    """What was pulled, in memory."""

    record: Pulled
    folder: Path
    tokenizer: Any
    examples: list[Example]
    tasks: Any


@dataclass(frozen=True)
class Evaluated:
    """What the record of an evaluation keeps."""

    scores: dict[str, TaskScores]
    artifacts: list[Artifact]


@dataclass(frozen=True)
class Trained:
    """What the record of training keeps."""

    training: TrainingRecord
    artifacts: list[Artifact]


def run(settings: Settings, stop: Stop) -> dict[str, Any]:
    """Runs the job, or the rest of it if earlier attempts did a part; returns the published manifest.

    Raises:
        GateError: The results are published, and the quality gate is not met.
    """
    store = open_store(f"{settings.run.output.rstrip('/')}/{settings.run.id}", **storage_options(settings))
    if (done := store.read("results.json")) is not None:
        log.get_logger().info("this run is complete already", results=f"{store.uri}/results.json")
        return _gated(json.loads(done.data))
    decisive = {name: value for name, value, _ in describe(settings) if _decides(name)}
    with open_attempt(store, settings.run.id, decisive, stop, settings.storage.cache) as attempt:
        sources = pull(attempt, settings)
        model, record = load(settings, sources)
        base = attempt.stage("evaluate-base", Evaluated, lambda: evaluate(attempt, settings, sources, model, "base"))
        trained = attempt.stage("train", Trained, lambda: train(attempt, settings, sources, model))
        use_adapter(attempt, model, trained)
        adapter = attempt.stage(
            "evaluate-adapter", Evaluated, lambda: evaluate(attempt, settings, sources, model, "adapter")
        )
        results = publish(attempt, settings, sources, record, base, trained, adapter)
    return _gated(results)


def pull(attempt: Attempt, settings: Settings) -> Sources:
    """Brings model, data and questions here, and checks every row, before anything is loaded."""
    with log.stage("pull"):
        found = _pull(attempt, settings)
    known = attempt.stage("pull", Pulled, lambda: found.record)
    if known != found.record:
        what = [key for key, value in asdict(known).items() if asdict(found.record)[key] != value]
        raise DataError([Problem(name, "has changed since the first attempt of this run") for name in what])
    return found


def _pull(attempt: Attempt, settings: Settings) -> Sources:
    from job.evaluate import load_tasks
    from job.model import fingerprint, load_tokenizer

    def local(uri: str, kind: str) -> str:
        attempt.stop.check()
        return str(fetch(uri, attempt.work / kind, **storage_options(settings))) if uri.startswith("s3://") else uri

    model, data = settings.model, settings.data
    folder, revision = download_model(local(model.id, "model"), model.revision)
    tokenizer = load_tokenizer(folder)
    examples, dataset = load_examples(
        local(data.source, "data"),
        name=data.source,
        revision=data.revision,
        split=data.split,
        limit=data.limit,
        schema=None if data.format == "auto" else data.format,
        on_bad_row=data.on_bad_row,
        loss_on=settings.train.loss_on,
        max_length=settings.train.max_length,
        tokenizer=tokenizer,
    )
    questions = {task: Path(local(uri, "questions")) for task, uri in settings.eval.data.items()}
    tasks = load_tasks(settings.eval.tasks, questions, settings.eval.data)
    attempt.stop.check()
    log.get_logger().info("data is ready", rows=dataset.rows, skipped=dataset.skipped, tokens=dataset.tokens)
    return Sources(Pulled(dataset, fingerprint(folder), revision), folder, tokenizer, examples, tasks)


def load(settings: Settings, sources: Sources) -> tuple[Any, ModelRecord]:
    """The quantized base with a fresh adapter on it."""
    from job.model import add_adapter, choose_device, choose_dtype, describe_model, load_base

    device = choose_device()
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
    log.get_logger().info("model is loaded", device=str(device), dtype=record.dtype, trainable=record.trainable_parameters)
    return model, record


def evaluate(attempt: Attempt, settings: Settings, sources: Sources, model: Any, side: str) -> Evaluated:
    """Scores all questions with the adapter off (`base`) or on (`adapter`)."""
    from job.evaluate import evaluate as run_tasks
    from job.evaluate import write_records
    from job.model import adapter_off

    score = _scorer(model, settings.eval.batch_tokens, attempt.stop)
    model.eval()
    with adapter_off(model) if side == "base" else contextlib.nullcontext():
        results = run_tasks(sources.tasks, sources.tokenizer, score, limit=settings.eval.limit)
    artifacts = []
    for task, (scores, records) in results.items():
        key = f"artifacts/evaluation/{task}.{side}.jsonl"
        write_records(attempt.work / key, records)
        artifacts.append(attempt.publish(attempt.work / key, key))
        log.get_logger().info("evaluated", task=task, n=scores.n, acc=scores.acc, acc_norm=scores.acc_norm)
    return Evaluated({task: scores for task, (scores, _) in results.items()}, artifacts)


def _scorer(model: Any, batch_tokens: int, stop: Stop) -> Callable[[list[Question]], list[list[ChoiceScore]]]:
    """Scores questions row by row, with progress, ready to stop between rows."""
    from job.scoring import plan_rows, score_row

    def score(questions: list[Question]) -> list[list[ChoiceScore]]:
        scores: list[list[ChoiceScore]] = []
        with log.progress("questions", len(questions), every=max(1, len(questions) // 10)) as tell:
            for row in plan_rows(questions, batch_tokens):
                stop.check()
                scores += score_row(model, questions[row.start : row.stop])
                tell(len(scores))
        return scores

    return score


def train(attempt: Attempt, settings: Settings, sources: Sources, model: Any) -> Trained:
    """Trains the adapter from the newest whole checkpoint on, and publishes it."""
    from job.events import write_events
    from job.model import save_adapter
    from job.states import write_metrics
    from job.train import Hooks, Recipe, auto_micro_batch_tokens, substitute, total_steps
    from job.train import train as run_training

    t = settings.train
    total = total_steps(len(sources.examples), t.global_batch_size, t.epochs, t.max_steps)
    recipe, substitutions = substitute(
        Recipe(
            seed=settings.run.seed,
            total_steps=total,
            learning_rate=t.learning_rate,
            scheduler=t.scheduler,
            warmup_steps=t.warmup_steps,
            weight_decay=t.weight_decay,
            max_grad_norm=t.max_grad_norm,
            global_batch_size=t.global_batch_size,
            micro_batch_tokens=t.micro_batch_tokens or auto_micro_batch_tokens(model.device),
            optimizer=t.optimizer,
            gradient_checkpointing=t.gradient_checkpointing,
            save_every_steps=settings.checkpoint.every_steps,
        ),
        model.device,
    )
    for sentence in substitutions:
        log.get_logger().warning("substituted", what=sentence)
    restored = checkpoints.restore(attempt.store, attempt.work / "restored", manifest.software())
    if restored:
        log.get_logger().info("resuming", step=restored.step, of=total)
    with log.progress("steps", total, every=t.log_every_steps) as tell:

        def on_metrics(metrics: StepMetrics) -> None:
            attempt.steps += 1
            speed = metrics.measured["tokens_per_second"]
            tell(
                metrics.step,
                loss=round(metrics.loss, 4),
                learning_rate=metrics.learning_rate,
                tokens_per_second=round(speed or 0, 1),
                memory_bytes=metrics.measured["memory_bytes"],
            )

        def on_save(folder: Path, step: int) -> None:
            checkpoints.publish(
                attempt.store, folder, step=step, epoch=attempt.number, world_size=1, software=manifest.software()
            )
            checkpoints.prune(attempt.store, settings.checkpoint.keep)

        trained = run_training(
            model,
            sources.tokenizer,
            sources.examples,
            recipe=recipe,
            hooks=Hooks(on_metrics, on_save, attempt.stop),
            folder=attempt.work / "states",
            resume=None if restored is None else restored.folder,
        )
    if not trained.complete:
        raise Preempted(f"stopped by {attempt.stop.reason} after step {trained.history[-1].step} of {total}; it is saved")
    folder = attempt.work / "artifacts"
    save_adapter(model, folder / "adapter", base=settings.model.id, revision=sources.record.model_revision)
    sources.tokenizer.save_pretrained(folder / "adapter")
    write_metrics(folder / "metrics.jsonl", trained.history)
    write_events(folder / "tensorboard", trained.history)
    facts = checkpoints.hash_facts(folder / "metrics.jsonl")
    artifacts = [
        attempt.publish(path, path.relative_to(attempt.work).as_posix(), facts if path.name == "metrics.jsonl" else None)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "evaluation" not in path.parts
    ]
    return Trained(_training_record(replace(recipe, micro_batch_tokens=trained.micro_batch_tokens), trained.history, substitutions, sources), artifacts)


def _training_record(
    recipe: Any, history: Sequence[StepMetrics], substitutions: list[str], sources: Sources
) -> TrainingRecord:
    """Sums up the steps. A step that was repeated after a restart counts once: its latest metrics are in the history."""
    from job.batches import steps_per_epoch

    last_epoch = history[-steps_per_epoch(len(sources.examples), recipe.global_batch_size) :]
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


def use_adapter(attempt: Attempt, model: Any, trained: Trained) -> None:
    """Puts the published adapter into the model: what is evaluated is what ships."""
    from job.model import load_adapter

    for artifact in trained.artifacts:
        if artifact.path.startswith("artifacts/adapter/adapter_"):
            path = attempt.fetch(artifact)
    load_adapter(model, path.parent)


def publish(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    model: ModelRecord,
    base: Evaluated,
    trained: Trained,
    adapter: Evaluated,
) -> dict[str, Any]:
    """Builds, validates and publishes the manifest, last of all."""
    tasks = manifest.compare_tasks(base.scores, adapter.scores)
    gate = settings.gate
    results = manifest.build(
        run_id=settings.run.id,
        settings=redacted(settings),
        attempts=[*attempt.earlier(), attempt.record("complete", now())],
        finished=now(),
        model=model,
        dataset=sources.record.dataset,
        training=trained.training,
        base=base.scores,
        adapter=adapter.scores,
        gate_metric=gate.metric,
        gate_reasons=manifest.gate(tasks, gate.metric, gate.min_delta, gate.max_regression),
        artifacts=[*base.artifacts, *trained.artifacts, *adapter.artifacts],
        image_digest=None,
        usd_per_hour=settings.cost.usd_per_hour,
    )
    manifest.validate(results)
    attempt.store.write("results.json", json.dumps(results, indent=2).encode())
    manifest.tell(manifest.summary(results, f"{attempt.store.uri}/results.json"))
    return results


def storage_options(settings: Settings) -> dict[str, Any]:
    """The storage group as `open_store` takes it."""
    return settings.storage.model_dump(exclude={"cache"})


def _decides(name: str) -> bool:
    return name not in EXECUTION and not name.startswith(EXECUTION_GROUPS)


def _gated(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results, unless they do not pass the gate."""
    if results["gate"]["passed"] is False:
        raise GateError("; ".join(results["gate"]["reasons"]))
    return dict(results)
