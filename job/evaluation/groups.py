"""Groups of tasks: lm-eval's, such as mmlu, and users' own (`task_files`), with one aggregate for all their tasks.

The aggregate of a metric is lm-eval's: its mean over the tasks that have the metric, weighted by their numbers of
questions if the group's file requests it. Tasks of nested groups count directly. Two models are compared by the
aggregate. For the test, the questions are a random sample and the tasks are fixed:

| where | test and interval |
|---|---|
| every answer is right or wrong, and every question weighs the same | exact McNemar test, Tango's interval |
| else | t test of a stratified mean, a stratum for each task (`statistics.stratified`) |

Perplexities, and metrics that are not a mean over questions, are left out of groups: these tests need a value for each
question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from job.errors import Problem, SettingsError
from job.evaluation import statistics
from job.log import get_logger
from job.records import Evaluated, GroupSpec, Metric

CHOICE_METRICS = {"acc,none": "correct", "acc_norm,none": "correct_norm"}
"""lm-eval's name of a multiple-choice metric -> the field of `TaskScores` with the answers."""


def read_groups(groups: Mapping[str, Any], metrics_of: Mapping[str, Mapping[str, Metric]]) -> dict[str, GroupSpec]:
    """The groups that have an aggregate; other groups only list tasks.

    Args:
        groups: lm-eval's groups by name.
        metrics_of: Task -> its metrics, by lm-eval's name of metric and filter.

    Raises:
        SettingsError: A group has aggregates, and none of them is of a mean over questions; or its tasks do not agree
            on whether a higher figure is better.
    """
    specs: dict[str, GroupSpec] = {}
    problems: list[Problem] = []
    for name, group in groups.items():
        if not group.has_aggregation:
            continue
        tasks = tuple(sorted({task.task_name for task in group.get_all_tasks()}))
        metrics: dict[str, bool] = {}
        better: dict[str, bool] = {}
        left_out = []
        for aggregate in group.aggregate_metric_list:
            directions = {
                key: metric.higher_is_better
                for task in tasks
                for key, metric in metrics_of[task].items()
                if metric.aggregation == "mean"
            }
            of_metric = [key for key in directions if key.partition(",")[0] == aggregate.metric]
            if aggregate.filter_list is not None:
                of_metric = [key for key in of_metric if key.partition(",")[2] in aggregate.filter_list]
            problems += _at_odds(name, of_metric, tasks, metrics_of)
            metrics.update(dict.fromkeys(sorted(of_metric), bool(aggregate.weight_by_size)))
            better.update({key: directions[key] for key in of_metric})
            left_out += [] if of_metric else [aggregate.metric]
        if not metrics:
            what = f"{name} has no metric that is an average over questions ({', '.join(left_out)}); name its tasks"
            problems.append(Problem("JOB_EVAL__TASKS", what))
        elif left_out:
            why = "they are not averages over the questions of its tasks"
            get_logger().warning("metrics of a group are left out", group=name, metrics=left_out, why=why)
        specs[name] = GroupSpec(group.version, tasks, metrics, better)
    if problems:
        raise SettingsError(problems)
    return specs


def _at_odds(
    group: str, keys: Sequence[str], tasks: Sequence[str], metrics_of: Mapping[str, Mapping[str, Metric]]
) -> Iterator[Problem]:
    """The metrics of which a higher figure is better for some tasks, and a lower one for others."""
    for key in keys:
        rises = {
            task: metrics_of[task][key].higher_is_better
            for task in tasks
            if key in metrics_of[task] and metrics_of[task][key].aggregation == "mean"
        }
        if len(set(rises.values())) > 1:
            up, down = (next(task for task, better in rises.items() if better == way) for way in (True, False))
            what = f"{group} has {key}, where higher is better for {up} and lower for {down}: "
            yield Problem(
                "JOB_EVAL__TASKS", f"{what}their mean has no meaning; set the same higher_is_better in these tasks"
            )


