"""Export: makes the requested formats, scores each on the run's questions, and publishes them.

First copies of the adapter in other dtypes: they are scored on the run's base, which is still in memory. Then the
merge, of which there may be two candidates: both are scored, and one is chosen. All other formats are made from that
one, whether or not it is published itself. What is scored are the very files that are published, loaded as separate
models.

A restart copies and merges again, reuses the cached scores, and uploads only what is not in the store. A
format made from the merged model that is complete in the store is not made again.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from job import log
from job.common.export_formats import (
    MERGED,
    adapter_copies,
    derived,
    find_format,
    needs_merge,
    split_name,
)
from job.common.hashing import seal
from job.common.out_of_memory import memory_errors
from job.common.validation import adapter_of
from job.data.calibration import calibration_examples
from job.errors import Unreachable
from job.evaluation.comparison import choose_candidate
from job.evaluation.score_cache import ScoreCache, score_conditions
from job.evaluation.scoring import score_sequence
from job.export.adapter_copy import write_adapter_copy
from job.export.exported_model import ExportedModel, ScoringOptions, load_exported
from job.export.formats import DerivedInputs, derived_format
from job.export.merge import write_merged
from job.export.merge_plan import plan_merge
from job.export.quantizable import CannotMake
from job.model.adapter_files import load_adapter
from job.model.device import short_name
from job.model.free_model import free_model
from job.model.fused.precise_forward import has_foreign_layers, why_not_precise
from job.model.placed_weights import taking_part
from job.records import (
    Artifact,
    DerivedExport,
    Evaluated,
    Exported,
    ExportRecord,
    QuantizationRecord,
    Question,
    ScoringPrecision,
    Trained,
)
from job.runs.attempt import Attempt
from job.runs.layout import ADAPTER, SCORES, derived_export, export_side
from job.settings.load import Settings
from job.stages.evaluate import forward_facts, load_published_adapter, score_model
from job.stages.export_check import check_export
from job.stages.export_files import ExportFiles, publish_files, require_same_files
from job.stages.handoff import Loaded, Sources
from job.stages.pull_model import fetch_original
from job.stages.scoring_precision import is_precise, precision_facts, scoring_in
from job.storage.open import storage_options

_OF_QUANTIZED, _NOT_MADE = "quantization", "not made"
_ON_BASE = "base"
"""Name of the only candidate of a copy of the adapter, which is scored on the run's base, quantized as in training."""


@dataclass(frozen=True)
class _Scored:
    """A candidate's scores (None in all processes but 0), the dtypes they were computed in, or why there are none."""

    evaluated: Evaluated | None
    dtype: str
    scored_in: str
    not_scored: str = ""


@dataclass(frozen=True)
class _FormatResult:
    """A format: its record, and the artifacts of its files and answers."""

    record: ExportRecord
    artifacts: list[Artifact]


@dataclass(frozen=True)
class _Export:
    """The inputs of every step of the stage."""

    attempt: Attempt
    settings: Settings
    sources: Sources
    scoring: ScoringOptions
    precision: ScoringPrecision | None


def export(
    attempt: Attempt,
    settings: Settings,
    sources: Sources,
    loaded: Loaded,
    trained: Trained,
    *,
    precision: ScoringPrecision | None = None,
) -> Exported | None:
    """Makes, scores and publishes all formats. The model in memory is freed, since no later stage uses it.

    `precision` is the precision in which base and adapter were scored; None in records of older versions.
    """
    dtype = loaded.model.get_base_model().dtype
    scoring = ScoringOptions(
        loaded.model.device,
        dtype,
        settings.train.max_length,
        loaded.packing.packed,
        attempt.processes.place.local_world_size,
        attempt.check_stop,
    )
    context = _Export(attempt, settings, sources, scoring, precision)
    formats = [_adapter_copy(context, name, loaded, trained) for name in adapter_copies(settings.export.formats)]
    if needs_merge(settings.export.formats):
        load_published_adapter(attempt, loaded, trained)
        merged, why_only_one = _make_merged(context, loaded)
    free_model(loaded.model)
    if needs_merge(settings.export.formats):
        formats += _whole_models(context, merged, why_only_one)
    if not attempt.processes.leads:
        return None
    results = [result for result in formats if result is not None]
    artifacts = [artifact for result in results for artifact in result.artifacts]
    return Exported([result.record for result in results], artifacts, precision)


