"""Two models on the same tasks: the manifest's figures of how they compare, and the quality gate that judges them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from job.errors import DataError, Problem
from job.evaluation import statistics
from job.records import TaskScores


def compare_tasks(base: Mapping[str, TaskScores], adapter: Mapping[str, TaskScores]) -> dict[str, Any]:
    """Base and adapter side by side for each task, with Holm's correction over the tasks.

    Raises:
        DataError: They were not asked the same.
    """
    if other := sorted(name for name in adapter if name not in base or base[name].task_hash != adapter[name].task_hash):
        raise DataError([Problem(name, "the base was asked other questions than the adapter") for name in other])
    plain = {name: statistics.compare(base[name].correct, adapter[name].correct) for name in adapter}
    normal = {
        name: statistics.compare(before, after)
        for name in adapter
        if (before := base[name].correct_norm) is not None and (after := adapter[name].correct_norm) is not None
    }
    holm = dict(zip(plain, statistics.holm([c.mcnemar_p for c in plain.values()]), strict=True))
    holm_norm = dict(zip(normal, statistics.holm([c.mcnemar_p for c in normal.values()]), strict=True))
    return {
        name: {
            "source": scores.source,
            "task_hash": scores.task_hash,
            "version": scores.version,
            "n": scores.n,
            "base": _scores(base[name]),
            "adapter": _scores(scores),
            **_comparison(plain[name], holm[name]),
            "acc_norm": _comparison(normal[name], holm_norm[name]) if name in normal else None,
        }
        for name, scores in adapter.items()
    }


def _scores(scores: TaskScores) -> dict[str, Any]:
    return {key: getattr(scores, key) for key in ("acc", "stderr", "acc_norm", "acc_norm_stderr", "reused_from")}


def _comparison(comparison: statistics.Comparison, holm_p: float) -> dict[str, Any]:
    """The manifest's part of a comparison; its verdict is about the corrected p, and so holds for all tasks at once."""
    kept = asdict(comparison)
    for key in ("n", "base", "adapter"):
        del kept[key]
    return {**kept, "holm_p": holm_p, "verdict": statistics.verdict(holm_p, comparison.ci95)}


def judge(
    tasks: Mapping[str, Any],
    *,
    metric: str,
    min_delta: float | None,
    max_regression: float | None,
    baseline: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest's record of the gate.

    Args:
        tasks: `evaluation.tasks` of the manifest.
        metric: As for `gate`.
        min_delta: As for `gate`.
        max_regression: As for `gate`.
        baseline: The earlier run that the gate looks back to, with the comparison with its adapter as `tasks`; None to
            look back to the base model.
    """
    reasons = gate(baseline["tasks"] if baseline else tasks, metric, min_delta, max_regression)
    return {
        "metric": metric,
        "min_delta": min_delta,
        "max_regression": max_regression,
        "baseline": baseline,
        "passed": None if reasons is None else not reasons,
        "reasons": reasons or [],
    }


def gate(
    tasks: Mapping[str, Any], metric: str, min_delta: float | None, max_regression: float | None
) -> list[str] | None:
    """Why the adapter does not pass, by the interval and not by the point; None where no gate was set.

    Args:
        tasks: `evaluation.tasks` of a manifest.
        metric: `acc` or `acc_norm`.
        min_delta: The gain has to be at least this, with 97.5 % confidence.
        max_regression: The loss has to be at most this, with the same confidence.
    """
    if min_delta is None and max_regression is None:
        return None
    reasons = []
    for name, task in tasks.items():
        found = task if metric == "acc" else task[metric]
        if found is None:
            reasons.append(f"{name} has no {metric}")
            continue
        low = found["ci95"][0]
        if min_delta is not None and low < min_delta:
            reasons.append(f"{name}: {metric} may have gained only {low:+.4f}, the gate asks for {min_delta:+.4f}")
        if max_regression is not None and low < -max_regression:
            reasons.append(f"{name}: {metric} may have lost {-low:.4f}, the gate allows {max_regression:.4f}")
    return reasons
