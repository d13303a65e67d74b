"""The job, told once: pull, evaluate the base, train, evaluate the adapter, publish."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from job import log, manifest
from job.attempts import Attempt, compare_settings, keep_settings, now, open_attempt
from job.errors import DataError, GateError, Problem
from job.faults import Fault, arm, faulty
from job.objects import open_store
from job.preemption import Stop
from job.pull import Sources, pull
from job.records import Evaluated, ModelRecord, Pulled, Trained
from job.settings import Settings, describe, redacted

# These change how a run is carried out, never what it computes; an attempt may differ in them from the one before.
EXECUTION = {
    *("run.id", "run.output", "run.grace_seconds", "run.spot_notices", "run.image_digest", "preset", "fault"),
    *("train.micro_batch_tokens", "train.log_every_steps", "train.stall_seconds", "train.gradient_checkpointing"),
    "eval.batch_tokens",
}
EXECUTION_GROUPS = ("storage.", "log.", "cost.", "checkpoint.", "gate.")


def run(settings: Settings, stop: Stop, beat: Callable[[], None], faults: tuple[Fault, ...]) -> dict[str, Any]:
    """Runs the job, or the rest of it if earlier attempts did a part; returns the published manifest.

    Raises:
        GateError: The results are published, and the quality gate is not met.
    """
    storage = settings.storage.model_dump(exclude={"cache"})
    shared = open_store(settings.run.output, **storage)
    store = open_store(f"{settings.run.output.rstrip('/')}/{settings.run.id}", **storage)
    decisive = {name: value for name, value, _ in describe(settings) if _decides(name)}
    if (done := store.read("results.json")) is not None:
        compare_settings(store, decisive)
        log.get_logger().info("this run is complete already", results=f"{store.uri}/results.json")
        return _gated(json.loads(done.data))
    armed = arm(faults, store)
    store = faulty(store, armed)
    with open_attempt(store, decisive, cache=settings.storage.cache, stop=stop, beat=beat, faults=armed) as attempt:
        from job import stages  # torch and all that: what can be refused without it has been

        with attempt.timed("pull"):
            sources = pull(attempt, settings, storage)
        loaded = stages.load(settings, sources)
        keep_settings(attempt.store, decisive)  # not before: what cannot be loaded shall not bind the run
        _same(attempt.stage("pull", Pulled, lambda: sources.record), sources.record)
        base = attempt.stage(
            "evaluate-base", Evaluated, lambda: stages.evaluate_base(attempt, settings, sources, loaded, shared)
        )
        trained = attempt.stage("train", Trained, lambda: stages.train_adapter(attempt, settings, sources, loaded))
        adapter = attempt.stage(
            "evaluate-adapter", Evaluated, lambda: stages.evaluate_adapter(attempt, settings, sources, loaded, trained)
        )
        with attempt.timed("publish"):
            results = publish(
                attempt, settings, sources, model=loaded.record, base=base, trained=trained, adapter=adapter
            )
    manifest.tell(manifest.summary(results, f"{store.uri}/results.json"))
    return _gated(results)


def publish(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    *,
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
        attempts=[*attempt.earlier, attempt.record("complete")],
        finished=now(),
        model=model,
        dataset=sources.record.dataset,
        training=trained.training,
        tasks=tasks,
        gate_metric=gate.metric,
        gate_reasons=manifest.gate(tasks, gate.metric, gate.min_delta, gate.max_regression),
        artifacts=[*base.artifacts, *trained.artifacts, *adapter.artifacts],
        image_digest=settings.run.image_digest,
        usd_per_hour=settings.cost.usd_per_hour,
    )
    manifest.validate(results)
    if (done := attempt.store.read("results.json")) is not None:  # the attempt before got so far after all
        published: dict[str, Any] = json.loads(done.data)
        return published
    attempt.store.write("results.json", json.dumps(results, indent=2).encode())
    return results


def _same(known: Pulled, found: Pulled) -> None:
    """A run is one experiment: what it is made of may not change between two attempts."""
    changed = [key for key, value in asdict(known).items() if asdict(found)[key] != value]
    if changed:
        raise DataError([Problem(name, "has changed since the first attempt of this run") for name in changed])


def _decides(name: str) -> bool:
    return name not in EXECUTION and not name.startswith(EXECUTION_GROUPS)


def _gated(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results, unless they do not pass the gate."""
    if results["gate"]["passed"] is False:
        raise GateError("; ".join(results["gate"]["reasons"]))
    return dict(results)
