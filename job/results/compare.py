"""`compare`: two published runs side by side, their adapters compared question by question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.common.bad_row_reasons import with_reasons
from job.errors import DataError, Problem, SettingsError, VerificationError
from job.evaluation.comparison import compare_tasks, gate_failures, original_tasks, tasks_for_metric, without_metric
from job.evaluation.groups import compare_groups, groups_from
from job.evaluation.policy import CHOICES, check_policy, of_metric, read_policy
from job.evaluation.policy_verdict import evaluate_policy, passes, reasons
from job.evaluation.task_metrics import compare_measured
from job.records import Evaluated
from job.results.cost import repeated_steps
from job.results.reader import PublishedRun, read_measured, read_samples, scored_in
from job.runs.layout import WEIGHTS, export_side

GROUPS = ("model", "dataset", "software", "hardware")
_NAMES = {"run.id", "run.output"}
"""Settings with the name or location of a run, which always differ."""
_PREDICTIONS = {"acc": "prediction", "acc_norm": "prediction_norm"}
"""Accuracy -> the field of a sample with the answer that it counts."""


def compare(a: PublishedRun, b: PublishedRun) -> dict[str, Any]:
    """What differs between two runs, what each cost, and how B's adapter compares with A's.

    Raises:
        DataError: They have no task in common, or were asked other questions.
        VerificationError: The samples of one are not what its manifest says.
    """
    results_a, results_b = a.results, b.results
    return {
        "a": _run(a),
        "b": _run(b),
        "differs": {
            "settings": _settings(results_a["settings"], results_b["settings"]),
            **{group: _differing(*map(_flat, pair)) for group, pair in _grouped(results_a, results_b).items()},
            "scoring": _differing(scored_in(results_a), scored_in(results_b)),
        },
        "training": _both(_training(results_a), _training(results_b)),
        "cost": {
            **_both(*({**r["cost"], **_repeats(r)} for r in (results_a, results_b))),
            "attempts": _pair(*(len(r["run"]["attempts"]) for r in (results_a, results_b))),
        },
        **_tasks(a, b),
        "exports": _exports(a, b),
        "exports_of_one_run": _are_exports_of_one_run(results_a, results_b),
    }


def _are_exports_of_one_run(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether one run exports what the other trained and scored (JOB_EXPORT__RUN), or both export the same.

    On another machine an export may have scored base and adapter again: then it has figures of its own.
    """
    exports = any("exported_run" in results["run"] for results in (a, b))
    return exports and all(a[group] == b[group] for group in ("dataset", "training", "evaluation"))


def _run(run: PublishedRun) -> dict[str, Any]:
    record = run.results["run"]
    return {"run": run.id, "results": run.store.uri, "sha256": run.sha256, "finished": record["finished"]}


def _grouped(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], ...]]:
    """Each of `GROUPS` in both manifests; versions differ in how they name the reasons for skipped rows."""
    pairs = {group: (one[group], two[group]) for group in GROUPS}
    return {**pairs, "dataset": tuple(map(with_reasons, pairs["dataset"]))}


def _repeats(results: Mapping[str, Any]) -> dict[str, Any]:
    """Repeated steps as a manifest of this version has them, also of one of an earlier version."""
    number, exact, _ = repeated_steps(results)
    return {"repeated_steps": number if number or exact else None, "repeated_steps_exact": exact}