def compare_groups(groups: Mapping[str, GroupSpec], base: Evaluated, adapter: Evaluated) -> dict[str, Any]:
    """The manifest's `evaluation.groups`; p values are adjusted by Holm's method over all aggregates of all groups.

    Args:
        groups: The aggregates to compute.
        base: The scores to compare with, of the same questions as those of `adapter`.
        adapter: The scores to compare.
    """
    names = [(group, metric) for group, spec in groups.items() for metric in spec.metrics]
    compared = [_compared(groups[group], metric, base, adapter) for group, metric in names]
    holm = statistics.holm([figures_of_metric["p"] for figures_of_metric in compared])
    figures = dict(zip(names, zip(compared, holm, strict=True), strict=True))
    return {
        group: {
            "version": spec.version,
            "tasks": list(spec.tasks),
            "metrics": {metric: _with_verdict(*figures[group, metric]) for metric in spec.metrics},
        }
        for group, spec in groups.items()
    }


def groups_from(claimed: Mapping[str, Any]) -> dict[str, GroupSpec]:
    """The groups that the manifest's `evaluation.groups` is about, to compute them again."""
    return {
        name: GroupSpec(
            group["version"],
            tuple(group["tasks"]),
            {metric: figures["weight_by_size"] for metric, figures in group["metrics"].items()},
            {metric: figures["higher_is_better"] for metric, figures in group["metrics"].items()},
        )
        for name, group in claimed.items()
    }


def _values(scored: Evaluated, task: str, metric: str) -> list[float] | None:
    """A task's value of a metric for each question; None if it does not have the metric."""
    if task in scored.scores:
        of_choices = getattr(scored.scores[task], CHOICE_METRICS[metric]) if metric in CHOICE_METRICS else None
        return None if of_choices is None else [float(value) for value in of_choices]
    scored_task = scored.measured.get(task)
    if scored_task is None or metric not in scored_task.values or scored_task.metrics[metric].aggregation != "mean":
        return None
    return [value for value, _ in scored_task.values[metric]]


def _compared(spec: GroupSpec, metric: str, base: Evaluated, adapter: Evaluated) -> dict[str, Any]:
    pairs = {
        task: (before, after)
        for task in spec.tasks
        if (before := _values(base, task, metric)) is not None and (after := _values(adapter, task, metric)) is not None
    }
    by_size, rises = spec.metrics[metric], spec.higher_is_better[metric]
    sizes = [len(before) for before, _ in pairs.values()]
    shares = [size / sum(sizes) if by_size else 1 / len(sizes) for size in sizes]
    means = [
        sum(share * sum(pair[side]) / len(pair[side]) for share, pair in zip(shares, pairs.values(), strict=True))
        for side in (0, 1)
    ]
    befores = [value for before, _ in pairs.values() for value in before]
    afters = [value for _, after in pairs.values() for value in after]
    counts = [
        sum((a > b) if up else (a < b) for b, a in zip(befores, afters, strict=True)) for up in (rises, not rises)
    ]
    if (by_size or len(set(sizes)) == 1) and {*befores, *afters} <= {0, 1}:
        exact = statistics.compare([value == 1 for value in befores], [value == 1 for value in afters])
        test, delta, ci95, p, freedom = "mcnemar", exact.delta, exact.ci95, exact.mcnemar_p, None
    else:
        differences = [[a - b for b, a in zip(*pair, strict=True)] for pair in pairs.values()]
        mean = statistics.stratified(differences, shares)
        test, delta, ci95, p, freedom = "stratified_t", mean.delta, mean.ci95, mean.p, mean.freedom
    return {
        "weight_by_size": by_size,
        "higher_is_better": rises,
        "tasks": len(pairs),
        "n": len(befores),
        "base": means[0],
        "adapter": means[1],
        "test": test,
        "delta": delta,
        "ci95": ci95,
        "p": p,
        "freedom": freedom,
        "improved": counts[0],
        "regressed": counts[1],
    }


def _with_verdict(compared: Mapping[str, Any], holm_p: float) -> dict[str, Any]:
    verdict = statistics.verdict(holm_p, compared["ci95"], higher_is_better=compared["higher_is_better"])
    return {**compared, "holm_p": holm_p, "verdict": verdict}
