"""`results.json`, the manifest of a run: built, sealed, validated against its schema, and summarized as text."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from job.common import hashing
from job.common.export_formats import is_adapter
from job.common.host import git_commit, hardware, software
from job.evaluation.comparison import compare_export, compare_full_precision, original_tasks
from job.evaluation.policy import lines as policy_lines
from job.evaluation.principles import summarize
from job.records import (
    Artifact,
    AttemptRecord,
    DatasetRecord,
    Evaluated,
    Exported,
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
from job.runs.layout import REPORT, RESULTS

SCHEMA = Path(__file__).parents[1].joinpath("results.schema.json")


def build(
    *,
    run_id: str,
    part_of: str | None = None,
    settings: Mapping[str, Any],
    attempts: Sequence[AttemptRecord],
    finished: str,
    model: ModelRecord,
    dataset: DatasetRecord,
    training: TrainingRecord,
    tasks: Mapping[str, Any],
    measured: Mapping[str, Any] | None = None,
    groups: Mapping[str, Any] | None = None,
    gate: Mapping[str, Any],
    artifacts: Sequence[Artifact],
    evidence: Sequence[Artifact],
    exports: Sequence[Mapping[str, Any]] = (),
    full_precision: Mapping[str, Any] | None = None,
    near_ties: Mapping[str, Any] | None = None,
    precision: ScoringPrecision | None = None,
    image_digest: str | None,
    on_demand_usd_per_hour: float | None,
    gpus: Sequence[Mapping[str, Any]] | None = None,
    prompts: PromptsRecord | None = None,
    unsafe_answers: Mapping[str, int] | None = None,
    principles: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The sealed manifest.

    `tasks` is from `compare_tasks`, `measured` from `compare_measured`, `groups` from `compare_groups`, `gate` from
    `judge`, `exports` from `exports_record`, `full_precision` from `full_precision_record`, `near_ties` from
    `compare_near_ties`. `precision` is that of all scores but an export's. `gpus` are those of all processes, each of
    which sees only its own; None for those of this one. `part_of` is the id of the run that this one is the first stage
    of, `prompts` are those of JOB_EVAL__PROMPTS; `unsafe_answers` says how many answers to them are, by side, and
    `principles` what a judge says of them.
    The schema explains every field.
    """
    return _with_compute(
        {
            "schema_version": "1.0",
            "run": {
                "id": run_id,
                **({} if part_of is None else {"part_of": part_of}),
                "status": "complete",
                "attempts": [asdict(attempt) for attempt in attempts],
                "started": attempts[0].started,
                "finished": finished,
            },
            "settings": settings,
            "model": asdict(model),
            "dataset": asdict(dataset),
            "training": asdict(training),
            "evaluation": {
                "harness": {"name": "lm-eval", "version": metadata.version("lm-eval")},
                "tasks": tasks,
                **({"measured": measured} if measured else {}),
                **({"groups": groups} if groups else {}),
                **({} if full_precision is None else {"full_precision": full_precision}),
                **({} if near_ties is None else {"near_ties": near_ties}),
                **({} if precision is None else {"precision": asdict(precision)}),
                **({} if prompts is None else {"prompts": asdict(prompts)}),
                **({} if unsafe_answers is None else {"unsafe_answers": dict(unsafe_answers)}),
                **({} if principles is None else {"principles": dict(principles)}),
            },
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
            "cost": compute_cost(attempts, training.seconds, on_demand_usd_per_hour),
        }
    )


def _with_compute(built: Mapping[str, Any]) -> dict[str, Any]:
    return sealed({**built, "compute": compute_spent(built)})


def full_precision_record(base: Evaluated, adapter: Mapping[str, TaskScores]) -> dict[str, Any] | None:
    """The manifest's `evaluation.full_precision`; None where the run has none.

    Raises:
        DataError: The base was asked other questions before it was quantized.
    """
    found = base.full_precision
    if found is None:
        return None
    tasks = compare_full_precision(found.scores, base.scores, adapter) if found.scores else {}
    return {"dtype": found.dtype, **({"not_scored": found.not_scored} if found.not_scored else {}), "tasks": tasks}


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

    What was added by later versions is there where it is not as it was before.

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
        raise ValueError("\n".join(f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors))


