"""The last stage: what was found out becomes a manifest, and what people read is drawn from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from job.common.hashing import sealed
from job.evaluation.comparison import compare_tasks, judge
from job.records import Artifact, Evaluated, ModelRecord, Trained
from job.results import inventory, manifest
from job.results.baseline import Baseline
from job.results.reader import answers_path
from job.runs.attempt import Attempt, now
from job.runs.layout import RESULTS
from job.runs.run_log import read_ledger
from job.settings.load import Settings, redacted
from job.stages.documents import publish_documents
from job.stages.pull import Sources


def publish(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    *,
    model: ModelRecord,
    base: Evaluated,
    trained: Trained,
    adapter: Evaluated,
    gpus: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Publishes what people read, and last of all the manifest; returns it.

    Args:
        attempt: This one.
        settings: All of them: the manifest shows them, redacted.
        sources: What was pulled.
        model: The base and the size of the adapter.
        base: The base's evaluation.
        trained: What training found out.
        adapter: The adapter's evaluation.
        gpus: Those of all processes.
    """
    if (done := attempt.store.read(RESULTS)) is not None:  # the attempt before got so far after all
        published: dict[str, Any] = json.loads(done.data)
        return published
    # read again: a note of the attempt before may have been under way when this one took over
    earlier = read_ledger(attempt.store, attempt.number)
    tasks = compare_tasks(base.scores, adapter.scores)
    against, copies = _publish_baseline(attempt, sources.baseline, adapter)
    results = manifest.build(
        run_id=settings.run.id,
        settings=redacted(settings),
        attempts=[*earlier, attempt.record("complete")],
        finished=now(),
        model=model,
        dataset=sources.record.dataset,
        training=trained.training,
        tasks=tasks,
        gate=judge(tasks, **settings.gate.model_dump(exclude={"baseline"}), baseline=against),
        artifacts=[*base.artifacts, *trained.artifacts, *adapter.artifacts, *copies],
        evidence=inventory.collect(attempt.store, attempt.work / "evidence", attempt.number),
        image_digest=settings.run.image_digest,
        on_demand_usd_per_hour=settings.cost.on_demand_usd_per_hour,
        gpus=gpus,
    )
    results = manifest.sealed(publish_documents(attempt, results))
    manifest.validate(results)
    attempt.store.write(RESULTS, sealed(results))
    return results


def _publish_baseline(
    attempt: Attempt, baseline: Baseline | None, adapter: Evaluated
) -> tuple[dict[str, Any] | None, list[Artifact]]:
    """Compares the adapter with the gate's baseline, and publishes the answers that this rests on."""
    if baseline is None:
        return None, []
    copies = []
    for task in adapter.scores:
        key = answers_path(task, "baseline")
        path = attempt.work / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(baseline.files[task])
        copies.append(attempt.publish(path, key))
    return baseline.compared(adapter.scores), copies