def _whole_models(
    context: _Export, merged: Mapping[str, ExportFiles], why_only_one: str
) -> Iterator[_FormatResult | None]:
    """Makes all formats that are whole models: the merged model, and those that are made from it."""
    attempt, settings = context.attempt, context.settings
    scored = {name: _score(context, MERGED, name, files) for name, files in merged.items()}
    record = _choose(context, merged, scored, why_only_one)
    candidate = attempt.processes.broadcast("merged model", lambda: "" if record is None else record.candidate)
    if record is not None:
        artifacts = [
            artifact for result in scored.values() if result.evaluated for artifact in result.evaluated.artifacts
        ]
        artifacts += publish_files(attempt, merged[candidate], MERGED) if record.published else []
        yield _FormatResult(record, artifacts)
    for name, files in merged.items():
        if name != candidate and attempt.processes.place.local_rank == 0:
            shutil.rmtree(files.folder, ignore_errors=True)  # the formats to come need the disk
    for name in derived(settings.export.formats):
        yield _derived(context, name, candidate, merged[candidate])


def _adapter_copy(context: _Export, name: str, loaded: Loaded, trained: Trained) -> _FormatResult | None:
    """Copies the adapter in another dtype, scores it on the run's base, publishes it; None in all processes but 0."""
    attempt, (_, kind) = context.attempt, split_name(name)
    folder = attempt.work / "candidates" / derived_export(name)

    def make() -> dict[str, Any]:
        published = [attempt.fetch(artifact) for artifact in trained.artifacts if artifact.path.startswith(ADAPTER)]
        try:
            write_adapter_copy(published, folder, kind)
        except CannotMake as error:
            return {_NOT_MADE: str(error)}
        return ExportFiles.of(folder).as_json()

    outcome = attempt.processes.broadcast_on_machine(name, make)
    scored_in = context.precision.dtype if context.precision else short_name(context.scoring.compute_dtype)
    record = ExportRecord(name, _ON_BASE, "a copy of the adapter", kind, scored_in, {})
    if why := outcome.get(_NOT_MADE):  # the same on all machines: they have the same adapter
        return _not_made(context, replace(record, dtype="", scored_in=""), why)
    files = ExportFiles.from_json(outcome)
    require_same_files(attempt, name, [files])
    load_adapter(loaded.model, files.folder, loaded.names)
    # `adapter` hashes all files: the same key is the same adapter.
    facts = {**forward_facts(loaded, loaded.record), "adapter": dict(files.hashes)}
    facts |= precision_facts(context.precision, context.scoring.device)
    log.get_logger().info("evaluating", export=name, candidate=_ON_BASE, dtype=record.scored_in)
    cache = ScoreCache(attempt.store, SCORES, context.settings.run.id, score_conditions(facts))
    side = export_side(name, _ON_BASE)
    scoring = scoring_in(context.precision, lambda: loaded.model, context.settings.train.gpu_memory_gb)
    scored = score_model(
        attempt,
        context.settings,
        context.sources,
        loaded.model,
        cache=cache,
        side=side,
        scoring=scoring,
        measured=False,
    )
    if scored is None:
        return None
    record = replace(record, scores={_ON_BASE: scored.scores}, bytes=files.bytes)
    log.get_logger().info("exported", export=name, candidate=_ON_BASE, bytes=files.bytes)
    return _FormatResult(record, [*scored.artifacts, *publish_files(attempt, files, name)])


def _not_made(context: _Export, record: ExportRecord, why: str) -> _FormatResult | None:
    """The record of a format that turned out after training to be impossible: the run continues without it."""
    log.get_logger().warning("an export failed; the run goes on without it", export=record.format, why=why)
    if not context.attempt.processes.leads:
        return None
    return _FormatResult(replace(record, scores={record.candidate: {}}, published=False, not_made=why), [])


