"""The last stage: builds and publishes the manifest, the model card and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from job import log
from job.checkpoints import checkpoint_store
from job.common.formatting import timestamp
from job.common.hashing import sealed
from job.errors import JobError
from job.evaluation.comparison import compare_near_ties, compare_tasks, evaluate_gate
from job.evaluation.groups import compare_groups
from job.evaluation.principles import parse_judgements
from job.evaluation.task_metrics import compare_measured
from job.records import Artifact, Evaluated, Exported, Judgement, ModelRecord, TaskScores, Trained
from job.report import model_card, report
from job.results import bom, inventory, manifest, signing
from job.results.baseline import Baseline
from job.results.completed import read_complete
from job.runs.attempt import Attempt
from job.runs.layout import (
    BOM,
    CARD,
    EXPORT_CARD,
    FINDINGS,
    JUDGEMENTS,
    REPORT,
    RESULTS,
    SIGNATURE,
    answers_key,
    export_folder,
)
from job.runs.run_log import close_run_log, read_exported_run
from job.settings.load import Settings, redacted
from job.stages.handoff import Sources
from job.stages.inputs import private_key
from job.storage.base import delete_in_turn, write_in_turn

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


@dataclass(frozen=True, kw_only=True)
class StageResults:
    """What the stages before this one recorded.

    Attributes:
        base: The base's evaluation.
        trained: The training record and the adapter's files.
        adapter: The adapter's evaluation.
        exported: The other formats, with their evaluations.
    """

    base: Evaluated
    trained: Trained
    adapter: Evaluated
    exported: Exported


def publish(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    stages: StageResults,
    *,
    model: ModelRecord,
    gpus: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Publishes card and report, then the manifest, whose presence marks the run as complete; returns the manifest.

    Args:
        attempt: Where files are published.
        settings: Shown in the manifest, without secrets.
        sources: Data record and baseline are taken from it.
        stages: What is published.
        model: The base and the size of the adapter.
        gpus: The GPUs of all processes, as `host.hardware` describes them.
    """
    # an earlier attempt published it and was then killed
    if (published := read_complete(attempt.store, str(attempt.work))) is not None:
        return published
    checkpoint_store.delete_all_but_intact(
        attempt.store,
        attempt.work / "checkpoints",
        epoch=attempt.number,
        run=attempt.run,
        keep=settings.checkpoint.keep,
    )
    results = _build_manifest(attempt, settings, sources, stages, model=model, gpus=gpus)
    key = private_key(settings.sign)
    results = manifest.sealed(publish_report_and_card(attempt, results, key))
    manifest.validate(results)
    content = sealed(results)
    _sign_run(attempt, results, content, key)
    write_in_turn(attempt.store, RESULTS, content, attempt.store.tag(RESULTS))
    return results