def sealed(results: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest after a round trip through JSON, with a new seal. Call it again after every change."""
    plain: dict[str, Any] = json.loads(hashing.sealed(results))
    return plain


def summary(results: Mapping[str, Any], where: str) -> list[str]:
    """The outcome in a few lines: training, accuracy, cost, the report; and in the last, verdict and results."""
    training, cost = results["training"], results["cost"]
    trained = f"{training['steps']} steps on {results['dataset']['rows']:,} examples, loss {training['loss']:.3f}"
    speed = f"{training['tokens_per_second'] or 0:,.0f} target tokens/s"
    lines = [f"{results['model']['id']} + LoRA, {trained}, {speed}"]
    if first := training.get("first_stage"):
        lines.append(f"before that {first['steps']} steps of {first['method']}, loss {first['loss']:.3f}")
    if rewards := training.get("preference"):
        named = {name: rewards[f"rewards/{name}"] for name in ("margins", "accuracies") if f"rewards/{name}" in rewards}
        figures = ", ".join(f"{name} {value:.3f}" for name, value in named.items())
        lines.append(f"{training['method']}, beta {training['beta']:g}; rewards in the last epoch: {figures}")
    against = "" if results["model"]["quantization"] == "none" else " against the quantized base"
    grouped = results["evaluation"].get("groups", {})
    for name, group in grouped.items():
        lines += [f"{name}, {group_line(metric, one, against)}" for metric, one in group["metrics"].items()]
    for name, task in results["evaluation"]["tasks"].items():
        before, after, delta, low, high = (
            100 * x for x in (task["base"]["acc"], task["adapter"]["acc"], task["delta"], *task["ci95"])
        )
        interval = f"{delta:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}"
        lines.append(f"{name}, {task['n']:,} questions: accuracy {before:.2f} % -> {after:.2f} % ({interval})")
        counts = f"{task['improved']} questions better and {task['regressed']} worse"
        lines.append(f"verdict{against}: {task['verdict']}, {counts}, McNemar p = {task['mcnemar_p']:.2g}")
        if rest := task.get("without_overlap"):
            figures = f"{100 * rest['delta']:+.2f} points on the other {rest['n']:,}, {rest['verdict']}{against}"
            lines.append(f"training rows contain {task['n'] - rest['n']:,} of these questions: {figures}")
    for name, found in results["evaluation"].get("measured", {}).items():
        start = f"{name}, {found['n']:,} questions"
        lines += [f"{start}: {measured_line(metric, one, against)}" for metric, one in found["metrics"].items()]
    if why := (results["evaluation"].get("full_precision") or {}).get("not_scored"):
        lines.append(f"the unquantized base was not scored: {why}")
    for name, one in original_tasks(results).items():
        taken, left = (_difference(one[f"{side}_versus_original"]["acc"]) for side in ("base", "adapter"))
        before = f"{name}, unquantized base: {100 * one['scores']['acc']:.2f} %"
        lines.append(f"{before}; quantization {taken}, adapter against it {left}")
    lines += [_export_line(export) for export in results.get("exports", ())]
    lines.append(_cost_line(cost, len(results["run"]["attempts"])))
    if any(artifact["path"] == REPORT for artifact in results["artifacts"]):
        lines.append(f"report: {where.removesuffix(RESULTS)}{REPORT}")
    # A group speaks for its tasks, which may be many
    members = {task for group in grouped.values() for task in group["tasks"]}
    of_groups = [(name, *one) for name, group in grouped.items() for one in group["metrics"].items()]
    verdicts = [f"{name} {metric} {one['verdict']}{against}" for name, metric, one in of_groups]
    verdicts += [
        f"{name} {verdict_in_words(name, results)}" for name in results["evaluation"]["tasks"] if name not in members
    ]
    passed = results["gate"]["passed"]
    gate = [] if passed is None else ["gate met" if passed else "gate not met"]
    judged = results["gate"].get("policy")
    lines += [f"policy: {line}" for line in (policy_lines(judged) if judged else ())]
    gate += [f"policy {judged['outcome']}"] if judged else []
    lines.append(f"{', '.join([*verdicts, *gate])}; results: {where}")
    return lines


_AGAINST_BOTH = {
    ("improved", "inconclusive"): "better than the quantized base but not shown to be better than the unquantized one",
    ("improved", "regressed"): "better than the quantized base but worse than the unquantized one",
    ("inconclusive", "improved"): "inconclusive against the quantized base but better than the unquantized one",
    ("inconclusive", "regressed"): "inconclusive against the quantized base and worse than the unquantized one",
    ("regressed", "improved"): "worse than the quantized base but better than the unquantized one",
    ("regressed", "inconclusive"): "worse than the quantized base and inconclusive against the unquantized one",
}
"""What is said where the verdicts against the quantized and the unquantized base differ."""


def verdict_in_words(name: str, results: Mapping[str, Any]) -> str:
    """The verdict on a task. `improved` alone is better than the base with its original weights, quantized or not."""
    verdict: str = results["evaluation"]["tasks"][name]["verdict"]
    original = original_tasks(results).get(name)
    if original is not None:
        return _AGAINST_BOTH.get((verdict, original["adapter_versus_original"]["acc"]["verdict"]), verdict)
    if verdict == "improved" and results["model"]["quantization"] != "none":
        return "better than the quantized base (the unquantized one was not scored)"
    return verdict


def _difference(found: Mapping[str, Any]) -> str:
    """A paired difference in points with its interval and verdict."""
    delta, low, high = (f"{100 * x:+.2f}" for x in (found["delta"], *found["ci95"]))
    return f"{delta} ({low} to {high}, {found['verdict']})"


def group_line(name: str, found: Mapping[str, Any], against: str = "") -> str:
    """A figure of a group of tasks: its size and weights, both figures, the difference, and the verdict."""
    weights = "questions" if found["weight_by_size"] else "tasks"
    low, high = found["ci95"]
    return (
        f"{found['tasks']} tasks, {found['n']:,} questions, all {weights} weighing the same: {name} "
        f"{found['base']:.4g} -> {found['adapter']:.4g} ({found['delta']:+.4g}, 95 % interval {low:+.4g} to "
        f"{high:+.4g}), {found['verdict']}{against}, {found['improved']} better and {found['regressed']} worse, "
        f"p = {found['p']:.2g}"
    )


def measured_line(name: str, found: Mapping[str, Any], against: str = "") -> str:
    """A metric of a task without choices: both figures, which way is better, the difference, and the verdict."""
    better = "higher" if found["higher_is_better"] else "lower"
    low, high = found["ci95"]
    interval = f"{found['delta']:+.4g}, 95 % interval {low:+.4g} to {high:+.4g}"
    if found["aggregation"] in {"perplexity", "weighted_perplexity"}:
        interval = f"ln of the ratio {interval}"
    return (
        f"{name} {found['base']:.4g} -> {found['adapter']:.4g} ({better} is better; {interval}), "
        f"{found['verdict']}{against}, {found['improved']} better and {found['regressed']} worse, p = {found['p']:.2g}"
    )


def _export_line(export: Mapping[str, Any]) -> str:
    """The accuracies of an exported format's candidates, and which one is published."""
    if export.get("not_made"):
        return f"{export['format']}: not published, since its export failed: {export['not_made']}"
    if export.get("not_scored"):
        return f"{export['format']}: published, not scored: {export['not_scored']}"
    if is_adapter(export["format"]):
        found = [
            f"{task} {100 * one['scores']['acc']:.2f} % "
            f"({100 * one['versus_adapter']['acc']['delta']:+.2f} against the adapter)"
            for task, one in export["candidates"][export["candidate"]].items()
        ]
        return f"{export['format']}: {'; '.join(found)}; published"
    found = [
        f"{task} onto {candidate} weights {100 * one['scores']['acc']:.2f} % "
        f"({100 * one['versus_adapter']['acc']['delta']:+.2f} against the adapter)"
        for candidate, tasks in export["candidates"].items()
        for task, one in tasks.items()
    ]
    outcome = "published" if export.get("published", True) else "not published, but the source of other formats"
    return f"{export['format']}: {'; '.join(found)}; {outcome}: {export['candidate']} ({export['reason']})"


def _cost_line(cost: Mapping[str, Any], attempts: int) -> str:
    """Time, and dollars and energy if they are known."""
    line = f"{cost['seconds']:.0f} s in {attempts} attempt{'s' if attempts > 1 else ''}"
    if cost["usd"] is not None:
        line += f", ${cost['usd']:.2f}"
    if cost["energy_kwh"] is not None:
        line += f", {cost['energy_kwh']:.2f} kWh of the GPU"
    if attempts > 1:
        line += f"; {cost['wasted_seconds']:.0f} s of it wasted"
    return line
