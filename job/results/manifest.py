"""`results.json`, the manifest of a run: built, sealed and validated against its schema."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from job.common import hashing
from job.common.bad_row_reasons import with_reasons
from job.common.host import git_commit, hardware, software
from job.evaluation.comparison import compare_export, compare_full_precision
from job.evaluation.principles import summarize
from job.records import (
    Artifact,
    AttemptRecord,
    DatasetRecord,
    Evaluated,
    Exported,
    ExportedRun,
    ExportRecord,
    Judgement,
    ModelRecord,
    PromptsRecord,
    ScoringPrecision,
    TaskScores,
    TrainingRecord,
)
from job.results.compute import compute_spent
from job.results.cost import compute_cost

SCHEMA = Path(__file__).parents[1].joinpath("results.schema.json")
VERSION = "1.0"


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """The manifest's `run`.

    `part_of` is the id of the run that this one is the first stage of, `exported_run` the finished one that it exports.
    """

    id: str
    attempts: Sequence[AttemptRecord]
    finished: str
    part_of: str | None = None
    exported_run: ExportedRun | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """The manifest's `evaluation`; of what a run does not have, it lacks the field.

    Attributes:
        tasks: From `compare_tasks`.
        measured: From `compare_measured`.
        groups: From `compare_groups`.
        full_precision: From `full_precision_record`.
        near_ties: From `compare_near_ties`.
        precision: That of all scores but an export's.
        prompts: Those of JOB_EVAL__PROMPTS.
        unsafe_answers: How many answers to them are unsafe, by side.
        principles: What a judge says of them.
    """

    tasks: Mapping[str, Any]
    measured: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)
    full_precision: Mapping[str, Any] | None = None
    near_ties: Mapping[str, Any] | None = None
    precision: ScoringPrecision | None = None
    prompts: PromptsRecord | None = None
    unsafe_answers: Mapping[str, int] | None = None
    principles: Mapping[str, Any] | None = None


def build(
    *,
    run: RunSection,
    settings: Mapping[str, Any],
    model: ModelRecord,
    dataset: DatasetRecord,
    training: TrainingRecord,
    evaluation: EvaluationSection,
    exports: Sequence[Mapping[str, Any]] = (),
    gate: Mapping[str, Any],
    artifacts: Sequence[Artifact],
    evidence: Sequence[Artifact],
    gpus: Sequence[Mapping[str, Any]] | None = None,
    image_digest: str | None,
    on_demand_usd_per_hour: float | None,
) -> dict[str, Any]:
    """The sealed manifest.

    `exports` is from `exports_record`, `gate` from `evaluate_gate`. `gpus` are those of all processes, each of which
    sees only its own; None for those of this one. The schema explains every field.
    """
    return _with_compute(
        {
            "schema_version": VERSION,
            "run": _run(run),
            "settings": settings,
            "model": asdict(model),
            "dataset": with_reasons(asdict(dataset)),
            "training": asdict(training),
            "evaluation": _evaluation(evaluation),
            "exports": list(exports),
            "gate": gate,
            "artifacts": [asdict(artifact) for artifact in sorted(artifacts, key=lambda a: a.path)],
            "evidence": [
                {"path": file.path, "bytes": file.bytes, "sha256": file.sha256}
                for file in sorted(evidence, key=lambda file: file.path)
            ],
            "hardware": hardware() if gpus is None else {**hardware(), "gpus": gpus},
            "software": {
                "python": platform.python_version(),
                "packages": software(),
                "git": git_commit(),
                "image_digest": image_digest,
            },
            "cost": compute_cost(
                run.attempts,
                training.seconds,
                on_demand_usd_per_hour,
                taken_over=() if run.exported_run is None else run.exported_run.last_attempts,
            ),
        }
    )


def _run(section: RunSection) -> dict[str, Any]:
    return {
        "id": section.id,
        **({} if section.part_of is None else {"part_of": section.part_of}),
        **({} if section.exported_run is None else {"exported_run": asdict(section.exported_run)}),
        "status": "complete",
        "attempts": [asdict(attempt) for attempt in section.attempts],
        "started": section.attempts[0].started,
        "finished": section.finished,
    }


def _evaluation(section: EvaluationSection) -> dict[str, Any]:
    return {
        "harness": {"name": "lm-eval", "version": metadata.version("lm-eval")},
        "tasks": section.tasks,
        **({"measured": section.measured} if section.measured else {}),
        **({"groups": section.groups} if section.groups else {}),
        **({} if section.full_precision is None else {"full_precision": section.full_precision}),
        **({} if section.near_ties is None else {"near_ties": section.near_ties}),
        **({} if section.precision is None else {"precision": asdict(section.precision)}),
        **({} if section.prompts is None else {"prompts": asdict(section.prompts)}),
        **({} if section.unsafe_answers is None else {"unsafe_answers": dict(section.unsafe_answers)}),
        **({} if section.principles is None else {"principles": dict(section.principles)}),
    }


def _with_compute(built: Mapping[str, Any]) -> dict[str, Any]:
    return sealed({**built, "compute": compute_spent(built)})


def full_precision_record(base: Evaluated, adapter: Mapping[str, TaskScores]) -> dict[str, Any] | None:
    """The manifest's `evaluation.full_precision`; None where the run has none.

    Raises:
        DataError: The base was asked other questions before it was quantized.
    """
    full_precision = base.full_precision
    if full_precision is None:
        return None
    tasks = compare_full_precision(full_precision.scores, base.scores, adapter) if full_precision.scores else {}
    return {
        "dtype": full_precision.dtype,
        **({"not_scored": full_precision.not_scored} if full_precision.not_scored else {}),
        "tasks": tasks,
    }


def unsafe_answers_record(base: Evaluated, adapter: Evaluated) -> dict[str, int] | None:
    """The manifest's `evaluation.unsafe_answers`; None where JOB_DATA__SAFETY_MODEL scored no answers."""
    if base.unsafe_answers is None or adapter.unsafe_answers is None:
        return None
    return {"base": base.unsafe_answers, "adapter": adapter.unsafe_answers}


