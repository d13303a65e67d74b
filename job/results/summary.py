"""The outcome of a run in words, as `run` prints them at its end and `status` shows them: made from `outcome.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.common.export_formats import is_adapter
from job.common.formatting import count, duration
from job.evaluation.policy_verdict import lines as policy_lines
from job.results.outcome import (
    AccuracyDifference,
    ExportOutcome,
    ExportScore,
    GroupOutcome,
    MetricTaskOutcome,
    OriginalOutcome,
    RunOutcome,
    TaskOutcome,
    TrainingOutcome,
    read_outcome,
)
from job.runs.layout import RESULTS


def summary(results: Mapping[str, Any], where: str) -> list[str]:
    """The outcome in words.

    Args:
        results: The manifest.
        where: Path or URI of `results.json` in the run's folder.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: It is not a manifest of this job.
    """
    return outcome_lines(read_outcome(results, where.removesuffix(f"/{RESULTS}")))


def outcome_lines(outcome: RunOutcome) -> list[str]:
    """The outcome in a few lines: training, accuracy, cost, the report; and in the last, verdict and results.

    Raises:
        KeyError, TypeError, ValueError: A figure is not a number, or the published candidate of an export is unknown.
    """
    against = " against the quantized base" if outcome.quantized else ""
    lines = [f"{outcome.model} + LoRA, {_work(outcome.training)}", *_training_lines(outcome.training)]
    lines += [f"{group.comparison.name}, {_group_line(group, against)}" for group in outcome.groups]
    for task in outcome.tasks:
        lines += _task_lines(task, outcome.labels[task.comparison.name], against)
    for measured in outcome.measured:
        start = f"{outcome.labels[measured.comparison.name]}, {measured.comparison.questions:,} questions"
        lines.append(f"{start}: {_measured_line(measured, against)}")
    if outcome.original_not_scored:
        lines.append(f"the unquantized base was not scored: {outcome.original_not_scored}")
    lines += [_original_line(original) for original in outcome.originals]
    lines += [_export_line(export) for export in outcome.exports]
    lines.append(_cost_line(outcome))
    if outcome.report is not None:
        lines.append(f"report: {outcome.report}")
    lines += [f"policy: {line}" for line in (policy_lines(outcome.policy) if outcome.policy else ())]
    return [*lines, "; ".join([*_verdicts(outcome, against), f"results: {outcome.results}"])]


def _work(training: TrainingOutcome) -> str:
    """Steps, examples, loss and speed."""
    left_out = f" ({count(training.rows_left_out, 'row')} left out)" if training.rows_left_out else ""
    work = f"{count(training.steps, 'step')} on {count(training.examples, 'example')}{left_out}"
    return f"{work}, loss {training.loss:.3f}, {training.speed:,.0f} target tokens/s"


def _training_lines(training: TrainingOutcome) -> list[str]:
    """Validation with which step's adapter is published, the first stage, the rewards; each if there is any."""
    lines = []
    if validation := training.validation:
        losses = f"{validation.first_loss:.3f} -> {validation.last_loss:.3f}"
        best = f"lowest {validation.best_loss:.3f} after step {validation.best_step:,}"
        which = "its adapter" if validation.keep == "best" else "the last step's adapter"
        ended = "; stopped early" if validation.stopped_early else ""
        lines.append(f"validation loss {losses}, {best}; {which} is published{ended}")
    if first := training.first_stage:
        took = duration(first.seconds) + ("" if first.usd is None else f", ${first.usd:.2f}")
        trained = f"before that {count(first.steps, 'step')} of {first.method}, loss {first.loss:.3f}"
        lines.append(f"{trained}; this took {took}, in addition to the time below".replace("\N{NO-BREAK SPACE}", " "))
    if preference := training.preference:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in preference.rewards.items())
        lines.append(f"{preference.method}, beta {preference.beta:g}; rewards in the last epoch: {figures}")
    return lines


def _group_line(group: GroupOutcome, against: str) -> str:
    """A figure of a group of tasks: its size and weights, both figures, the difference, and the verdict."""
    weights = "questions" if group.weight_by_size else "tasks"
    comparison = group.comparison
    low, high = comparison.ci95
    return (
        f"{group.tasks} tasks, {comparison.questions:,} questions, all {weights} weighing the same: "
        f"{comparison.metric} {comparison.base:.4g} -> {comparison.adapter:.4g} ({comparison.delta:+.4g}, "
        f"95 % interval {low:+.4g} to {high:+.4g}), {comparison.verdict}{against}, {group.improved} better and "
        f"{group.regressed} worse, p = {comparison.p:.2g}"
    )


def _task_lines(task: TaskOutcome, label: str, against: str) -> list[str]:
    """A task with choices: both accuracies, the verdict, and the verdict without questions that were trained on."""
    comparison = task.comparison
    before, after, delta, low, high = (
        100 * x for x in (comparison.base, comparison.adapter, comparison.delta, *comparison.ci95)
    )
    interval = f"{delta:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}"
    counts = f"{count(task.improved, 'question')} better and {task.regressed:,} worse"
    lines = [
        f"{label}, {comparison.questions:,} questions: accuracy {before:.2f} % -> {after:.2f} % ({interval})",
        f"verdict{against}: {comparison.verdict}, {counts}, McNemar p = {comparison.p:.2g}",
    ]
    if subset := task.without_overlap:
        figures = f"{100 * subset.delta:+.2f} points on the other {subset.questions:,}, {subset.verdict}{against}"
        lines.append(f"training rows contain {task.overlap:,} of these questions: {figures}")
    elif task.overlap:
        which = "all" if task.overlap == comparison.questions else "all but one"
        what = "the accuracies say little about other questions"
        lines.append(f"training rows contain {which} of these questions: {what}")
    return lines


