"""The stages between pulling and publishing, each built from its settings: load, evaluate, train."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from job import checkpoints, log, manifest
from job.adapter import adapter_off, add_adapter, load_adapter, save_adapter, trainable
from job.attempts import Attempt
from job.bases import keep
from job.batches import steps_per_epoch
from job.errors import Preempted, Problem, SettingsError, Unreachable
from job.evaluate import evaluate, write_records
from job.events import write_events
from job.gpu_plan import limit_memory, prepare, token_budget
from job.limits import check_disk, checkpoint_bytes, required_bytes
from job.model import choose_device, choose_dtype, describe_model, load_base, make_deterministic
from job.objects import ObjectStore
from job.preemption import Stopwatch, decide
from job.processes import ALONE, Processes
from job.publisher import Publisher
from job.pull import Sources
from job.recipe import Hooks, Recipe, substitute, total_steps
from job.records import Evaluated, Execution, ModelRecord, StepMetrics, Trained, TrainingRecord
from job.scorer import Scorer
from job.scores import KeptScores
from job.settings import Settings
from job.states import validate_state, write_metrics
from job.train import train


@dataclass(frozen=True)
class Loaded:
    """The model in memory, what the manifest says of it, and how it is going to be trained.

    `execution` is None where PEFT's own layers do the work; `forward` says in words whose layers do.
    """

    model: Any
    record: ModelRecord
    micro_batch_tokens: int
    execution: Execution | None
    forward: str


def load(settings: Settings, sources: Sources, processes: Processes = ALONE) -> Loaded:
    """The quantized base with a fresh adapter on it, in each process its own."""
    device = choose_device(settings.run.device)
    _same_kind(processes, device.type)
    if device.type == "cuda":
        make_deterministic()
        limit_memory(settings.train.gpu_memory_gb)
    base = load_base(
        sources.folder,
        quantization=settings.model.quantization,
        double_quantization=settings.model.double_quantization,
        dtype=choose_dtype(settings.model.dtype, device),
        device=device,
        max_length=settings.train.max_length,
        quantized=sources.quantized,
    )
    if sources.shelf is not None and not sources.quantized:
        keep(base, sources.folder, sources.shelf)
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
    own = token_budget(device, settings.train.micro_batch_tokens, settings.train.gpu_memory_gb)
    budget = min(processes.gather("token budget", own))  # it decides bits, so it is the same for all
    execution, forward = prepare(
        model,
        [len(example.input_ids) for example in sources.examples],
        global_batch_size=settings.train.global_batch_size,
        quantization=settings.model.quantization,
        optimizer=settings.train.optimizer,
        budget=budget,
        keep_base=settings.model.keep_dequantized,
        recompute=settings.train.gradient_checkpointing,
        gigabytes=settings.train.gpu_memory_gb,
    )
    return Loaded(model, record, budget, execution, forward)


def _same_kind(processes: Processes, device: str) -> None:
    """Refuses processes some of which have a GPU and some have none: those would be waited for without end."""
    devices = processes.gather("device", device)
    if without := [rank for rank, kind in enumerate(devices) if kind != "cuda" and "cuda" in devices]:
        what = f"the processes {', '.join(map(str, without))} see no GPU, the others do; start fewer, or give each one"
        raise SettingsError([Problem("run.processes", what)])


def evaluate_base(
    attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded, shared: ObjectStore
) -> Evaluated | None:
    """Scores all questions with the adapter off; `shared` is where runs leave the scores of their bases.

    Like all stages it gives its result in process 0, and None in the others.
    """
    kept = KeptScores(shared, "scores", settings.run.id)
    # Not the names, nor what belongs to the adapter: a base scores the same whatever is trained on it.
    base = {**asdict(replace(loaded.record, id="", revision=None, trainable_parameters=0)), "forward": loaded.forward}
    scorer = Scorer(loaded.model, settings.eval.batch_tokens, kept, base, attempt)
    with adapter_off(loaded.model):
        found = _evaluate(attempt, settings, sources, scorer, "base")
    others = kept.runs - {settings.run.id}
    if found is None or not others or scorer.scored:
        return found
    origin = f"{shared.uri}/{scorer.folder} (run {', '.join(sorted(others))})"
    log.get_logger().info("base evaluation is reused", origin=origin)
    return replace(found, scores={task: replace(s, reused_from=origin) for task, s in found.scores.items()})


def evaluate_adapter(
    attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded, trained: Trained
) -> Evaluated | None:
    """Scores all questions with the published adapter: what is evaluated is what ships."""
    weights = [artifact for artifact in trained.artifacts if "/adapter/adapter_" in artifact.path]
    paths = attempt.processes.share_on_machine(
        "adapter", lambda: [str(attempt.fetch(artifact)) for artifact in weights]
    )
    load_adapter(loaded.model, Path(paths[0]).parent)
    conditions = {
        **asdict(loaded.record),
        "forward": loaded.forward,
        "adapter": [artifact.sha256 for artifact in weights],
    }
    kept = KeptScores(attempt.store, "scores", settings.run.id)
    scorer = Scorer(loaded.model, settings.eval.batch_tokens, kept, conditions, attempt)
    return _evaluate(attempt, settings, sources, scorer, "adapter")


def _evaluate(attempt: Attempt, settings: Settings, sources: Sources, scorer: Scorer, side: str) -> Evaluated | None:
    if not attempt.processes.leads or sources.tasks is None:
        scorer.help()
        return None
    found = evaluate(sources.tasks, sources.tokenizer, scorer, limit=settings.eval.limit)
    attempt.processes.share("questions", str)  # no more of them
    artifacts, figures = [], {}
    for task, (scores, records) in found.items():
        key = f"artifacts/evaluation/{task}.{side}.jsonl"
        write_records(attempt.work / key, records)
        artifacts.append(attempt.publish(attempt.work / key, key))
        figures[task] = scores
        log.get_logger().info("evaluated", task=task, n=scores.n, acc=scores.acc, acc_norm=scores.acc_norm)
    return Evaluated(figures, artifacts)


def train_adapter(attempt: Attempt, settings: Settings, sources: Sources, loaded: Loaded) -> Trained | None:
    """Trains from the newest whole checkpoint on, and publishes the adapter and the metrics."""
    model, processes = loaded.model, attempt.processes
    recipe, substitutions = substitute(_recipe(settings, len(sources.examples), loaded), model.device.type)
    for sentence in substitutions if processes.leads else ():
        log.get_logger().warning("substituted", what=sentence)
    restored = _restore(attempt)
    if restored.folder is not None:
        log.get_logger().info("resuming", step=restored.step, of=recipe.total_steps)
    check_disk(attempt.work, required_bytes([], checkpoint_bytes(_size(model), recipe.optimizer)))
    with (
        log.progress("steps", recipe.total_steps, every=settings.train.log_every_steps) as tell,
        Publisher(
            _publishing(attempt, settings.checkpoint.keep, settings.checkpoint.settle_seconds, restored.step)
        ) as publisher,
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
            processes=processes,
        )
        if not trained.complete:
            publisher.finish(attempt.stop.remaining())
            raise _stopped(attempt, restored, recipe.total_steps)
    if not processes.leads:
        return None
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
    record = _training_record(used, trained.history, substitutions, len(sources.examples), processes.place.world_size)
    if loaded.execution is not None:
        given_up: dict[str, Any] = dict.fromkeys(trained.given_up, False)
        record = replace(record, execution=replace(loaded.execution, **given_up))
    return Trained(record, artifacts)


def _stopped(attempt: Attempt, restored: checkpoints.Restored, total_steps: int) -> Preempted:
    why = f"stopped by {attempt.stop.reason}"
    if not attempt.processes.leads:
        return Preempted(why)
    damaged = {skipped.step for skipped in restored.skipped}
    kept = max((step for step in checkpoints.steps(attempt.store) if step not in damaged), default=0)
    return Preempted(f"{why}; step {kept} of {total_steps} is saved")


def _restore(attempt: Attempt) -> checkpoints.Restored:
    """The newest whole checkpoint, brought here once a machine and verified on each; on all it must be the same one."""
    processes = attempt.processes

    def restore() -> str:
        size, folder = processes.place.world_size, attempt.work / "restored"
        found = checkpoints.restore(attempt.store, folder, manifest.software(), validate_state, size)
        return TypeAdapter(checkpoints.Restored).dump_json(found).decode()

    found = TypeAdapter(checkpoints.Restored).validate_json(processes.share_on_machine("checkpoint", restore))
    if len(set(steps := processes.gather("restored step", found.step))) > 1:
        raise Unreachable(f"the machines found different checkpoints whole: of the steps {steps}; start the run again")
    return found


def _recipe(settings: Settings, rows: int, loaded: Loaded) -> Recipe:
    t, execution = settings.train, loaded.execution
    return Recipe(
        seed=settings.run.seed,
        total_steps=total_steps(rows, t.global_batch_size, t.epochs, t.max_steps),
        learning_rate=t.learning_rate,
        scheduler=t.scheduler,
        warmup_steps=t.warmup_steps,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        global_batch_size=t.global_batch_size,
        micro_batch_tokens=loaded.micro_batch_tokens,
        optimizer=t.optimizer,
        gradient_checkpointing=not execution.kept_activations if execution else t.gradient_checkpointing is not False,
        save_every_steps=settings.checkpoint.every_steps,
        autocast=execution is None,
        padded=execution is not None and execution.recorded,
        replayed=execution is not None and execution.recorded,
        kept_base=execution is not None and execution.kept_base,
    )


def _teller(attempt: Attempt, tell: log.Progress, watch: Stopwatch) -> Callable[[StepMetrics], None]:
    """Counts, times and shows a step."""

    def on_metrics(metrics: StepMetrics) -> None:
        seconds = float(metrics.measured["seconds"] or 0)
        watch.add("step", seconds)
        tell(
            metrics.step,
            loss=round(metrics.loss, 4),
            learning_rate=metrics.learning_rate,
            tokens_per_second=round(metrics.measured["tokens_per_second"] or 0, 1),
            memory_bytes=metrics.measured["memory_bytes"],
        )
        attempt.step_done(metrics.step, seconds)
        attempt.on_metrics(metrics)

    return on_metrics


def _publishing(attempt: Attempt, keep: int, settle_seconds: float, verified: int) -> Callable[[Path, int], None]:
    """Publishes a checkpoint and deletes those that are not needed any more; runs beside training."""
    size = attempt.processes.place.world_size
    committed: dict[int, float] = {}

    def publish(folder: Path, step: int) -> None:
        began = time.monotonic()
        checkpoints.publish(
            attempt.store, folder, step=step, epoch=attempt.number, world_size=size, software=manifest.software()
        )
        now = committed[step] = time.monotonic()
        fresh = [step for step, when in committed.items() if now - when < settle_seconds]
        checkpoints.prune(attempt.store, keep, own=committed.keys(), verified=verified, fresh=fresh)
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
    recipe: Recipe, history: Sequence[StepMetrics], substitutions: list[str], rows: int, world_size: int
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
        world_size=world_size,
    )
