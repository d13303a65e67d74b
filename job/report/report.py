"""The HTML report of a run, made only from the manifest, the metrics and the samples.

The command `report` therefore writes the same bytes again from the published files; and where the run was pushed or
served since, a section about that in addition.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic_core import from_json

from job.common import formatting
from job.common.bad_row_reasons import by_reason
from job.common.validation import adapter_of
from job.evaluation.comparison import original_tasks
from job.evaluation.prompt_answers import parse_answers
from job.evaluation.statistics import wilson_interval
from job.records import Artifact, StepMetrics, ValidationMetrics
from job.report import audit_wording, charts, export_wording, wording
from job.report.changed_answers import changed_answers
from job.report.prompts import ShownPrompt, shown_prompts
from job.report.templating import render
from job.report.timeline import bars, by_stage, restarts
from job.results.after_run import AfterRun
from job.results.cost import OUTSIDE, repeated_steps
from job.results.history import History
from job.runs.layout import FIRST_STAGE, METRICS, REPORT, VALIDATIONS, Stage, answers_key, prompts_key
from job.settings.load import preset_values

FIRST_QUESTIONS, MAX_QUESTIONS = 5, 40
"""Number of changed answers shown for each task and direction: at first, and after "Show more"."""

FIRST_PROMPTS = 5
"""Prompts whose answers are shown at first; the others after "Show more"."""

STAGE_NAMES = {stage.value: stage.replace("-", " ") for stage in Stage} | {OUTSIDE: "loading"}

PREFERENCE_CHARTS = (
    ("rewards/margins", "Reward margin", "chosen less rejected"),
    ("rewards/accuracies", "Reward accuracy", "share of the pairs in which chosen has the higher reward"),
)
"""Metrics of preferences that are drawn: name, title, unit."""

_NOTHING = AfterRun()

Records = list[dict[str, Any]]


class _Answer(BaseModel):
    """The fields of a sample (`evaluation.samples.Sample`) that the report shows; others are allowed."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str
    question: str | None = None
    choices: list[Any] | None = None
    log_likelihoods: list[float]
    prediction: int
    acc: float


@dataclass(frozen=True)
class ReportData:
    """What the report shows besides the manifest: metrics of every step; by task, the samples of base and adapter.

    `validations` is empty where nothing was validated, `first_stage` (metrics of its steps) where there was one stage,
    `prompts` where none were asked.
    """

    metrics: list[StepMetrics]
    answers: dict[str, tuple[Records, Records]]
    validations: tuple[ValidationMetrics, ...] = ()
    first_stage: tuple[StepMetrics, ...] = ()
    prompts: tuple[ShownPrompt, ...] = ()


def read_report_data(results: Mapping[str, Any], fetch: Callable[[Artifact], Path]) -> ReportData:
    """Reads metrics and samples.

    Args:
        results: The manifest.
        fetch: Returns a local copy of a published file.

    Raises:
        KeyError: The manifest does not list one of the files.
        ValueError: A line is not JSON, or not a step's metrics, or not an answer as the job writes it.
    """
    first = results["training"].get("first_stage")
    files = [*results["artifacts"], *([first["metrics"]] if first else [])]
    published = {artifact["path"]: Artifact(**artifact) for artifact in files}
    kinds: dict[str, TypeAdapter[Any]] = {
        METRICS: adapter_of(StepMetrics),
        VALIDATIONS: adapter_of(ValidationMetrics),
        f"{FIRST_STAGE}{METRICS}": adapter_of(StepMetrics),
    }

    def lines(path: str) -> list[bytes]:
        return [line for line in fetch(published[path]).read_bytes().split(b"\n") if line]

    def answers(path: str) -> Records:
        return [_Answer.model_validate(from_json(line, allow_inf_nan=False)).model_dump() for line in lines(path)]

    samples_by_side = {
        task: (answers(answers_key(task, "base")), answers(answers_key(task, "adapter")))
        for task in results["evaluation"]["tasks"]
    }
    for pair in samples_by_side.values():
        changed_answers(*pair)  # here, and not while the page is made: it is the files that are wrong

    def metrics(path: str) -> list[Any]:
        return [kinds[path].validate_python(from_json(line, allow_inf_nan=False)) for line in lines(path)]

    validations = metrics(VALIDATIONS) if results["training"].get("validation") else []
    before = metrics(f"{FIRST_STAGE}{METRICS}") if first else []
    return ReportData(
        metrics(METRICS), samples_by_side, tuple(validations), tuple(before), read_prompts(results, fetch)
    )


