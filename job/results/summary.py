"""The outcome of a run from its manifest: in a few lines, as the terminal shows it, and as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from job.common.export_formats import is_adapter
from job.common.formatting import count, duration
from job.evaluation.comparison import original_tasks
from job.evaluation.policy_verdict import lines as policy_lines
from job.runs.layout import ADAPTER, REPORT, RESULTS, export_folder


def summary(results: Mapping[str, Any], where: str) -> list[str]:
    """The outcome in a few lines: training, accuracy, cost, the report; and in the last, verdict and results."""
    training, cost = results["training"], results["cost"]
    skipped = sum(results["dataset"]["skipped"].values())
    left_out = f" ({count(skipped, 'row')} left out)" if skipped else ""
    work = f"{count(training['steps'], 'step')} on {count(results['dataset']['rows'], 'example')}{left_out}"
    speed = f"{training['tokens_per_second'] or 0:,.0f} target tokens/s"
    lines = [f"{results['model']['id']} + LoRA, {work}, loss {training['loss']:.3f}, {speed}"]
    lines += _validation_lines(training.get("validation"))
    if first := training.get("first_stage"):
        lines.append(f"before that {count(first['steps'], 'step')} of {first['method']}, loss {first['loss']:.3f}")
    if rewards := training.get("preference"):
        named = {name: rewards[f"rewards/{name}"] for name in ("margins", "accuracies") if f"rewards/{name}" in rewards}
        figures = ", ".join(f"{name} {value:.3f}" for name, value in named.items())
        lines.append(f"{training['method']}, beta {training['beta']:g}; rewards in the last epoch: {figures}")
    against = "" if results["model"]["quantization"] == "none" else " against the quantized base"
    grouped = results["evaluation"].get("groups", {})
    for name, group in grouped.items():
        lines += [
            f"{name}, {group_line(metric, comparison, against)}" for metric, comparison in group["metrics"].items()
        ]
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
    for name, comparisons in results["evaluation"].get("measured", {}).items():
        start = f"{name}, {comparisons['n']:,} questions"
        lines += [
            f"{start}: {measured_line(metric, comparison, against)}"
            for metric, comparison in comparisons["metrics"].items()
        ]
    if why := (results["evaluation"].get("full_precision") or {}).get("not_scored"):
        lines.append(f"the unquantized base was not scored: {why}")
    for name, comparison in original_tasks(results).items():
        taken, left = (_difference(comparison[f"{side}_versus_original"]["acc"]) for side in ("base", "adapter"))
        before = f"{name}, unquantized base: {100 * comparison['scores']['acc']:.2f} %"
        lines.append(f"{before}; quantization {taken}, adapter against it {left}")
    lines += [_export_line(export) for export in results.get("exports", ())]
    lines.append(_cost_line(cost, len(results["run"]["attempts"])))
    if any(artifact["path"] == REPORT for artifact in results["artifacts"]):
        lines.append(f"report: {where.removesuffix(RESULTS)}{REPORT}")
    # A group speaks for its tasks, which may be many
    members = {task for group in grouped.values() for task in group["tasks"]}
    of_groups = [(name, *item) for name, group in grouped.items() for item in group["metrics"].items()]
    verdicts = [f"{name} {metric} {comparison['verdict']}{against}" for name, metric, comparison in of_groups]
    verdicts += [
        f"{name} {verdict_in_words(name, results)}" for name in results["evaluation"]["tasks"] if name not in members
    ]
    passed = results["gate"]["passed"]
    gate = [] if passed is None else ["gate met" if passed else "gate not met"]
    policy = results["gate"].get("policy")
    lines += [f"policy: {line}" for line in (policy_lines(policy) if policy else ())]
    gate += [f"policy {policy['outcome']}"] if policy else []
    ended = ", ".join([*verdicts, *gate])
    lines.append("; ".join([*([ended] if ended else []), f"results: {where}"]))
    return lines


_AGAINST_BOTH = {
    ("improved", "inconclusive"): "better than the quantized base but not shown to be better than the unquantized one",
    ("improved", "regressed"): "better than the quantized base but worse than the unquantized one",
    ("inconclusive", "improved"): "inconclusive against the quantized base but better than the unquantized one",
    ("inconclusive", "regressed"): "inconclusive against the quantized base and worse than the unquantized one",
    ("regressed", "improved"): "worse than the quantized base but better than the unquantized one",
    ("regressed", "inconclusive"): "worse than the quantized base and inconclusive against the unquantized one",
}
"""The note where the verdicts against the quantized and the unquantized base differ."""


def _validation_lines(validation: Mapping[str, Any] | None) -> list[str]:
    """The losses on the validation rows, and which step's adapter is published; none without validation."""
    if validation is None or validation["best_step"] is None:
        return []
    losses = f"{validation['first_loss']:.3f} -> {validation['last_loss']:.3f}"
    best = f"lowest {validation['best_loss']:.3f} after step {validation['best_step']:,}"
    kept = "its adapter is published" if validation["keep"] == "best" else "the last step's adapter is published"
    ended = "; stopped early" if validation["stopped_early"] else ""
    return [f"validation loss {losses}, {best}; {kept}{ended}"]


