"""The last stage: what was found out becomes a manifest, and what people read is drawn from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from job import log
from job.common.hashing import sealed
from job.errors import JobError
from job.evaluation.comparison import compare_tasks, judge
from job.evaluation.samples import samples_path
from job.records import Artifact, Evaluated, ModelRecord, Trained
from job.report import model_card, report
from job.results import inventory, manifest
from job.results.baseline import Baseline
from job.runs.attempt import Attempt, now
from job.runs.layout import CARD, REPORT, RESULTS
from job.runs.run_log import read_run_log
from job.settings.load import Settings, redacted
from job.stages.handoff import Sources


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
    earlier = read_run_log(attempt.store, attempt.number)
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
    results = manifest.sealed(publish_report_and_card(attempt, results))
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
        key = samples_path(task, "baseline")
        path = attempt.work / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(baseline.tasks[task].data)
        copies.append(attempt.publish(path, key))
    return baseline.compared(adapter.scores), copies


def publish_report_and_card(attempt: Attempt, results: Mapping[str, Any]) -> dict[str, Any]:
    """Publishes both; returns the manifest with them among its artefacts.

    A page must not cost a run its results: where one cannot be drawn the log has the error, and the manifest is
    published without it. A store that does not take it is another matter, and ends the attempt as always.
    """
    complete = _with(results, _published(attempt, CARD, lambda: model_card.render_model_card(results)))
    return _with(
        complete,
        _published(
            attempt, REPORT, lambda: report.render_report(complete, report.read_report_data(complete, attempt.fetch))
        ),
    )


def _published(attempt: Attempt, key: str, make: Callable[[], bytes]) -> Artifact | None:
    try:
        content = make()
    except JobError:
        raise
    except Exception as error:  # noqa: BLE001 - hours of a GPU's work are behind it
        log.get_logger().error("a document cannot be made, the results come without it", document=key, exc_info=error)
        return None
    path = attempt.work / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return attempt.publish(path, key)


def _with(results: Mapping[str, Any], artifact: Artifact | None) -> dict[str, Any]:
    listed = [*results["artifacts"], *([] if artifact is None else [asdict(artifact)])]
    return {**results, "artifacts": sorted(listed, key=lambda entry: entry["path"])}