def read_prompts(results: Mapping[str, Any], fetch: Callable[[Artifact], Path]) -> tuple[ShownPrompt, ...]:
    """The prompts of a run with their answers; empty where none were asked. Raises as `read_report_data`."""
    if not results["evaluation"].get("prompts"):
        return ()
    published = {artifact["path"]: Artifact(**artifact) for artifact in results["artifacts"]}
    sides = (parse_answers(fetch(published[prompts_key(side)]).read_bytes()) for side in ("base", "adapter"))
    return tuple(shown_prompts(*sides))


def render_report(results: Mapping[str, Any], evidence: ReportData, after: AfterRun = _NOTHING) -> bytes:
    """The page as UTF-8 HTML. A manifest that lists the report itself gives the same page as one before that.

    Args:
        results: The manifest.
        evidence: Metrics and samples.
        after: Where the run was pushed, and how it was served, since.
    """
    tasks, attempts = results["evaluation"]["tasks"], results["run"]["attempts"]
    accuracies = {name: wording.accuracies(name, results) for name in tasks}
    repeated, all_exact, repeats_exact = repeated_steps(results)
    text = render(
        "report.html",
        escape=True,
        **{
            key: results[key] for key in ("run", "model", "dataset", "training", "gate", "hardware", "software", "cost")
        },
        harness=results["evaluation"]["harness"],
        measured=results["evaluation"].get("measured", {}),
        compute=results.get("compute"),
        signing=results.get("signing"),
        groups=results["evaluation"].get("groups", {}),
        group_chart=_group_differences(results["evaluation"].get("groups", {})),
        skipped=by_reason(results["dataset"]["skipped"]),
        learned=wording.learned(results["training"]),
        fp8=wording.in_fp8(results["training"]),
        tasks=tasks,
        headline=wording.headline(results),
        explanations={
            name: [
                part
                for explain in (
                    wording.explanation,
                    wording.quantization_cost,
                    wording.near_ties,
                    wording.without_overlap,
                )
                if (part := explain(name, results))
            ]
            for name in tasks
        },
        original=original_tasks(results),
        scope=wording.scope(results["evaluation"]),
        exports=(exported := export_wording.exports(results)),
        export_charts=_export_intervals(exported),
        audit=audit_wording.audit(results["dataset"]),
        audit_safety=audit_wording.audit_safety(results["dataset"]),
        unsafe_answers=audit_wording.unsafe_answers(results),
        principles=wording.principles(results),
        audit_statistics=audit_wording.audit_statistics(results["dataset"]),
        policy_rules=wording.policy_rules(results["gate"]),
        baseline_dtype=wording.other_dtype_of_baseline(results),
        pushed=after.pushed,
        served=[(check, export_wording.about_served(check)) for check in after.served],
        accuracies=accuracies,
        charts={name: _intervals(rows) for name, rows in accuracies.items()},
        changed={name: changed_answers(*sides) for name, sides in evidence.answers.items()},
        first_questions=FIRST_QUESTIONS,
        most_questions=MAX_QUESTIONS,
        prompts=evidence.prompts,
        first_prompts=FIRST_PROMPTS,
        asked=results["evaluation"].get("prompts"),
        lines=_lines(evidence, restarts(attempts), results["training"].get("validation")),
        validation=wording.validation(results["training"], results["dataset"]),
        restarts=restarts(attempts),
        bars=bars(attempts, repeats_exact),
        repeated=repeated,
        repeated_exact=all_exact,
        by_stage=by_stage(attempts),
        stage_names=STAGE_NAMES,
        preset=_value(results, "preset"),
        settings=own_settings(results["settings"]),
        artifacts=[artifact for artifact in results["artifacts"] if artifact["path"] != REPORT],
        location=_location(results),
    )
    # JSON can hold unpaired surrogates, which UTF-8 cannot
    return text.encode("utf-8", errors="replace")