def verdict_in_words(name: str, results: Mapping[str, Any]) -> str:
    """The verdict on a task. `improved` alone is better than the base with its original weights, quantized or not."""
    verdict: str = results["evaluation"]["tasks"][name]["verdict"]
    original = original_tasks(results).get(name)
    if original is not None:
        return _AGAINST_BOTH.get((verdict, original["adapter_versus_original"]["acc"]["verdict"]), verdict)
    if verdict == "improved" and results["model"]["quantization"] != "none":
        return "better than the quantized base (the unquantized one was not scored)"
    return verdict


def _difference(comparison: Mapping[str, Any]) -> str:
    """A paired difference in points with its interval and verdict."""
    delta, low, high = (f"{100 * x:+.2f}" for x in (comparison["delta"], *comparison["ci95"]))
    return f"{delta} ({low} to {high}, {comparison['verdict']})"


def group_line(name: str, figures: Mapping[str, Any], against: str = "") -> str:
    """A figure of a group of tasks: its size and weights, both figures, the difference, and the verdict."""
    weights = "questions" if figures["weight_by_size"] else "tasks"
    low, high = figures["ci95"]
    return (
        f"{figures['tasks']} tasks, {figures['n']:,} questions, all {weights} weighing the same: {name} "
        f"{figures['base']:.4g} -> {figures['adapter']:.4g} ({figures['delta']:+.4g}, 95 % interval {low:+.4g} to "
        f"{high:+.4g}), {figures['verdict']}{against}, {figures['improved']} better and {figures['regressed']} worse, "
        f"p = {figures['p']:.2g}"
    )


def measured_line(name: str, comparison: Mapping[str, Any], against: str = "") -> str:
    """A metric of a task without choices: both figures, which way is better, the difference, and the verdict."""
    better = "higher" if comparison["higher_is_better"] else "lower"
    low, high = comparison["ci95"]
    interval = f"{comparison['delta']:+.4g}, 95 % interval {low:+.4g} to {high:+.4g}"
    if comparison["aggregation"] in {"perplexity", "weighted_perplexity"}:
        interval = f"ln of the ratio {interval}"
    return (
        f"{name} {comparison['base']:.4g} -> {comparison['adapter']:.4g} ({better} is better; {interval}), "
        f"{comparison['verdict']}{against}, {comparison['improved']} better and {comparison['regressed']} worse, "
        f"p = {comparison['p']:.2g}"
    )