def _training(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of training, without the path of a first stage's metrics."""
    training, first = results["training"], results["training"].get("first_stage") or {}
    return {**training, "first_stage": {name: value for name, value in first.items() if name != "metrics"}}


def _pair(a: Any, b: Any) -> dict[str, Any]:
    return {"a": a, "b": b}


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    values = [{name: setting["value"] for name, setting in settings.items()} for settings in (a, b)]
    return {name: pair for name, pair in _differing(*values).items() if name not in _NAMES}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> both values, for names whose values differ; None for a missing value."""
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


def _tasks(a: PublishedRun, b: PublishedRun) -> dict[str, Any]:
    """The tasks that both were asked, and the names of those that only one was asked."""
    samples = read_samples(a), read_samples(b)
    measured = read_measured(a), read_measured(b)
    names = [name for name in samples[0] if name in samples[1]]
    common_measured = [name for name in measured[0] if name in measured[1]]
    if not names and not common_measured:
        raise DataError([Problem("evaluation", f"runs {a.id} and {b.id} have no task in common")])
    problems = []
    for name in names:
        samples_a, samples_b = (side[name] for side in samples)
        if [sample.id for sample in samples_a.samples] != [sample.id for sample in samples_b.samples]:
            counts = f"{samples_a.scores.n} and {samples_b.scores.n} of them"
            problems.append(Problem(name, f"the runs were asked other questions, {counts}"))
        elif samples_a.scores.task_hash != samples_b.scores.task_hash:
            hashes = " and ".join(side.scores.task_hash[:12] for side in (samples_a, samples_b))
            problems.append(
                Problem(name, f"the questions of the two runs have different texts; their hashes are {hashes}")
            )
    if problems:
        raise DataError(problems)
    same_predictions = {
        name: {
            metric: all(
                getattr(sample, field) == getattr(other, field)
                for sample, other in zip(samples[0][name].samples, samples[1][name].samples, strict=True)
            )
            for metric, field in _PREDICTIONS.items()
        }
        for name in names
    }
    renamed = {"base": "a", "adapter": "b"}
    tasks = compare_tasks(*({name: side[name].scores for name in names} for side in samples))
    measured_pair = [{name: side[name] for name in common_measured} for side in measured]
    evaluated = (
        Evaluated({name: side[name].scores for name in names}, [], other)
        for side, other in zip(samples, measured_pair, strict=True)
    )
    groups, not_compared = _groups(a.results, b.results, *evaluated)
    return {
        "tasks": {
            name: {
                **{renamed.get(key, key): value for key, value in task.items()},
                "same_predictions": same_predictions[name],
            }
            for name, task in tasks.items()
        },
        "measured": {
            name: {
                **facts,
                "metrics": {metric: _as_sides(comparison, renamed) for metric, comparison in facts["metrics"].items()},
            }
            for name, facts in compare_measured(*measured_pair).items()
        },
        "groups": {
            name: {
                **facts,
                "metrics": {metric: _as_sides(comparison, renamed) for metric, comparison in facts["metrics"].items()},
            }
            for name, facts in groups.items()
        },
        "groups_not_compared": not_compared,
        "bases": {name: _pair(*(_bases(run.results, name) for run in (a, b))) for name in names},
        "same_adapter": _adapter(a) is not None and _adapter(a) == _adapter(b),
        "only": _pair(
            *(
                sorted({*side, *other} - {*names, *common_measured})
                for side, other in zip(samples, measured, strict=True)
            )
        ),
    }


def _groups(
    one: Mapping[str, Any], two: Mapping[str, Any], a: Evaluated, b: Evaluated
) -> tuple[dict[str, Any], list[str]]:
    """The groups that are the same in both runs, and the names of those that only one has, or that differ.

    Raises:
        VerificationError: A group has a metric that none of its tasks has.
    """
    specs = [groups_from(results["evaluation"].get("groups", {})) for results in (one, two)]
    scored = {*b.scores, *b.measured}
    common = {
        name: spec for name, spec in specs[0].items() if spec == specs[1].get(name) and scored.issuperset(spec.tasks)
    }
    try:
        compared = compare_groups(common, a, b)
    except (KeyError, ValueError, ArithmeticError):
        raise VerificationError([Problem("evaluation.groups", "has a metric that none of its tasks has")]) from None
    return compared, sorted({*specs[0], *specs[1]} - common.keys())


def _exports(a: PublishedRun, b: PublishedRun) -> dict[str, Any]:
    """By format, the export of each run, None where it has none; and by task, B's answers paired with A's.

    Raises:
        VerificationError: The samples of one are not what its manifest says.
    """
    exports_a, exports_b = ({export["format"]: export for export in run.results.get("exports", ())} for run in (a, b))
    shown = [{name: _export(export) for name, export in side.items()} for side in (exports_a, exports_b)]
    return {
        name: {
            **_pair(*(side.get(name) for side in shown)),
            "paired": _pairs(a, b, exports_a[name], exports_b[name]) if name in exports_a and name in exports_b else {},
        }
        for name in dict.fromkeys([*exports_a, *exports_b])
    }


def _pairs(
    a: PublishedRun, b: PublishedRun, export_a: Mapping[str, Any], export_b: Mapping[str, Any]
) -> dict[str, Any]:
    """By task, the format of run B against that of run A; none where one of them was not scored."""
    if not all(export["candidates"].get(export["candidate"]) for export in (export_a, export_b)):
        return {}
    samples = [
        read_samples(run, export_side(export["format"], export["candidate"]))
        for run, export in ((a, export_a), (b, export_b))
    ]
    common = [
        name for name, own in samples[0].items() if name in samples[1] and own.questions == samples[1][name].questions
    ]
    compared = compare_tasks(*({name: side[name].scores for name in common} for side in samples))
    return {name: _paired(task) for name, task in compared.items()}


def _export(export: Mapping[str, Any]) -> dict[str, Any]:
    """The candidate of a format that is published, its size, and its accuracies, also against the run's own adapter."""
    scored = export["candidates"].get(export["candidate"]) or {}
    return {
        "candidate": export["candidate"],
        "bytes": export.get("bytes"),
        "tasks": {
            task: {"acc": figures["scores"]["acc"], "versus_adapter": _paired(figures["versus_adapter"]["acc"])}
            for task, figures in scored.items()
        },
    }


def _bases(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A run's adapter against its own bases: accuracies, and what quantization cost, training gave, and both together.

    None for what is not known; a base that is not quantized is the unquantized one.
    """
    own = results["evaluation"]["tasks"][task]
    training = _paired(own)
    figures = {"original": None, "quantization": None, "base": own["base"]["acc"], "training": training, "both": None}
    if results["model"]["quantization"] == "none":
        return {**figures, "original": own["base"]["acc"], "both": training}
    if (original := original_tasks(results).get(task)) is None:
        return figures
    return {
        **figures,
        "original": original["scores"]["acc"],
        "quantization": _paired(original["base_versus_original"]["acc"]),
        "both": _paired(original["adapter_versus_original"]["acc"]),
    }


def _paired(comparison: Mapping[str, Any]) -> dict[str, Any]:
    return {name: comparison[name] for name in ("delta", "ci95", "holm_p", "verdict")}


def _as_sides(comparison: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in comparison.items()}


def _adapter(run: PublishedRun) -> str | None:
    """SHA-256 of the adapter's weights; None if the manifest lists none."""
    return next((one["sha256"] for one in run.results["artifacts"] if one["path"] == WEIGHTS), None)


def gate_reasons(
    compared: Mapping[str, Any], *, metric: str, min_delta: float | None, max_regression: float | None
) -> list[str]:
    """Why B does not pass. Without a threshold it passes unless it is significantly worse than A on a task.

    Args:
        compared: From `compare`.
        metric: As for `gate_failures`.
        min_delta: As for `gate_failures`.
        max_regression: As for `gate_failures`.

    Raises:
        SettingsError: No task of both runs has the metric.
    """
    tasks = tasks_for_metric({**compared["tasks"], **compared["measured"]}, metric)
    if not tasks and metric not in CHOICES:
        raise SettingsError([Problem("--metric", f"is {metric}, which no task has that both runs were asked")])
    reasons = [f"{name} was not asked of B" for name in compared["only"]["a"]]
    failures = gate_failures(tasks, metric, min_delta, max_regression)
    if failures is not None:
        return reasons + failures
    for name, task in tasks.items():
        figures = of_metric(task, metric)
        if figures is None:
            reasons.append(without_metric(name, metric))
        elif figures["verdict"] == "regressed":
            reasons.append(f"{name}: {metric} regressed by {-figures['delta']:.4f}, p = {figures['holm_p']:.2g}")
    return reasons


def evaluate_by_policy(compared: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The outcome of a policy's rules, with B as the adapter and A as the base.

    Args:
        compared: From `compare`.
        path: The policy's file.

    Raises:
        SettingsError: It is no policy, or names a task, group or metric that not both runs have.
    """
    tasks, measured = compared["tasks"], compared["measured"]
    metric_names = {
        name: [f"{metric},none" for metric in CHOICES if of_metric(task, metric)] for name, task in tasks.items()
    }
    policy = read_policy(path)
    other_tasks = {**measured, **compared.get("groups", {})}
    groups = {name: group["tasks"] for name, group in compared.get("groups", {}).items()}
    check_policy(
        policy,
        path,
        metric_names | {name: list(group["metrics"]) for name, group in other_tasks.items()},
        groups=groups,
    )
    verdict = evaluate_policy(policy, {**tasks, **other_tasks})
    passed = passes(policy, verdict)
    return {"policy": verdict, "passed": passed, "reasons": [] if passed else reasons(verdict)}
