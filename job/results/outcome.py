"""Reads the outcome of a finished run from its manifest, for `summary.py` (in words) and `status --format json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.evaluation.comparison import original_tasks
from job.results.public_bases import last_part
from job.runs.layout import ADAPTER, REPORT, RESULTS, export_folder


@dataclass(frozen=True)
class MetricComparison:
    """The adapter against the base by one metric. `qlora-job status --format json` has these fields.

    Attributes:
        name: The task, or the group of tasks.
        metric: `acc`, a fraction, for a task with choices; else the metric's name in the manifest.
        questions: Number of questions.
        base: The base's figure.
        adapter: The adapter's figure.
        delta: Paired difference, adapter minus base; of a perplexity the logarithm of the ratio.
        ci95: Lower and upper end of the 95 % interval of `delta`.
        p: p value of the test: McNemar's for a task with choices.
        verdict: `improved`, `regressed` or `inconclusive`.
    """

    name: str
    metric: str
    questions: int
    base: float
    adapter: float
    delta: float
    ci95: tuple[float, float]
    p: float
    verdict: str


@dataclass(frozen=True)
class OutcomeValues:
    """The part of the outcome that `qlora-job status --format json` prints; null: not known, or there is none.

    Attributes:
        comparisons: The groups, then the tasks, in the order of the manifest.
        attempts: Number of attempts.
        seconds: Duration of all attempts.
        usd: Their cost; null where no price was given.
        energy_kwh: Energy of the GPUs.
        results: Path or URI of the manifest.
        report: Path or URI of the HTML report.
        adapter: Path or URI of the adapter's folder.
        exports: Published format -> path or URI of its folder.
    """

    comparisons: tuple[MetricComparison, ...]
    attempts: int
    seconds: float
    usd: float | None
    energy_kwh: float | None
    results: str
    report: str | None
    adapter: str | None
    exports: Mapping[str, str]


@dataclass(frozen=True)
class ValidationOutcome:
    """Losses on the validation rows; `keep` is `best` if the adapter of the step with the lowest one is published."""

    first_loss: float
    last_loss: float
    best_loss: float
    best_step: int
    keep: str
    stopped_early: bool


@dataclass(frozen=True)
class FirstStageOutcome:
    """The training of the first of two stages; `seconds` and `usd` of its whole run are not in this run's."""

    method: str
    steps: int
    loss: float
    seconds: float
    usd: float | None


@dataclass(frozen=True)
class PreferenceOutcome:
    """Training on preferences: its method, and the rewards in the last epoch by name, as far as it has them."""

    method: str
    beta: float
    rewards: Mapping[str, float]


@dataclass(frozen=True)
class TrainingOutcome:
    """What was trained on, and how it went; `speed` is target tokens per second, and 0 if it is not known."""

    steps: int
    examples: int
    rows_left_out: int
    loss: float
    speed: float
    validation: ValidationOutcome | None
    first_stage: FirstStageOutcome | None
    preference: PreferenceOutcome | None


@dataclass(frozen=True)
class GroupOutcome:
    """The comparison of a group of tasks by one metric: `tasks` is their number.

    With `weight_by_size` each question weighs the same, otherwise each task.
    """

    comparison: MetricComparison
    improved: int
    regressed: int
    tasks: int
    weight_by_size: bool


@dataclass(frozen=True)
class WithoutOverlapOutcome:
    """The comparison on the questions of a task that are not in the training rows."""

    questions: int
    delta: float
    verdict: str


@dataclass(frozen=True)
class TaskOutcome:
    """The comparison of a task with choices.

    Attributes:
        comparison: By accuracy.
        improved: Questions that only the adapter answered right.
        regressed: Questions that only the base answered right.
        overlap: Number of questions that training rows contain.
        without_overlap: The comparison on the other questions; None if there are fewer than two, or no overlap.
    """

    comparison: MetricComparison
    improved: int
    regressed: int
    overlap: int
    without_overlap: WithoutOverlapOutcome | None


@dataclass(frozen=True)
class MetricTaskOutcome:
    """The comparison of a task without choices by one metric; `aggregation` is the metric's name in lm-eval."""

    comparison: MetricComparison
    improved: int
    regressed: int
    higher_is_better: bool
    aggregation: str


@dataclass(frozen=True)
class AccuracyDifference:
    """A paired difference of accuracies, with its 95 % interval and verdict."""

    delta: float
    ci95: tuple[float, float]
    verdict: str


@dataclass(frozen=True)
class OriginalOutcome:
    """The unquantized base in a task: its accuracy, and the quantized base and the adapter against it."""

    task: str
    accuracy: float
    base: AccuracyDifference
    adapter: AccuracyDifference


@dataclass(frozen=True)
class ExportScore:
    """The accuracy of an exported model in a task; `delta` is the difference to that of the adapter."""

    task: str
    accuracy: float
    delta: float