def render_history(history: History) -> bytes:
    """The control chart of `compare --history` as a page, UTF-8 HTML."""
    limits = None if history.limits is None else (history.limits.low, history.limits.centre, history.limits.high)
    chart = charts.control_chart(
        [(point.finished[:10], point.value) for point in history.points], limits, "{:g}".format
    )
    return render("history.html", escape=True, history=history, chart=chart).encode("utf-8", errors="replace")


def own_settings(settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """The settings the user gave that differ from the preset, as text; without `preset` and `run.id`."""
    preset = preset_values(str(settings.get("preset", {}).get("value")))
    return [
        {
            "name": name,
            "value": _written(setting["value"]),
            "preset": _written(preset.get(name)),
            "source": setting["source"],
        }
        for name, setting in settings.items()
        if name not in {"preset", "run.id"}
        and not setting["source"].startswith(("default", "preset"))
        and setting["value"] != preset.get(name)
    ]


def _written(value: Any) -> str:
    """A setting as one would write it; a dash for None."""
    if value is None:
        return "\N{EN DASH}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _location(results: Mapping[str, Any]) -> str:
    """The run's folder, as `settings.training_stages.folder_of` has it."""
    output, run = str(_value(results, "run.output")).rstrip("/"), results["run"]
    whole_run = run.get("part_of")
    return f"{output}/{run['id']}" if whole_run is None else f"{output}/{whole_run}/{FIRST_STAGE.rstrip('/')}"


def _value(results: Mapping[str, Any], setting: str) -> Any:
    return results["settings"].get(setting, {}).get("value", "?")


def _intervals(rows: list[dict[str, Any]]) -> dict[str, charts.IntervalChart]:
    """Two charts of a task: the accuracies by metric and side, and the differences by metric."""
    accuracies = [
        _accuracy_span(f"{name}, {row['metric']}", side, accuracy, interval)
        for row in rows
        for side, name, accuracy, interval in row["sides"]
    ]
    differences = [
        _difference_span(f"{name}, {row['metric']}", difference)
        for row in rows
        for name, difference in row["differences"]
    ]
    return {
        "accuracy": charts.interval_chart(accuracies, _percent_tick, zero=False),
        "difference": charts.interval_chart(differences, _points_tick, zero=True),
    }


def _export_intervals(exports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, charts.IntervalChart]]:
    """By task, charts of the exported models: their accuracies below the adapter's, and what each has lost to it."""
    rows = [row for export in exports for row in export["rows"]]
    charts_by_task = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        n, accuracies = of_task[0]["n"], [("adapter", "adapter", of_task[0]["adapter"])]
        accuracies += [(row["candidate"], "export", row["acc"]) for row in of_task]
        versus = [(row["candidate"], row["versus_adapter"]) for row in of_task]
        charts_by_task[task] = {
            "accuracy": charts.interval_chart(
                [_accuracy_span(*side, wilson_interval(round(side[2] * n), n)) for side in accuracies],
                _percent_tick,
                zero=False,
            ),
            "difference": charts.interval_chart(
                [_difference_span(f"{name}, against adapter", comparison) for name, comparison in versus],
                _points_tick,
                zero=True,
            ),
        }
    return charts_by_task