def _measured_line(measured: MetricTaskOutcome, against: str) -> str:
    """A metric of a task without choices: both figures, which way is better, the difference, and the verdict."""
    comparison = measured.comparison
    better = "higher" if measured.higher_is_better else "lower"
    low, high = comparison.ci95
    interval = f"{comparison.delta:+.4g}, 95 % interval {low:+.4g} to {high:+.4g}"
    if measured.aggregation in {"perplexity", "weighted_perplexity"}:
        interval = f"ln of the ratio {interval}"
    return (
        f"{comparison.metric} {comparison.base:.4g} -> {comparison.adapter:.4g} ({better} is better; {interval}), "
        f"{comparison.verdict}{against}, {measured.improved} better and {measured.regressed} worse, "
        f"p = {comparison.p:.2g}"
    )


def _original_line(original: OriginalOutcome) -> str:
    quantization, adapter = _difference(original.base), _difference(original.adapter)
    before = f"{original.task}, unquantized base: {100 * original.accuracy:.2f} %"
    return f"{before}; quantization {quantization}, adapter against it {adapter}"


def _difference(difference: AccuracyDifference) -> str:
    """A paired difference in points with its interval and verdict."""
    delta, low, high = (f"{100 * x:+.2f}" for x in (difference.delta, *difference.ci95))
    return f"{delta} ({low} to {high}, {difference.verdict})"


def _export_line(export: ExportOutcome) -> str:
    """The accuracies of an exported format's candidates, and which one is published."""
    if export.not_made:
        return f"{export.format}: not published, since its export failed: {export.not_made}"
    if export.not_scored:
        return f"{export.format}: published, not scored: {export.not_scored}"
    if is_adapter(export.format):
        scores = [f"{score.task} {_against_adapter(score)}" for score in export.scores[export.candidate]]
        return f"{export.format}: {'; '.join(scores)}; published"
    scores = [
        f"{score.task} onto {candidate} weights {_against_adapter(score)}"
        for candidate, candidate_scores in export.scores.items()
        for score in candidate_scores
    ]
    published = "published" if export.published else "not published, but the source of other formats"
    return f"{export.format}: {'; '.join(scores)}; {published}: {export.candidate} ({export.reason})"


def _against_adapter(score: ExportScore) -> str:
    return f"{100 * score.accuracy:.2f} % ({100 * score.delta:+.2f} against the adapter)"


def _cost_line(outcome: RunOutcome) -> str:
    """Time, and dollars and energy if they are known."""
    line = f"{duration(outcome.seconds)} in {count(outcome.attempts, 'attempt')}"
    if outcome.usd is not None:
        line += f", ${outcome.usd:.2f}"
    if outcome.energy_kwh is not None:
        line += f", {outcome.energy_kwh:.2f} kWh of the GPU"
    if outcome.attempts > 1:
        line += f"; {duration(outcome.wasted_seconds)} of it wasted"
    if outcome.exported_run is not None:
        run, last = outcome.exported_run
        whose = f"attempts 1 to {last} are those" if last > 1 else "attempt 1 is that"
        line += f"; {whose} of run {run}, which this run exports"
    return line.replace("\N{NO-BREAK SPACE}", " ")


def _verdicts(outcome: RunOutcome, against: str) -> list[str]:
    """The verdicts, separated by commas, with the gate and the policy, as one text; none if there is nothing."""
    verdicts = [
        f"{group.comparison.name} {group.comparison.metric} {group.comparison.verdict}{against}"
        for group in outcome.groups
    ]
    originals = {original.task: original.adapter.verdict for original in outcome.originals}
    for task in outcome.tasks:
        name = task.comparison.name
        if name not in outcome.grouped_tasks:  # a group speaks for its tasks, which may be many
            words = verdict_in_words(task.comparison.verdict, originals.get(name), quantized=outcome.quantized)
            verdicts.append(f"{outcome.labels[name]} {words}")
    verdicts += [
        f"{outcome.labels[comparison.name]} {comparison.metric} {comparison.verdict}{against}"
        for comparison in (measured.comparison for measured in outcome.measured)
        if comparison.name not in outcome.grouped_tasks
    ]
    if outcome.gate_passed is not None:
        verdicts.append("gate met" if outcome.gate_passed else "gate not met")
    if outcome.policy:
        verdicts.append(f"policy {outcome.policy['outcome']}")
    return [", ".join(verdicts)] if verdicts else []


_AGAINST_BOTH = {
    ("improved", "inconclusive"): "better than the quantized base but not shown to be better than the unquantized one",
    ("improved", "regressed"): "better than the quantized base but worse than the unquantized one",
    ("inconclusive", "improved"): "inconclusive against the quantized base but better than the unquantized one",
    ("inconclusive", "regressed"): "inconclusive against the quantized base and worse than the unquantized one",
    ("regressed", "improved"): "worse than the quantized base but better than the unquantized one",
    ("regressed", "inconclusive"): "worse than the quantized base and inconclusive against the unquantized one",
}
"""The note where the verdicts against the quantized and the unquantized base differ."""


def verdict_in_words(verdict: str, against_original: str | None, *, quantized: bool) -> str:
    """The verdict on a task. `improved` alone is better than the base with its original weights, quantized or not.

    Args:
        verdict: Against the base that was trained on.
        against_original: Against the unquantized base; None if that was not scored.
        quantized: Whether the base that was trained on is quantized.
    """
    if against_original is not None:
        return _AGAINST_BOTH.get((verdict, against_original), verdict)
    if verdict == "improved" and quantized:
        return "better than the quantized base (the unquantized one was not scored)"
    return verdict