@dataclass(frozen=True)
class ExportOutcome:
    """An exported format.

    Attributes:
        format: Its name.
        folder: Path or URI of its folder; None if it is not published.
        candidate: The selected candidate: the weights onto which the adapter was merged; `base` without a merge.
        reason: Why they were selected.
        published: False if it was made only as the source of other formats.
        scores: By the weights onto which the adapter was merged; empty if it was not made or not scored.
        not_made: Why its export failed; None if it did not.
        not_scored: Why it was not scored; None if it was.
    """

    format: str
    folder: str | None
    candidate: str
    reason: str
    published: bool
    scores: Mapping[str, tuple[ExportScore, ...]]
    not_made: str | None
    not_scored: str | None


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of a finished run, as its manifest has it.

    Attributes:
        model: The base's name.
        quantized: Whether the base's weights are quantized.
        training: How training went.
        labels: Task -> its name in sentences (`task_labels`).
        groups: By group and metric.
        grouped_tasks: The tasks of all groups.
        tasks: The tasks with choices.
        measured: By task without choices and metric.
        originals: Comparisons with the unquantized base, by task; none if it was not scored.
        original_not_scored: Why it was not scored; None where it was, or was not asked for.
        exports: In the order of the manifest.
        attempts: Number of attempts, those of `exported_run` included.
        exported_run: Id of the finished run that this one exports, and number of its last attempt; None without one.
        seconds: Duration of all attempts.
        wasted_seconds: The part of it that was lost to interruptions.
        usd: Cost of all attempts; None where no price was given.
        energy_kwh: Energy of the GPUs; None if it is not known.
        gate_passed: Whether the quality gate is met; None without a gate.
        policy: The verdict on the policy (`policy_verdict`); None without a policy.
        results: Path or URI of the manifest.
        report: Path or URI of the HTML report; None if there is none.
        adapter: Path or URI of the adapter's folder; None if it is not published.
    """

    model: str
    quantized: bool
    training: TrainingOutcome
    labels: Mapping[str, str]
    groups: tuple[GroupOutcome, ...]
    grouped_tasks: frozenset[str]
    tasks: tuple[TaskOutcome, ...]
    measured: tuple[MetricTaskOutcome, ...]
    originals: tuple[OriginalOutcome, ...]
    original_not_scored: str | None
    exports: tuple[ExportOutcome, ...]
    attempts: int
    exported_run: tuple[str, int] | None
    seconds: float
    wasted_seconds: float
    usd: float | None
    energy_kwh: float | None
    gate_passed: bool | None
    policy: Mapping[str, Any] | None
    results: str
    report: str | None
    adapter: str | None


def read_outcome(results: Mapping[str, Any], folder: str) -> RunOutcome:
    """Reads the outcome from a manifest.

    Args:
        results: The manifest, also of an earlier version.
        folder: Path or URI of the run's folder.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: It is not a manifest of this job.
    """
    evaluation, cost = results["evaluation"], results["cost"]
    paths = [artifact["path"] for artifact in results["artifacts"]]

    def place(key: str) -> str | None:
        """Where a published file or folder is; None if it was not published."""
        published = any(path == key or (key.endswith("/") and path.startswith(key)) for path in paths)
        return f"{folder}/{key}".rstrip("/") if published else None

    overlap = (results["dataset"].get("audit") or {}).get("overlap", {})
    groups, exported = evaluation.get("groups", {}), results["run"].get("exported_run")
    return RunOutcome(
        model=results["model"]["id"],
        quantized=results["model"]["quantization"] != "none",
        training=_read_training(results["training"], results["dataset"]),
        labels=task_labels(results),
        groups=tuple(_read_groups(groups)),
        grouped_tasks=frozenset(task for group in groups.values() for task in group["tasks"]),
        tasks=tuple(_read_task(name, task, overlap.get(name, ())) for name, task in evaluation["tasks"].items()),
        measured=tuple(_read_measured(evaluation.get("measured", {}))),
        originals=tuple(_read_original(name, scored) for name, scored in original_tasks(results).items()),
        original_not_scored=(evaluation.get("full_precision") or {}).get("not_scored"),
        exports=tuple(
            _read_export(export, place(export_folder(export["format"]))) for export in results.get("exports", ())
        ),
        attempts=len(results["run"]["attempts"]),
        exported_run=(exported["id"], exported["attempts"]) if exported else None,
        seconds=cost["seconds"],
        wasted_seconds=cost["wasted_seconds"],
        usd=cost["usd"],
        energy_kwh=cost["energy_kwh"],
        gate_passed=results["gate"]["passed"],
        policy=results["gate"].get("policy"),
        results=f"{folder}/{RESULTS}",
        report=place(REPORT),
        adapter=place(ADAPTER),
    )


def outcome_values(outcome: RunOutcome) -> OutcomeValues:
    """The outcome as values, for `status --format json`."""
    return OutcomeValues(
        comparisons=(
            *(group.comparison for group in outcome.groups),
            *(task.comparison for task in outcome.tasks),
            *(measured.comparison for measured in outcome.measured),
        ),
        attempts=outcome.attempts,
        seconds=outcome.seconds,
        usd=outcome.usd,
        energy_kwh=outcome.energy_kwh,
        results=outcome.results,
        report=outcome.report,
        adapter=outcome.adapter,
        exports={export.format: export.folder for export in outcome.exports if export.folder is not None},
    )


def task_labels(results: Mapping[str, Any]) -> dict[str, str]:
    """Task -> its name in sentences, with the file of JOB_EVAL__DATA, whose questions are not those of the benchmark.

    Args:
        results: The manifest.
    """
    files = results.get("settings", {}).get("eval.data", {}).get("value") or {}
    names = [*results["evaluation"]["tasks"], *results["evaluation"].get("measured", {})]
    return {name: f"{name} (questions of {last_part(files[name])})" if name in files else name for name in names}


def _read_training(training: Mapping[str, Any], dataset: Mapping[str, Any]) -> TrainingOutcome:
    validation, first, rewards = (training.get(name) for name in ("validation", "first_stage", "preference"))
    preference = None
    if rewards:
        reward_values = {
            name: rewards[f"rewards/{name}"] for name in ("margins", "accuracies") if f"rewards/{name}" in rewards
        }
        preference = PreferenceOutcome(training["method"], training["beta"], reward_values)
    return TrainingOutcome(
        steps=training["steps"],
        examples=dataset["rows"],
        rows_left_out=sum(dataset["skipped"].values()),
        loss=training["loss"],
        speed=training["tokens_per_second"] or 0,
        validation=_read_validation(validation),
        first_stage=_read_first_stage(first) if first else None,
        preference=preference,
    )


def _read_first_stage(first: Mapping[str, Any]) -> FirstStageOutcome:
    return FirstStageOutcome(first["method"], first["steps"], first["loss"], first["run_seconds"], first["usd"])


def _read_validation(validation: Mapping[str, Any] | None) -> ValidationOutcome | None:
    """None without validation, also if training ended before the first one."""
    if validation is None or validation["best_step"] is None:
        return None
    names = ("first_loss", "last_loss", "best_loss", "best_step", "keep", "stopped_early")
    return ValidationOutcome(**{name: validation[name] for name in names})


def _comparison(name: str, metric: str, figures: Mapping[str, Any]) -> MetricComparison:
    base, adapter, delta, p = (figures[key] for key in ("base", "adapter", "delta", "p"))
    return MetricComparison(name, metric, figures["n"], base, adapter, delta, _interval(figures), p, figures["verdict"])


def _interval(figures: Mapping[str, Any]) -> tuple[float, float]:
    low, high = figures["ci95"]
    return low, high


def _read_groups(groups: Mapping[str, Any]) -> Iterator[GroupOutcome]:
    for name, group in groups.items():
        for metric, figures in group["metrics"].items():
            yield GroupOutcome(
                comparison=_comparison(name, metric, figures),
                improved=figures["improved"],
                regressed=figures["regressed"],
                tasks=figures["tasks"],
                weight_by_size=figures["weight_by_size"],
            )


def _read_task(name: str, task: Mapping[str, Any], overlap: Sequence[int]) -> TaskOutcome:
    accuracies = {side: task[side]["acc"] for side in ("base", "adapter")}
    subset = task.get("without_overlap")
    return TaskOutcome(
        comparison=_comparison(name, "acc", {**task, **accuracies, "p": task["mcnemar_p"]}),
        improved=task["improved"],
        regressed=task["regressed"],
        overlap=len(overlap),
        without_overlap=WithoutOverlapOutcome(subset["n"], subset["delta"], subset["verdict"]) if subset else None,
    )


def _read_measured(tasks: Mapping[str, Any]) -> Iterator[MetricTaskOutcome]:
    for name, task in tasks.items():
        for metric, figures in task["metrics"].items():
            yield MetricTaskOutcome(
                comparison=_comparison(name, metric, {**figures, "n": task["n"]}),
                improved=figures["improved"],
                regressed=figures["regressed"],
                higher_is_better=figures["higher_is_better"],
                aggregation=figures["aggregation"],
            )


def _read_original(task: str, scored: Mapping[str, Any]) -> OriginalOutcome:
    base, adapter = (scored[f"{side}_versus_original"]["acc"] for side in ("base", "adapter"))
    return OriginalOutcome(task, scored["scores"]["acc"], _difference(base), _difference(adapter))


def _difference(figures: Mapping[str, Any]) -> AccuracyDifference:
    return AccuracyDifference(figures["delta"], _interval(figures), figures["verdict"])


def _read_export(export: Mapping[str, Any], folder: str | None) -> ExportOutcome:
    not_made, not_scored = export.get("not_made"), export.get("not_scored")
    scores = {}
    if not (not_made or not_scored):
        scores = {
            candidate: tuple(_read_export_score(task, figures) for task, figures in tasks.items())
            for candidate, tasks in export["candidates"].items()
        }
    return ExportOutcome(
        format=export["format"],
        folder=folder,
        candidate=export["candidate"],
        reason=export["reason"],
        published=export.get("published", True),
        scores=scores,
        not_made=not_made,
        not_scored=not_scored,
    )


def _read_export_score(task: str, figures: Mapping[str, Any]) -> ExportScore:
    return ExportScore(task, figures["scores"]["acc"], figures["versus_adapter"]["acc"]["delta"])
