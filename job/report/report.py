"""The report: one HTML page on a run, drawn from its manifest and the files beside it, and from nothing else.

So it can be drawn again from what was published, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.common import formatting
from job.records import Artifact, StepMetrics
from job.report import charts, wording
from job.report.changed_answers import changed
from job.report.templating import render
from job.report.timeline import bars, by_stage, restarts
from job.results.cost import OUTSIDE
from job.runs.layout import REPORT
from job.settings.load import preset_values

FIRST_QUESTIONS, MOST_QUESTIONS = 5, 40
"""Of each task and direction: how many stand open, and how many can be read at all."""

STAGE_NAMES = {
    "pull": "pull",
    "evaluate-base": "evaluate base",
    "train": "train",
    "evaluate-adapter": "evaluate adapter",
    "publish": "publish",
    OUTSIDE: "loading",
}

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class ReportData:
    """What lies beside the manifest: every step's metrics, and by task the answers of both models."""

    metrics: list[StepMetrics]
    answers: dict[str, tuple[Records, Records]]


def read_report_data(results: Mapping[str, Any], fetch: Callable[[Artifact], Path]) -> ReportData:
    """Reads it, from wherever `fetch` gets a published file."""
    published = {artifact["path"]: Artifact(**artifact) for artifact in results["artifacts"]}

    def lines(path: str) -> Records:
        text = fetch(published[path]).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]

    return ReportData(
        [StepMetrics(**line) for line in lines("artifacts/metrics.jsonl")],
        {
            task: (
                lines(f"artifacts/evaluation/{task}.base.jsonl"),
                lines(f"artifacts/evaluation/{task}.adapter.jsonl"),
            )
            for task in results["evaluation"]["tasks"]
        },
    )


def render_report(results: Mapping[str, Any], evidence: ReportData) -> bytes:
    """The page. It is the same whether `results` lists the report itself, as it does once published, or not."""
    tasks, attempts = results["evaluation"]["tasks"], results["run"]["attempts"]
    accuracies = {name: wording.accuracies(task) for name, task in tasks.items()}
    text = render(
        "report.html",
        escape=True,
        **{
            key: results[key] for key in ("run", "model", "dataset", "training", "gate", "hardware", "software", "cost")
        },
        harness=results["evaluation"]["harness"],
        tasks=tasks,
        headline=wording.headline(tasks),
        explanations={name: wording.explanation(name, task, len(tasks)) for name, task in tasks.items()},
        scope=wording.SCOPE,
        accuracies=accuracies,
        charts={name: _intervals(rows) for name, rows in accuracies.items()},
        changed={name: changed(*sides) for name, sides in evidence.answers.items()},
        first_questions=FIRST_QUESTIONS,
        most_questions=MOST_QUESTIONS,
        lines=_lines(evidence.metrics, restarts(attempts)),
        restarts=restarts(attempts),
        bars=bars(attempts),
        by_stage=by_stage(attempts),
        stage_names=STAGE_NAMES,
        preset=_value(results, "preset"),
        settings=own_settings(results["settings"]),
        artifacts=[artifact for artifact in results["artifacts"] if artifact["path"] != REPORT],
        location=f"{str(_value(results, 'run.output')).rstrip('/')}/{results['run']['id']}",
    )
    # JSON can hold halves of characters, which no file can
    return text.encode("utf-8", errors="replace")


def own_settings(settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """The settings that the user gave, where the preset says otherwise; without the run's name."""
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
    """A setting as it would be given; a dash for none."""
    if value is None:
        return "\N{EN DASH}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _value(results: Mapping[str, Any], setting: str) -> Any:
    return results["settings"].get(setting, {}).get("value", "?")


def _intervals(rows: list[dict[str, Any]]) -> dict[str, charts.Spans]:
    """Two charts of a task: both accuracies by each metric, and their difference."""
    sides = [
        (
            f"{side}, {row['metric']}",
            side,
            f"{formatting.percent(row[side])} ({_range(row[f'{side}_ci'], formatting.percent)})",
            row[f"{side}_ci"][0],
            row[side],
            row[f"{side}_ci"][1],
        )
        for row in rows
        for side in ("base", "adapter")
    ]
    differences = [
        (
            f"difference, {row['metric']}",
            found["verdict"],
            f"{formatting.points(found['delta'])} points ({_range(found['ci95'], formatting.points)})",
            found["ci95"][0],
            found["delta"],
            found["ci95"][1],
        )
        for row in rows
        for found in [row["comparison"]]
    ]
    return {
        "accuracy": charts.spans(sides, lambda value: f"{100 * value:.4g} %", zero=False),
        "difference": charts.spans(
            differences, lambda value: f"{100 * value:+.4g}".replace("-", "\N{MINUS SIGN}") if value else "0", zero=True
        ),
    }


def _range(interval: tuple[float, float], write: Callable[[float], str]) -> str:
    """Without the unit, which the estimate before it has."""
    low, high = (write(bound).partition("\N{NO-BREAK SPACE}")[0] for bound in interval)
    return f"{low} to {high}"


def _lines(metrics: list[StepMetrics], marks: list[float]) -> list[charts.Line]:
    """The four lines by step, of what was measured."""

    def measured(name: str) -> list[tuple[int, float]]:
        return [(step.step, value) for step in metrics if (value := step.measured.get(name)) is not None]

    memory = measured("memory_bytes")
    unit, scale = ("GiB", 2**30) if max((value for _, value in memory), default=0) >= 2**31 else ("MiB", 2**20)
    memory = [(step, value / scale) for step, value in memory]
    drawn = (
        charts.line(
            "Loss", "nats a token", [(m.step, m.loss) for m in metrics], formatting.figure, marks=marks, from_zero=False
        ),
        charts.line("Learning rate", "", [(m.step, m.learning_rate) for m in metrics], formatting.figure, marks=marks),
        charts.line("Speed", "target tokens/s", measured("tokens_per_second"), formatting.figure, marks=marks),
        charts.line("Memory", f"{unit} in use", memory, formatting.figure, marks=marks),
    )
    return [plot for plot in drawn if plot is not None]