def _export_line(export: Mapping[str, Any]) -> str:
    """The accuracies of an exported format's candidates, and which one is published."""
    if export.get("not_made"):
        return f"{export['format']}: not published, since its export failed: {export['not_made']}"
    if export.get("not_scored"):
        return f"{export['format']}: published, not scored: {export['not_scored']}"
    if is_adapter(export["format"]):
        scores = [
            f"{task} {100 * figures['scores']['acc']:.2f} % "
            f"({100 * figures['versus_adapter']['acc']['delta']:+.2f} against the adapter)"
            for task, figures in export["candidates"][export["candidate"]].items()
        ]
        return f"{export['format']}: {'; '.join(scores)}; published"
    scores = [
        f"{task} onto {candidate} weights {100 * figures['scores']['acc']:.2f} % "
        f"({100 * figures['versus_adapter']['acc']['delta']:+.2f} against the adapter)"
        for candidate, tasks in export["candidates"].items()
        for task, figures in tasks.items()
    ]
    outcome = "published" if export.get("published", True) else "not published, but the source of other formats"
    return f"{export['format']}: {'; '.join(scores)}; {outcome}: {export['candidate']} ({export['reason']})"


def _cost_line(cost: Mapping[str, Any], attempts: int) -> str:
    """Time, and dollars and energy if they are known."""
    line = f"{duration(cost['seconds'])} in {count(attempts, 'attempt')}"
    if cost["usd"] is not None:
        line += f", ${cost['usd']:.2f}"
    if cost["energy_kwh"] is not None:
        line += f", {cost['energy_kwh']:.2f} kWh of the GPU"
    if attempts > 1:
        line += f"; {duration(cost['wasted_seconds'])} of it wasted"
    return line.replace("\N{NO-BREAK SPACE}", " ")


@dataclass(frozen=True)
class Comparison:
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
class Outcome:
    """What a finished run has. `qlora-job status --format json` has these fields; null: not known, or there is none.

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

    comparisons: tuple[Comparison, ...]
    attempts: int
    seconds: float
    usd: float | None
    energy_kwh: float | None
    results: str
    report: str | None
    adapter: str | None
    exports: Mapping[str, str]


def outcome(results: Mapping[str, Any], folder: str) -> Outcome:
    """The outcome as values.

    Args:
        results: The manifest, also of an earlier version.
        folder: Path or URI of the run's folder.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: It is not a manifest of this job.
    """
    cost, paths = results["cost"], [artifact["path"] for artifact in results["artifacts"]]

    def place(key: str) -> str | None:
        """Where a published file or folder is; None if it was not published."""
        published = any(path == key or (key.endswith("/") and path.startswith(key)) for path in paths)
        return f"{folder}/{key}".rstrip("/") if published else None

    exports = {export["format"]: place(export_folder(export["format"])) for export in results.get("exports", ())}
    return Outcome(
        comparisons=tuple(_comparisons(results["evaluation"])),
        attempts=len(results["run"]["attempts"]),
        seconds=cost["seconds"],
        usd=cost["usd"],
        energy_kwh=cost["energy_kwh"],
        results=f"{folder}/{RESULTS}",
        report=place(REPORT),
        adapter=place(ADAPTER),
        exports={name: at for name, at in exports.items() if at is not None},
    )


def _comparisons(evaluation: Mapping[str, Any]) -> Iterator[Comparison]:
    """By group, then by task with and without choices."""
    for name, group in evaluation.get("groups", {}).items():
        for metric, figures in group["metrics"].items():
            yield _comparison(name, metric, figures)
    for name, task in evaluation["tasks"].items():
        accuracies = {side: task[side]["acc"] for side in ("base", "adapter")}
        yield _comparison(name, "acc", {**task, **accuracies, "p": task["mcnemar_p"]})
    for name, task in evaluation.get("measured", {}).items():
        for metric, figures in task["metrics"].items():
            yield _comparison(name, metric, {**figures, "n": task["n"]})


def _comparison(name: str, metric: str, figures: Mapping[str, Any]) -> Comparison:
    low, high = figures["ci95"]
    base, adapter, delta, p = (figures[key] for key in ("base", "adapter", "delta", "p"))
    return Comparison(name, metric, figures["n"], base, adapter, delta, (low, high), p, figures["verdict"])
