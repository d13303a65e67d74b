"""Two models on the same tasks: the comparison in the manifest, and the quality gate that decides by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any

from job.errors import DataError, Problem
from job.evaluation import statistics
from job.evaluation.near_ties import BOUNDS, at_worst, near_ties
from job.evaluation.policy import CHOICES, Policy, named, of_metric
from job.evaluation.policy_verdict import evaluate_policy, passes
from job.evaluation.policy_verdict import reasons as policy_reasons
from job.records import TaskScores

DEQUANTIZED = "dequantized"
"""The candidate of `merged` that is taken where accuracies are equal."""
_AT_WORST = ("delta", "ci95", "holm_p", "verdict")
"""The manifest's fields of a comparison in which all near ties are decided one way."""


def compare_tasks(
    base: Mapping[str, TaskScores],
    adapter: Mapping[str, TaskScores],
    *,
    overlap: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """The manifest's `evaluation.tasks`: both models on each task, p values adjusted by Holm over the tasks.

    Args:
        base: By task, the scores to compare with. It may hold more tasks than `adapter`.
        adapter: By task, the scores to compare.
        overlap: By task, the numbers of the questions that training rows have in them: a task that has any gets the
            same comparison without them, as `without_overlap`.

    Raises:
        DataError: The questions or prompts of a task differ.
    """
    compared = _compare(base, adapter)
    fewer = {name: frozenset(numbers) for name, numbers in (overlap or {}).items() if name in adapter and numbers}
    enough = {name for name in fewer if adapter[name].n - len(fewer[name]) > 1}
    if enough:
        less = {name: fewer[name] for name in enough}
        without_overlap = _compare(
            *({name: _without(one, less.get(name)) for name, one in side.items()} for side in (base, adapter))
        )
        kept = {"source", "task_hash", "version"}
    for name in sorted(fewer):
        compared[name]["without_overlap"] = (
            {key: value for key, value in without_overlap[name].items() if key not in kept} if name in enough else None
        )
    return compared


def _without(scores: TaskScores, left_out: frozenset[int] | None) -> TaskScores:
    """The scores of a task without the questions of these numbers (from 0); two or more must be left."""
    if not left_out:
        return scores
    correct = [right for number, right in enumerate(scores.correct) if number not in left_out]
    by_length = scores.correct_norm
    norm = None if by_length is None else [right for number, right in enumerate(by_length) if number not in left_out]
    return replace(
        scores,
        n=len(correct),
        acc=sum(correct) / len(correct),
        stderr=statistics.standard_error(correct),
        acc_norm=None if norm is None else sum(norm) / len(norm),
        acc_norm_stderr=None if norm is None else statistics.standard_error(norm),
        correct=tuple(correct),
        correct_norm=None if norm is None else tuple(norm),
        close=None,
        close_norm=None,
    )


def _compare(base: Mapping[str, TaskScores], adapter: Mapping[str, TaskScores]) -> dict[str, Any]:
    if other := sorted(name for name in adapter if name not in base or base[name].task_hash != adapter[name].task_hash):
        raise DataError([Problem(name, "the base answered other questions than the adapter") for name in other])
    acc = {name: statistics.compare(base[name].correct, adapter[name].correct) for name in adapter}
    acc_norm = {
        name: statistics.compare(before, after)
        for name in adapter
        if (before := base[name].correct_norm) is not None and (after := adapter[name].correct_norm) is not None
    }
    holm = dict(zip(acc, statistics.holm([c.mcnemar_p for c in acc.values()]), strict=True))
    holm_norm = dict(zip(acc_norm, statistics.holm([c.mcnemar_p for c in acc_norm.values()]), strict=True))
    return {
        name: {
            "source": scores.source,
            "task_hash": scores.task_hash,
            "version": scores.version,
            "n": scores.n,
            **({"num_fewshot": scores.num_fewshot} if scores.num_fewshot else {}),
            "base": _scores(base[name]),
            "adapter": _scores(scores),
            **_comparison(acc[name], holm[name]),
            "acc_norm": _comparison(acc_norm[name], holm_norm[name]) if name in acc_norm else None,
        }
        for name, scores in adapter.items()
    }


def _scores(scores: TaskScores) -> dict[str, Any]:
    return {key: getattr(scores, key) for key in ("acc", "stderr", "acc_norm", "acc_norm_stderr", "reused_from")}


def _comparison(comparison: statistics.Comparison, holm_p: float) -> dict[str, Any]:
    """The manifest's part of a comparison. Its verdict uses the adjusted p value, so it holds for all tasks at once."""
    kept = asdict(comparison)
    for key in ("n", "base", "adapter"):
        del kept[key]
    return {**kept, "holm_p": holm_p, "verdict": statistics.verdict(holm_p, comparison.ci95)}


def compare_near_ties(
    base: Mapping[str, TaskScores], adapter: Mapping[str, TaskScores], dtype: str, bound: float | None = None
) -> dict[str, Any] | None:
    """The manifest's `evaluation.near_ties`: how many there are, and the comparison if all were decided one way.

    None where the scores are of a version that did not look for them, or no bound is known for the type.

    Args:
        base: By task, the base's scores.
        adapter: The adapter's, of the same questions.
        dtype: What the models compute in.
        bound: The largest margin of a near tie, in nats, as a run has it that is verified; None for that of `dtype` in
            `near_ties.BOUNDS`, which may change from version to version.

    Raises:
        DataError: The questions or prompts of a task differ.
    """
    models, bound = (base, adapter), BOUNDS.get(dtype) if bound is None else bound
    if bound is None or not adapter or any(model[name].close is None for model in models for name in adapter):
        return None
    compared = _compare(base, adapter)
    ends = [
        _compare(
            *(
                {name: at_worst(model[name], bound, right=right) for name in adapter}
                for model, right in zip(models, (not gained, gained), strict=True)
            )
        )
        for gained in (False, True)
    ]

    def of_metric(name: str, close: str, pick: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> dict[str, Any]:
        low, high = ({key: pick(end[name])[key] for key in _AT_WORST} for end in ends)
        verdict = pick(compared[name])["verdict"]
        counts = (near_ties(getattr(model[name], close), bound) for model in models)
        return {
            **dict(zip(("base", "adapter"), counts, strict=True)),
            "lowest": low,
            "highest": high,
            "holds": low["verdict"] == verdict == high["verdict"],
        }

    tasks = {
        name: {
            "acc": of_metric(name, "close", lambda task: task),
            "acc_norm": of_metric(name, "close_norm", lambda task: task["acc_norm"])
            if comparison["acc_norm"]
            else None,
        }
        for name, comparison in compared.items()
    }
    return {"dtype": dtype, "bound": bound, "tasks": tasks}


def compare_export(
    base: Mapping[str, TaskScores],
    adapter: Mapping[str, TaskScores],
    exported: Mapping[str, TaskScores],
    original: Mapping[str, TaskScores] | None = None,
) -> dict[str, Any]:
    """A candidate of an exported format, by task: its scores, paired with those of the base and of the adapter.

    Also with those of the base with its `original` weights, where it was scored.

    Raises:
        DataError: The questions or prompts of a task differ.
    """
    versus = {"versus_base": compare_tasks(base, exported), "versus_adapter": compare_tasks(adapter, exported)}
    if original:
        versus["versus_original"] = compare_tasks(original, exported)
    return _by_task(exported, versus)


def compare_full_precision(
    original: Mapping[str, TaskScores], base: Mapping[str, TaskScores], adapter: Mapping[str, TaskScores]
) -> dict[str, Any]:
    """The base with its original weights, by task: its scores, and how the other two compare with it.

    `base_versus_original` is what quantization cost, `adapter_versus_original` what remains of it after training. What
    training gave, the adapter against the quantized base, is `compare_tasks(base, adapter)`.

    Raises:
        DataError: The questions or prompts of a task differ.
    """
    versus = {
        "base_versus_original": compare_tasks(original, base),
        "adapter_versus_original": compare_tasks(original, adapter),
    }
    return _by_task({task: original[task] for task in adapter}, versus)


def original_tasks(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The base with its original weights by task, from a manifest; empty where it was not scored."""
    tasks: Mapping[str, Any] = (results["evaluation"].get("full_precision") or {"tasks": {}})["tasks"]
    return tasks


def _by_task(scored: Mapping[str, TaskScores], versus: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One model's scores by task, with comparisons from `compare_tasks` by name."""
    not_of_acc = {"source", "task_hash", "version", "n", "num_fewshot", "base", "adapter", "acc_norm"}
    return {
        task: {
            "n": scores.n,
            "task_hash": scores.task_hash,
            "scores": _scores(scores),
            **{
                name: {
                    "acc": {key: value for key, value in compared[task].items() if key not in not_of_acc},
                    "acc_norm": compared[task]["acc_norm"],
                }
                for name, compared in versus.items()
            },
        }
        for task, scores in scored.items()
    }


def choose_candidate(scores: Mapping[str, Mapping[str, TaskScores]]) -> tuple[str, str]:
    """Which candidate of an exported format is published, and why: the one with the highest `acc`, the mean over tasks.

    Args:
        scores: By candidate, the scores by task; two or more candidates. Of several that are best `dequantized` is
            taken, else the first.
    """
    # As fractions: rounding of floats would make one of two equal means the higher.
    means = {
        name: sum(Fraction(sum(one.correct), one.n) for one in by_task.values()) / len(by_task)
        for name, by_task in scores.items()
    }
    best = [name for name, mean in means.items() if mean == max(means.values())]
    figures = ", ".join(f"{name} {float(100 * mean):.2f} %" for name, mean in means.items())
    if len(best) == 1:
        return best[0], f"the higher accuracy: {figures}"
    if DEQUANTIZED in best:
        return DEQUANTIZED, f"the same accuracy ({figures}), and the adapter was trained on the dequantized weights"
    return best[0], f"the same accuracy ({figures})"


def evaluate_gate(
    tasks: Mapping[str, Any],
    *,
    metric: str,
    min_delta: float | None,
    max_regression: float | None,
    on: str = "adapter",
    baseline: Mapping[str, Any] | None = None,
    policy: Policy | None = None,
) -> dict[str, Any]:
    """The manifest's `gate`.

    Args:
        tasks: `evaluation.tasks` of the manifest, or the same comparison of what `on` names; with `measured` and
            `groups` of the manifest where the gate compares the adapter with the base.
        metric: As for `gate_failures`.
        min_delta: As for `gate_failures`.
        max_regression: As for `gate_failures`.
        on: What the gate is about: `adapter`, or an exported format.
        baseline: The earlier run to compare with, the comparison as its `tasks`; None to compare with the base model.
        policy: Rules by task, instead of the thresholds.
    """
    compared = baseline["tasks"] if baseline else tasks
    verdict = None if policy is None else evaluate_policy(policy, compared)
    if policy is None or verdict is None:
        reasons = gate_failures(compared, metric, min_delta, max_regression)
    else:
        reasons = [] if passes(policy, verdict) else policy_reasons(verdict)
    if reasons and on != "adapter":
        reasons = [f"{on}, {reason}" for reason in reasons]
    return {
        "on": on,
        "metric": metric,
        "min_delta": min_delta,
        "max_regression": max_regression,
        **({} if verdict is None else {"policy": verdict}),
        "baseline": baseline,
        "passed": None if reasons is None else not reasons,
        "reasons": reasons or [],
    }


def tasks_for_metric(tasks: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """The tasks that a metric of the gate is about: those with choices, or the others that have it; never groups.

    A task that has several of the name is among them, though the gate cannot compare it: it is never silently left out.
    """
    if metric in CHOICES:
        return {name: task for name, task in tasks.items() if "metrics" not in task}
    return {name: task for name, task in tasks.items() if "kind" in task and named(metric, task["metrics"])}


def without_metric(task: str, metric: str) -> str:
    """Why a task of `tasks_for_metric` has no figure by the metric, in words."""
    return f"{task} has {'no' if metric in CHOICES else 'several metrics'} {metric}"


def gate_failures(
    tasks: Mapping[str, Any], metric: str, min_delta: float | None, max_regression: float | None
) -> list[str] | None:
    """Why the adapter does not pass, one sentence each; None if no threshold is set.

    The lower bound of the 95 % interval is compared, not the estimate: with 97.5 % confidence, the true difference is
    above that bound.

    Args:
        tasks: `evaluation.tasks` of a manifest; also `measured` and `groups`, of which the gate never compares groups.
        metric: `acc` or `acc_norm`, for the tasks of choices; or that of other tasks, for those that have it.
        min_delta: The least gain, as a fraction of the questions, or in the metric's own unit.
        max_regression: The largest loss, in the same unit.
    """
    if min_delta is None and max_regression is None:
        return None
    tasks = tasks_for_metric(tasks, metric)
    reasons = [] if tasks else ["nothing was scored, so the gate cannot be met"]
    for name, task in tasks.items():
        figure = of_metric(task, metric)
        if figure is None:
            reasons.append(without_metric(name, metric))
            continue
        low = figure["ci95"][0] if figure.get("higher_is_better", True) else -figure["ci95"][1]
        if min_delta is not None and low < min_delta:
            reasons.append(f"{name}: {metric} may have gained only {low:+.4f}, the gate requires {min_delta:+.4f}")
        if max_regression is not None and low < -max_regression:
            reasons.append(f"{name}: {metric} may have lost {-low:.4f}, the gate allows {max_regression:.4f}")
    return reasons