def _make_merged(context: _Export, loaded: Loaded) -> tuple[dict[str, ExportFiles], str]:
    """The candidates of the merge, on this machine's disk; and why there is only one, where that is so."""
    attempt = context.attempt

    def make() -> dict[str, Any]:
        original = context.sources.original
        if original is None:
            storage = storage_options(context.settings.storage)
            original = fetch_original(attempt, context.settings.model.id, storage, context.sources.record)
        options, gate_format = context.settings.export, context.settings.gate.on
        merges = check_export(attempt, options, gate_format, original, loaded).merges
        plan = plan_merge(loaded.model, original)
        files_by_candidate = {}
        for name in merges.names:
            folder = attempt.work / "candidates" / MERGED / name
            write_merged(
                loaded.model,
                plan,
                name,
                folder,
                tokenizer=context.sources.tokenizer,
                added_tokens=context.settings.model.add_tokens,
                check_stop=attempt.check_stop,
            )
            files_by_candidate[name] = ExportFiles.of(folder).as_json()
        return {"only": merges.only, "made": files_by_candidate}

    with taking_part(loaded.model):  # the base's weights may be sharded over all processes
        written = make() if attempt.processes.place.local_rank == 0 else {}
    shared = attempt.processes.broadcast_on_machine("exported", lambda: written)
    candidates = {name: ExportFiles.from_json(files) for name, files in shared["made"].items()}
    require_same_files(attempt, MERGED, list(candidates.values()))
    return candidates, shared["only"]


def _derived(context: _Export, name: str, candidate: str, merged: ExportFiles) -> _FormatResult | None:
    """Makes a format from the merged model, scores and publishes it; None in all processes but 0."""
    attempt = context.attempt
    origin = seal({"files": dict(merged.hashes)})
    earlier = attempt.recorded(derived_export(name), DerivedExport) if attempt.processes.leads else None
    is_complete = earlier is not None and earlier.merged == origin and not attempt.damaged(earlier.artifacts)
    if attempt.processes.broadcast("format of before", lambda: is_complete):
        log.get_logger().info("format was exported by an earlier attempt", export=name)
        return None if earlier is None else _FormatResult(earlier.export, earlier.artifacts)
    derived_by, _ = derived_format(name)
    work = attempt.work / "candidates" / derived_export(name)
    outcome = attempt.processes.broadcast_on_machine(name, lambda: _make_derived(context, name, merged, work))
    failures = attempt.processes.gather(f"failures of {name}", outcome.get(_NOT_MADE, ""))
    record = ExportRecord(name, candidate, "made from the merged model that was selected", "", "", {})
    if why := next(filter(None, failures), ""):
        return _not_made(context, record, why)
    files = ExportFiles.from_json(outcome)
    require_same_files(attempt, name, [files])
    cannot = derived_by.cannot_score(context.scoring.device)
    scored = _score(context, name, candidate, files, load=derived_by.load, cannot=cannot)
    if not attempt.processes.leads:
        return None
    record = replace(
        record,
        dtype=scored.dtype,
        scored_in=scored.scored_in,
        scores={candidate: scored.evaluated.scores if scored.evaluated else {}},
        bytes=files.bytes,
        quantization=adapter_of(QuantizationRecord).validate_python(outcome[_OF_QUANTIZED]),
        not_scored=scored.not_scored,
    )
    log.get_logger().info("exported", export=name, candidate=candidate, bytes=files.bytes)
    artifacts = [*(scored.evaluated.artifacts if scored.evaluated else []), *publish_files(attempt, files, name)]
    attempt.write_record(derived_export(name), json.dumps(asdict(DerivedExport(origin, record, artifacts))))
    shutil.rmtree(work, ignore_errors=True)
    return _FormatResult(record, artifacts)


