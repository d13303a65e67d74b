"""`compare`: two published runs side by side, and their adapters paired question by question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.errors import DataError, Problem
from job.evaluation.comparison import compare_tasks, gate
from job.results.reader import Published, adapter_scores, read_answers

GROUPS = ("model", "dataset", "software", "hardware")
# They name the run or say where it lies.
_NAMES = {"run.id", "run.output"}


def compare(a: Published, b: Published) -> dict[str, Any]:
    """What differs between two runs, what each cost, and how B's adapter compares with A's.

    Raises:
        DataError: They cannot be compared.
        VerificationError: The answers of one are not what its manifest says.
    """
    one, two = a.results, b.results
    return {
        "a": _run(a),
        "b": _run(b),
        "differs": {
            "settings": _settings(one["settings"], two["settings"]),
            **{group: _differing(_flat(one[group]), _flat(two[group])) for group in GROUPS},
        },
        "training": _both(one["training"], two["training"]),
        "cost": {
            **_both(one["cost"], two["cost"]),
            "attempts": _pair(*(len(r["run"]["attempts"]) for r in (one, two))),
        },
        **_tasks(a, b),
    }


def _run(run: Published) -> dict[str, Any]:
    known = run.results["run"]
    return {"run": run.id, "results": run.store.uri, "sha256": run.sha256, "finished": known["finished"]}


def _pair(a: Any, b: Any) -> dict[str, Any]:
    return {"a": a, "b": b}


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    values = [{name: setting["value"] for name, setting in settings.items()} for settings in (a, b)]
    return {name: pair for name, pair in _differing(*values).items() if name not in _NAMES}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> both values, where these differ; None for one that is not there."""
    return {name: _pair(a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)}


def _both(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    one, two = _flat(a), _flat(b)
    return {name: _pair(one.get(name), two.get(name)) for name in dict.fromkeys([*one, *two])}


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted name -> value of everything in a group."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return flat


def _tasks(a: Published, b: Published) -> dict[str, Any]:
    """The tasks that both were asked, and the names of those that only one was asked."""
    answers = read_answers(a), read_answers(b)
    names = [name for name in answers[0] if name in answers[1]]
    if not names:
        raise DataError([Problem("evaluation", f"runs {a.id} and {b.id} were asked no task in common")])
    one, two = (
        {name: scores for name, scores in adapter_scores(run, side).items() if name in names}
        for run, side in zip((a, b), answers, strict=True)
    )
    ids = [{name: [record.id for record in side[name][1]] for name in names} for side in answers]
    wrong = []
    for name in names:
        if ids[0][name] != ids[1][name]:
            wrong.append(Problem(name, f"the runs were asked other questions, {one[name].n} and {two[name].n} of them"))
        elif one[name].task_hash != two[name].task_hash:
            hashes = " and ".join(scores[name].task_hash[:12] for scores in (one, two))
            wrong.append(Problem(name, f"the questions of the two runs read differently; their hashes are {hashes}"))
    if wrong:
        raise DataError(wrong)
    sides = {"base": "a", "adapter": "b"}
    tasks = compare_tasks(one, two)
    return {
        "tasks": {name: {sides.get(key, key): value for key, value in task.items()} for name, task in tasks.items()},
        "only": _pair(*(sorted(side.keys() - set(names)) for side in answers)),
    }


def gate_reasons(
    compared: Mapping[str, Any], *, metric: str, min_delta: float | None, max_regression: float | None
) -> list[str]:
    """Why B does not pass; without a threshold it passes unless it is significantly worse than A on some task.

    Args:
        compared: From `compare`.
        metric: `acc` or `acc_norm`.
        min_delta: As for `comparison.gate`.
        max_regression: As for `comparison.gate`.
    """
    tasks = compared["tasks"]
    reasons = [f"{name} was not asked of B" for name in compared["only"]["a"]]
    found = gate(tasks, metric, min_delta, max_regression)
    if found is not None:
        return reasons + found
    for name, task in tasks.items():
        figures = task if metric == "acc" else task[metric]
        if figures is None:
            reasons.append(f"{name} has no {metric}")
        elif figures["verdict"] == "regressed":
            reasons.append(f"{name}: {metric} regressed by {-figures['delta']:.4f}, p = {figures['holm_p']:.2g}")
    return reasons