def principles_record(adapter: Evaluated, judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    """The manifest's `evaluation.principles`; None where nothing was judged."""
    return None if adapter.judged is None else {**asdict(adapter.judged), **summarize(judgements)}


def exports_record(exported: Exported, base: Evaluated, adapter: Mapping[str, TaskScores]) -> list[dict[str, Any]]:
    """The manifest's `exports`: every format, the scores of all its candidates, and which one is published.

    A field that a later version added is left out where it has its default.

    Raises:
        DataError: A candidate was asked other questions than the base or the adapter.
    """
    original = base.full_precision.scores if base.full_precision else None
    return [
        {
            **{name: getattr(export, name) for name in ("format", "candidate", "reason", "dtype", "scored_in")},
            "candidates": {
                name: compare_export(base.scores, adapter, scores, original) if scores else {}
                for name, scores in export.scores.items()
            },
            **({"tasks_not_scored": sorted(base.measured)} if base.measured and not export.not_made else {}),
            **_added(export),
        }
        for export in exported.exports
    ]


def _added(export: ExportRecord) -> dict[str, Any]:
    """The fields with a default that have another value."""
    facts = asdict(export)
    return {
        field.name: facts[field.name]
        for field in fields(export)
        if field.default is not MISSING and facts[field.name] != field.default
    }


def validate(results: Mapping[str, Any]) -> None:
    """Validates a manifest against `results.schema.json`.

    Raises:
        ValueError: One line for each place that does not fit.
    """
    import jsonschema

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    standard = jsonschema.Draft202012Validator
    # JSON Schema accepts 3.0 as an integer; code that computes with it does not.
    types = standard.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    kind = jsonschema.validators.extend(standard, type_checker=types)
    errors = list(kind(schema, format_checker=standard.FORMAT_CHECKER).iter_errors(results))
    if errors:
        lines = (f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors)
        raise ValueError("\n".join(line.removeprefix(": ") for line in lines))


def sealed(results: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest after a round trip through JSON, with a new seal. Call it again after every change."""
    plain: dict[str, Any] = json.loads(hashing.sealed(results))
    return plain