def _make_derived(context: _Export, name: str, merged: ExportFiles, work: Path) -> dict[str, Any]:
    """Makes a format from the merged model, in the first process of a machine.

    Returns:
        As JSON, for the other processes: `ExportFiles.as_json` and the record of the quantization, or why the format
        cannot be made.

    Raises:
        Unreachable: The disk is full.
        TrainingFailed: Memory ran out.
    """
    settings, (derived_by, kind) = context.settings, derived_format(name)
    rows, calibration = list[tuple[int, ...]](), None
    if find_format(name).calibrated:
        rows, calibration = calibration_examples(
            context.sources.examples, settings.run.seed, settings.export.calibration_rows
        )
    log.get_logger().info("quantizing", export=name, calibration_rows=len(rows))
    inputs = DerivedInputs(
        merged=merged.folder,
        kind=kind,
        folder=work / "files",
        work=work / "work",
        calibration=rows,
        device=context.scoring.device,
        seed=settings.run.seed,
        check_stop=context.attempt.check_stop,
        steps=settings.export.quantization_steps,
    )
    work.mkdir(parents=True)
    try:
        with memory_errors(f"{name} was made", "leave it out of JOB_EXPORT__FORMATS"):
            record = replace(derived_by.make(inputs), calibration=calibration)
    except CannotMake as error:
        if os.strerror(errno.ENOSPC) in str(error):  # of a separate process: another machine can make it
            raise Unreachable(
                f"{name} cannot be written, since the disk is full: {error}; free space, or give "
                "the machine a larger disk"
            ) from error
        return {_NOT_MADE: str(error)}
    shutil.rmtree(inputs.work, ignore_errors=True)
    return {**ExportFiles.of(inputs.folder).as_json(), _OF_QUANTIZED: asdict(record)}


def _score(
    context: _Export,
    name: str,
    candidate: str,
    files: ExportFiles,
    *,
    load: Callable[[Path, ScoringOptions], ExportedModel] = load_exported,
    cannot: str = "",
) -> _Scored:
    """Loads the files as a separate model, and scores it on all questions; not if it cannot be scored here."""
    if cannot:
        log.get_logger().warning("an exported format is not scored", export=name, why=cannot)
        return _Scored(None, "", "", cannot)
    exported = load(files.folder, context.scoring)
    scored_in, scoring, facts = exported.scored_in, exported.scoring, dict(exported.facts)
    if scoring is None and context.precision is not None and is_precise(context.precision):
        # compressed-tensors finishes loading in the first forward pass, and wraps the modules then
        score_sequence(exported.model, [Question((0,), ((0,),))])
        if why := why_not_precise(exported.model):
            log.get_logger().warning("an exported format is not scored in fp16 as the base was", export=name, why=why)
        else:
            if not has_foreign_layers(exported.model):  # which multiply in the dtype of the model
                scored_in = context.precision.dtype
            scoring = scoring_in(context.precision, lambda: exported.model, context.settings.train.gpu_memory_gb)
            facts |= precision_facts(context.precision, context.scoring.device)
    # `exported` hashes all files: the same key is the same model.
    facts |= {"exported": dict(files.hashes), "dtype": exported.scored_in, "packed": context.scoring.packed}
    attempt = context.attempt
    cache = ScoreCache(attempt.store, SCORES, context.settings.run.id, score_conditions(facts))
    side = export_side(name, candidate)
    log.get_logger().info("evaluating", export=name, candidate=candidate, dtype=scored_in)
    try:
        evaluated = score_model(
            attempt,
            context.settings,
            context.sources,
            exported.model,
            cache=cache,
            side=side,
            scoring=scoring,
            one_by_one=exported.one_by_one,
            measured=False,
        )
    finally:
        exported.close()
    return _Scored(evaluated, exported.dtype, scored_in)


def _choose(
    context: _Export, merged: Mapping[str, ExportFiles], scored: Mapping[str, _Scored], why_only_one: str
) -> ExportRecord | None:
    """Which candidate of the merge is published, and why; None in all processes but 0."""
    if not context.attempt.processes.leads:
        return None
    scores = {name: result.evaluated.scores for name, result in scored.items() if result.evaluated}
    candidate, reason = (next(iter(scores)), why_only_one) if len(scores) == 1 else choose_candidate(scores)
    log.get_logger().info("exported", export=MERGED, candidate=candidate, reason=reason)
    return ExportRecord(
        MERGED,
        candidate,
        reason,
        scored[candidate].dtype,
        scored[candidate].scored_in,
        scores,
        published=MERGED in context.settings.export.formats,
        bytes=merged[candidate].bytes,
    )