def _build_manifest(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    stages: StageResults,
    *,
    model: ModelRecord,
    gpus: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The manifest without report and cards; publishes the baseline's samples, which are among its artifacts."""
    # read only now: the previous attempt may have been writing its record when this one started
    earlier = close_run_log(attempt.store, attempt.number, attempt.started, attempt.run)
    evaluation = _compare(attempt, sources, stages, model.dtype)
    gate, copies = _judge(attempt, settings, sources, stages, evaluation)
    audit = sources.record.dataset.audit
    findings = [] if audit is None else [Artifact(FINDINGS, audit.bytes, audit.sha256)]
    published = (stages.base, stages.trained, stages.adapter, stages.exported)
    return manifest.build(
        run=manifest.RunSection(
            id=settings.run.id,
            part_of=settings.part_of,
            exported_run=read_exported_run(attempt.store),
            attempts=[*earlier, attempt.record("complete")],
            finished=timestamp(),
        ),
        settings=redacted(settings),
        model=replace(model, licence=sources.record.model_licence),
        dataset=sources.record.dataset,
        training=stages.trained.training,
        evaluation=evaluation,
        exports=manifest.exports_record(stages.exported, stages.base, stages.adapter.scores),
        gate=gate,
        artifacts=[*findings, *(artifact for stage in published for artifact in stage.artifacts), *copies],
        evidence=inventory.collect(attempt.store, attempt.work / "evidence", attempt.number),
        gpus=gpus,
        image_digest=settings.run.image_digest,
        on_demand_usd_per_hour=settings.cost.on_demand_usd_per_hour,
    )


def _compare(attempt: Attempt, sources: Sources, stages: StageResults, dtype: str) -> manifest.EvaluationSection:
    """Compares the adapter with the base; `dtype` is that of training, in which older versions scored."""
    base, adapter, audit = stages.base, stages.adapter, sources.record.dataset.audit
    return manifest.EvaluationSection(
        tasks=compare_tasks(base.scores, adapter.scores, overlap=audit.overlap if audit else {}),
        measured=compare_measured(base.measured, adapter.measured),
        groups=compare_groups(sources.tasks.groups if sources.tasks else {}, base, adapter),
        full_precision=manifest.full_precision_record(base, adapter.scores),
        near_ties=compare_near_ties(base.scores, adapter.scores, base.precision.dtype if base.precision else dtype),
        precision=base.precision,
        prompts=sources.record.prompts,
        unsafe_answers=manifest.unsafe_answers_record(base, adapter),
        principles=manifest.principles_record(adapter, _judgements(attempt, adapter)),
    )


def _judge(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    stages: StageResults,
    evaluation: manifest.EvaluationSection,
) -> tuple[dict[str, Any], list[Artifact]]:
    """(the manifest's `gate`, the published copies of the baseline's samples; see `_publish_baseline`)."""
    scores = _gated_scores(settings, stages.adapter, stages.exported)
    comparisons = compare_tasks(stages.base.scores, scores) if scores else {}
    if settings.gate.on == "adapter":
        comparisons |= {**evaluation.measured, **evaluation.groups}
    baseline, copies = _publish_baseline(attempt, sources.baseline, scores)
    gate = evaluate_gate(
        comparisons,
        **settings.gate.model_dump(exclude={"baseline", "policy"}),
        baseline=baseline,
        policy=sources.policy,
    )
    return gate, copies


def _sign_run(
    attempt: Attempt, results: Mapping[str, Any], content: bytes, key: EllipticCurvePrivateKey | None
) -> None:
    """Publishes the signature of the whole run, before the manifest, whose presence makes it complete.

    An attempt that is killed in between leaves the signature of a manifest that was never written. The next attempt's
    manifest has other times, so that it replaces the signature, or removes it if there is no key.
    """
    if key is None:
        delete_in_turn(attempt.store, SIGNATURE)
    else:
        content = signing.sign(key, results["run"]["id"], signing.files_of_run(results, content), whole_run=True)
        write_in_turn(attempt.store, SIGNATURE, content, attempt.store.tag(SIGNATURE))


def _sign_folders(attempt: Attempt, results: Mapping[str, Any], key: EllipticCurvePrivateKey | None) -> dict[str, Any]:
    """Publishes the signatures of the folders that are used alone; returns the manifest with them."""
    signed, folders = dict(results), signing.signed_folders(results)
    for folder in folders:
        path = f"{folder}{SIGNATURE}"
        if key is None:
            delete_in_turn(attempt.store, path)  # that of an attempt that was killed, and had a key
        else:
            files = signing.files_of(results, folder)
            content = signing.sign(key, folder.rstrip("/").rpartition("/")[2], files)
            signed = _with_artifact(signed, _publish_bytes(attempt, path, content))
    if key is None:
        return signed
    pem = signing.public_key(key)
    paths = [SIGNATURE, *(f"{folder}{SIGNATURE}" for folder in folders)]
    return {**signed, "signing": {"public_key": pem, "key_sha256": signing.key_id(pem), "signatures": paths}}


def _judgements(attempt: Attempt, adapter: Evaluated) -> list[Judgement]:
    """What the judge said, from the file that was published; empty where nothing was judged."""
    files = [artifact for artifact in adapter.artifacts if artifact.path == JUDGEMENTS]
    return [judgement for artifact in files for judgement in parse_judgements(attempt.fetch(artifact).read_bytes())]


def _gated_scores(settings: Settings, adapter: Evaluated, exported: Exported) -> Mapping[str, TaskScores]:
    """The scores that the gate judges: the adapter's, or those of the exported format that is published."""
    for export in exported.exports:
        if export.format == settings.gate.on:
            return export.scores[export.candidate]
    return adapter.scores


def _publish_baseline(
    attempt: Attempt, baseline: Baseline | None, gated_scores: Mapping[str, TaskScores]
) -> tuple[dict[str, Any] | None, list[Artifact]]:
    """Compares what the gate judges with its baseline, and publishes a copy of the baseline's samples as evidence."""
    if baseline is None:
        return None, []
    copies = []
    for task in gated_scores:
        key = answers_key(task, "baseline")
        path = attempt.work / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(baseline.tasks[task].data)
        copies.append(attempt.publish(path, key))
    return baseline.compared(gated_scores), copies


def publish_report_and_card(
    attempt: Attempt, results: Mapping[str, Any], key: EllipticCurvePrivateKey | None = None
) -> dict[str, Any]:
    """Publishes the report, and the cards of the adapter and of all exports; returns the manifest that lists them.

    With a key, the folders of adapter and exports get their signatures, which are over the cards too.

    If one cannot be rendered, the error is logged and the manifest is published without it: hours of training must not
    be lost to a template. Errors of the store are raised as usual.

    Raises:
        JobError: The store does not accept a file.
    """
    signer = None if key is None else signing.key_id(signing.public_key(key))
    complete = _with_artifact(
        results,
        _publish_document(
            attempt,
            CARD,
            lambda: model_card.render_model_card(results, report.read_prompts(results, attempt.fetch), signer),
        ),
    )
    for export in results["exports"]:
        if export.get("published", True):
            card = export_folder(export["format"]) + EXPORT_CARD
            render = partial(model_card.render_export_card, results, export, signer)
            complete = _with_artifact(complete, _publish_document(attempt, card, render))
    complete = _with_artifact(complete, _publish_document(attempt, BOM, partial(bom.build, complete)))
    complete = _sign_folders(attempt, complete, key)
    return _with_artifact(
        complete,
        _publish_document(
            attempt, REPORT, lambda: report.render_report(complete, report.read_report_data(complete, attempt.fetch))
        ),
    )


def _publish_document(attempt: Attempt, key: str, make: Callable[[], bytes]) -> Artifact | None:
    """Publishes what `make` renders; returns None, and logs the error, if rendering fails."""
    try:
        content = make()
    except JobError:
        raise
    except Exception as error:  # noqa: BLE001 - see publish_report_and_card
        log.get_logger().error(
            "report or model card cannot be written; the results are published without it",
            document=key,
            exc_info=error,
        )
        return None
    return _publish_bytes(attempt, key, content)


def _publish_bytes(attempt: Attempt, key: str, content: bytes) -> Artifact:
    path = attempt.work / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return attempt.publish(path, key)


def _with_artifact(results: Mapping[str, Any], artifact: Artifact | None) -> dict[str, Any]:
    listed = [*results["artifacts"], *([] if artifact is None else [asdict(artifact)])]
    return {**results, "artifacts": sorted(listed, key=lambda entry: entry["path"])}