def _group_differences(groups: Mapping[str, Any]) -> charts.IntervalChart | None:
    """The differences of all figures of groups, in the unit of each; None without groups."""
    spans = []
    for name, group in groups.items():
        for metric, comparison in group["metrics"].items():
            low, high = comparison["ci95"]
            text = f"{comparison['delta']:+.3g} ({low:+.3g} to {high:+.3g})".replace("-", "\N{MINUS SIGN}")
            spans.append((f"{name}, {metric}", comparison["verdict"], text, low, comparison["delta"], high))
    if not spans:
        return None
    return charts.interval_chart(spans, lambda value: f"{value:+.3g}" if value else "0", zero=True)


def _accuracy_span(
    label: str, kind: str, accuracy: float, interval: tuple[float, float]
) -> tuple[str, str, str, float, float, float]:
    """An accuracy with its interval, as `charts.interval_chart` takes it."""
    text = f"{formatting.percent(accuracy)} ({_range(interval, formatting.percent)})"
    return label, kind, text, interval[0], accuracy, interval[1]


def _difference_span(label: str, comparison: Mapping[str, Any]) -> tuple[str, str, str, float, float, float]:
    """A paired difference with its interval, as `charts.interval_chart` takes it."""
    low, high = comparison["ci95"]
    text = f"{formatting.points(comparison['delta'])} points ({_range(comparison['ci95'], formatting.points)})"
    return label, comparison["verdict"], text, low, comparison["delta"], high


def _percent_tick(value: float) -> str:
    return f"{100 * value:.4g} %"


def _points_tick(value: float) -> str:
    return f"{100 * value:+.4g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _range(interval: tuple[float, float], write: Callable[[float], str]) -> str:
    """`low to high`, without the unit: the estimate before it has one."""
    low, high = (write(bound).partition("\N{NO-BREAK SPACE}")[0] for bound in interval)
    return f"{low} to {high}"


def _lines(evidence: ReportData, marks: list[float], validation: Mapping[str, Any] | None) -> list[charts.LineChart]:
    """Charts of losses, learning rate, speed and memory by step; without those that were not measured."""
    metrics = evidence.metrics
    validated = [(entry.step, entry.loss) for entry in evidence.validations]
    kept_step = validation["kept_step"] if validation else None

    def measured(name: str) -> list[tuple[int, float]]:
        return [(step.step, value) for step in metrics if (value := step.measured.get(name)) is not None]

    def preferred(name: str, records: Sequence[StepMetrics | ValidationMetrics]) -> list[tuple[int, float]]:
        return [(record.step, record.preference[name]) for record in records if name in record.preference]

    memory = measured("memory_bytes")
    unit, scale = ("GiB", 2**30) if max((value for _, value in memory), default=0) >= 2**31 else ("MiB", 2**20)
    memory = [(step, value / scale) for step, value in memory]
    drawn = (
        charts.line_chart(
            "Loss",
            "" if any(m.preference for m in metrics) else "nats a token",
            [(m.step, m.loss) for m in metrics],
            formatting.figure,
            marks=marks,
            from_zero=False,
            second=validated,
            dot=kept_step,
        ),
        *(
            charts.line_chart(
                title,
                unit,
                preferred(name, metrics),
                formatting.figure,
                marks=marks,
                from_zero=False,
                second=preferred(name, evidence.validations),
                dot=kept_step,
            )
            for name, title, unit in PREFERENCE_CHARTS
        ),
        charts.line_chart(
            "Learning rate", "", [(m.step, m.learning_rate) for m in metrics], formatting.figure, marks=marks
        ),
        charts.line_chart(
            "Loss of the first stage",
            "nats a token",
            [(m.step, m.loss) for m in evidence.first_stage],
            formatting.figure,
            from_zero=False,
        ),
        charts.line_chart("Speed", "target tokens/s", measured("tokens_per_second"), formatting.figure, marks=marks),
        charts.line_chart("Memory", f"{unit} in use", memory, formatting.figure, marks=marks),
    )
    return [plot for plot in drawn if plot is not None]
