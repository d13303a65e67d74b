"""`compare`: two published runs side by side, their adapters compared question by question; as text or Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from job.common import tables
from job.errors import DataError, Problem, SettingsError, VerificationError
from job.evaluation.comparison import compare_tasks, gate_failures, judged_by, original_tasks, without_metric
from job.evaluation.groups import compare_groups, groups_from
from job.evaluation.measured import compare_measured
from job.evaluation.policy import (
    CHOICES,
    check_policy,
    judge_policy,
    lines,
    of_metric,
    passes,
    read_policy,
    reasons,
)
from job.records import Evaluated
from job.results.reader import PublishedRun, read_measured, read_samples, scored_in
from job.runs.layout import WEIGHTS, export_side

GROUPS = ("model", "dataset", "software", "hardware")
_NAMES = {"run.id", "run.output"}
"""Settings with the name or location of a run, which always differ."""
_COMPARED = ("difference", "95 % interval", "better", "worse", "p", "Holm p", "verdict")
_TASK_COLUMNS = ("task", "questions", "A", "B", *_COMPARED)
_GROUP_COLUMNS = ("group, metric", "tasks", "questions", "A", "B", "better is", *_COMPARED)
_METRIC_COLUMNS = ("task, metric", "questions", "A", "B", "better is", *_COMPARED)
_PREDICTIONS = {"acc": "prediction", "acc_norm": "prediction_norm"}
"""Accuracy -> the field of a sample with the answer that it counts."""
_BASE_ROWS = (
    ("unquantized base", "original"),
    ("quantization", "quantization"),
    ("base trained on", "base"),
    ("training", "training"),
    ("adapter less unquantized base", "both"),
)
"""What the table of the bases says of each task, and its name in `bases`."""
_WIDEST = 80


def compare(a: PublishedRun, b: PublishedRun) -> dict[str, Any]:
    """What differs between two runs, what each cost, and how B's adapter compares with A's.

    Raises:
        DataError: They have no task in common, or were asked other questions.
        VerificationError: The samples of one are not what its manifest says.
    """
    one, two = a.results, b.results
    return {
        "a": _run(a),
        "b": _run(b),
        "differs": {
            "settings": _settings(one["settings"], two["settings"]),
            **{group: _differing(_flat(one[group]), _flat(two[group])) for group in GROUPS},
            "scoring": _differing(scored_in(one), scored_in(two)),
        },
        "training": _both(_training(one), _training(two)),
        "cost": {
            **_both(one["cost"], two["cost"]),
            "attempts": _pair(*(len(r["run"]["attempts"]) for r in (one, two))),
        },
        **_tasks(a, b),
        "exports": _exports(a, b),
    }


def _run(run: PublishedRun) -> dict[str, Any]:
    record = run.results["run"]
    return {"run": run.id, "results": run.store.uri, "sha256": run.sha256, "finished": record["finished"]}


def _training(results: Mapping[str, Any]) -> dict[str, Any]:
    """What training did, without where the metrics of a first stage lie."""
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
    both = [name for name in measured[0] if name in measured[1]]
    if not names and not both:
        raise DataError([Problem("evaluation", f"runs {a.id} and {b.id} have no task in common")])
    wrong = []
    for name in names:
        one, two = (side[name] for side in samples)
        if [sample.id for sample in one.samples] != [sample.id for sample in two.samples]:
            counts = f"{one.scores.n} and {two.scores.n} of them"
            wrong.append(Problem(name, f"the runs were asked other questions, {counts}"))
        elif one.scores.task_hash != two.scores.task_hash:
            hashes = " and ".join(side.scores.task_hash[:12] for side in (one, two))
            wrong.append(
                Problem(name, f"the questions of the two runs have different texts; their hashes are {hashes}")
            )
    if wrong:
        raise DataError(wrong)
    same = {
        name: {
            metric: all(
                getattr(sample, field) == getattr(other, field)
                for sample, other in zip(samples[0][name].samples, samples[1][name].samples, strict=True)
            )
            for metric, field in _PREDICTIONS.items()
        }
        for name in names
    }
    sides = {"base": "a", "adapter": "b"}
    tasks = compare_tasks(*({name: side[name].scores for name in names} for side in samples))
    others = [{name: side[name] for name in both} for side in measured]
    evaluated = (
        Evaluated({name: side[name].scores for name in names}, [], other)
        for side, other in zip(samples, others, strict=True)
    )
    groups, alone = _groups(a.results, b.results, *evaluated)
    return {
        "tasks": {
            name: {**{sides.get(key, key): value for key, value in task.items()}, "same_predictions": same[name]}
            for name, task in tasks.items()
        },
        "measured": {
            name: {**found, "metrics": {metric: _as_sides(one, sides) for metric, one in found["metrics"].items()}}
            for name, found in compare_measured(*others).items()
        },
        "groups": {
            name: {**found, "metrics": {metric: _as_sides(one, sides) for metric, one in found["metrics"].items()}}
            for name, found in groups.items()
        },
        "groups_not_compared": alone,
        "bases": {name: _pair(*(_bases(run.results, name) for run in (a, b))) for name in names},
        "same_adapter": _adapter(a) is not None and _adapter(a) == _adapter(b),
        "only": _pair(
            *(sorted({*side, *other} - {*names, *both}) for side, other in zip(samples, measured, strict=True))
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
    same = {
        name: spec for name, spec in specs[0].items() if spec == specs[1].get(name) and scored.issuperset(spec.tasks)
    }
    try:
        found = compare_groups(same, a, b)
    except (KeyError, ValueError, ArithmeticError):
        raise VerificationError([Problem("evaluation.groups", "has a metric that none of its tasks has")]) from None
    return found, sorted({*specs[0], *specs[1]} - same.keys())


def _exports(a: PublishedRun, b: PublishedRun) -> dict[str, Any]:
    """By format, what each run has of it, None where it has none; and by task, B's answers paired with A's.

    Raises:
        VerificationError: The samples of one are not what its manifest says.
    """
    one, two = ({export["format"]: export for export in run.results.get("exports", ())} for run in (a, b))
    shown = [{name: _export(export) for name, export in side.items()} for side in (one, two)]
    return {
        name: {
            **_pair(*(side.get(name) for side in shown)),
            "paired": _pairs(a, b, one[name], two[name]) if name in one and name in two else {},
        }
        for name in dict.fromkeys([*one, *two])
    }


def _pairs(a: PublishedRun, b: PublishedRun, one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """By task, the format of run B against that of run A; none where one of them was not scored."""
    if not all(export["candidates"].get(export["candidate"]) for export in (one, two)):
        return {}
    samples = [
        read_samples(run, export_side(export["format"], export["candidate"])) for run, export in ((a, one), (b, two))
    ]
    same = [
        name
        for name, found in samples[0].items()
        if name in samples[1] and found.questions == samples[1][name].questions
    ]
    found = compare_tasks(*({name: side[name].scores for name in same} for side in samples))
    return {name: _paired(task) for name, task in found.items()}


def _export(export: Mapping[str, Any]) -> dict[str, Any]:
    """The candidate of a format that is published, its size, and its accuracies, also against the run's own adapter."""
    scored = export["candidates"].get(export["candidate"]) or {}
    return {
        "candidate": export["candidate"],
        "bytes": export.get("bytes"),
        "tasks": {
            task: {"acc": found["scores"]["acc"], "versus_adapter": _paired(found["versus_adapter"]["acc"])}
            for task, found in scored.items()
        },
    }


def _bases(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A run's adapter against its own bases: accuracies, and what quantization cost, training gave, and both together.

    None for what is not known; a base that is not quantized is the unquantized one.
    """
    own = results["evaluation"]["tasks"][task]
    training = _paired(own)
    found = {"original": None, "quantization": None, "base": own["base"]["acc"], "training": training, "both": None}
    if results["model"]["quantization"] == "none":
        return {**found, "original": own["base"]["acc"], "both": training}
    if (one := original_tasks(results).get(task)) is None:
        return found
    return {
        **found,
        "original": one["scores"]["acc"],
        "quantization": _paired(one["base_versus_original"]["acc"]),
        "both": _paired(one["adapter_versus_original"]["acc"]),
    }


def _paired(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("delta", "ci95", "holm_p", "verdict")}


def _as_sides(found: Mapping[str, Any], sides: Mapping[str, str]) -> dict[str, Any]:
    return {sides.get(key, key): value for key, value in found.items()}


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
    tasks = judged_by({**compared["tasks"], **compared["measured"]}, metric)
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


def judge_by_policy(compared: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The outcome of a policy's rules, with B in the place of the adapter and A in that of the base.

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
    others = {**measured, **compared.get("groups", {})}
    groups = {name: group["tasks"] for name, group in compared.get("groups", {}).items()}
    check_policy(
        policy, path, metric_names | {name: list(group["metrics"]) for name, group in others.items()}, groups=groups
    )
    judged = judge_policy(policy, {**tasks, **others})
    passed = passes(policy, judged)
    return {"policy": judged, "passed": passed, "reasons": [] if passed else reasons(judged)}


def as_text(compared: Mapping[str, Any]) -> list[str]:
    """The comparison as plain text, line by line."""
    lines = []
    for title, head, rows in _sections(compared):
        lines += [title, *(f"  {line}" for line in (tables.plain(head, rows) if rows else ["nothing"])), ""]
    return [*lines, *_ending(compared)]


def as_markdown(compared: Mapping[str, Any]) -> list[str]:
    """The comparison in Markdown, for a comment by a CI job, line by line."""
    lines = []
    for title, head, rows in _sections(compared):
        lines += [f"### {title}", "", *(tables.markdown(head, rows) if rows else ["nothing"]), ""]
    return [*lines, *_ending(compared)]


def _sections(compared: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], list[list[str]]]]:
    """(title, column names, rows) of every table."""
    both = ("", "A", "B")
    yield (
        "Runs",
        both,
        [_row(name, compared["a"][name], compared["b"][name]) for name in ("run", "results", "finished")],
    )
    yield "Adapters", _TASK_COLUMNS, list(_task_rows(compared["tasks"]))
    if any(one["original"] is not None for pair in compared.get("bases", {}).values() for one in pair.values()):
        yield "Each adapter and its own bases, acc", both, list(_base_rows(compared["bases"]))
    if compared.get("groups"):
        yield "Groups of tasks", _GROUP_COLUMNS, list(_group_rows(compared["groups"]))
    if compared.get("measured"):
        yield "Metrics of other tasks", _METRIC_COLUMNS, list(_metric_rows(compared["measured"]))
    if compared.get("exports"):
        yield "Exported formats, acc", both, list(_export_rows(compared["exports"]))
    differing = [
        _row(f"{group}.{name}" if group != "settings" else name, *pair.values())
        for group, found in compared["differs"].items()
        for name, pair in found.items()
    ]
    yield "What differs", both, differing
    for group in ("training", "cost"):
        pairs = {name: (pair["a"], pair["b"]) for name, pair in compared[group].items()}
        yield group.capitalize(), both, [_row(name, *pair) for name, pair in pairs.items() if pair != (None, None)]


def _task_rows(tasks: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, task in tasks.items():
        for metric in ("acc", "acc_norm"):
            found = of_metric(task, metric)
            if found is None:
                continue
            low, high = found["ci95"]
            yield [
                f"{name}, {metric}",
                f"{task['n']:,}",
                *(f"{100 * task[side][metric]:.2f} %" for side in ("a", "b")),
                f"{100 * found['delta']:+.2f}",
                f"{100 * low:+.2f} to {100 * high:+.2f}",
                *(str(found[key]) for key in ("improved", "regressed")),
                *(f"{found[key]:.2g}" for key in ("mcnemar_p", "holm_p")),
                "no difference" if task["same_predictions"][metric] else found["verdict"],
            ]


def _base_rows(bases: Mapping[str, Any]) -> Iterator[list[str]]:
    for task, pair in bases.items():
        for title, name in _BASE_ROWS:
            yield [f"{task}, {title}", *(_of_base(one[name]) for one in pair.values())]


def _of_base(value: Any) -> str:
    """An accuracy, or a difference with its interval and verdict."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{100 * value:.2f} %"
    low, high = value["ci95"]
    return f"{100 * value['delta']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f}), {value['verdict']}"


def _export_rows(exports: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, pair in exports.items():
        runs = [pair[side] or {"bytes": None, "tasks": {}} for side in ("a", "b")]
        if any(one["bytes"] is not None for one in runs):  # older versions did not record them
            yield _row(f"{name}, bytes", *(one["bytes"] for one in runs))
        for task in dict.fromkeys(task for one in runs for task in one["tasks"]):
            found = [one["tasks"].get(task, {}) for one in runs]
            yield [f"{name}, {task}", *(_of_base(one.get("acc")) for one in found)]
            yield [f"{name}, {task}, less adapter", *(_of_base(one.get("versus_adapter")) for one in found)]
            if task in pair["paired"]:
                yield [f"{name}, {task}, B less A", "", _of_base(pair["paired"][task])]


def _group_rows(groups: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, group in groups.items():
        for metric, found in group["metrics"].items():
            yield [f"{name}, {metric}", str(found["tasks"]), f"{found['n']:,}", *_metric_cells(found)]


def _metric_rows(tasks: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, task in tasks.items():
        for metric, found in task["metrics"].items():
            yield [f"{name}, {metric}", f"{task['n']:,}", *_metric_cells(found)]


def _metric_cells(found: Mapping[str, Any]) -> list[str]:
    """Both figures of a metric, and how they compare."""
    low, high = found["ci95"]
    ratio = "ln of the ratio " * (found.get("aggregation") in {"perplexity", "weighted_perplexity"})
    return [
        *(f"{found[side]:.4g}" for side in ("a", "b")),
        "higher" if found["higher_is_better"] else "lower",
        f"{ratio}{found['delta']:+.4g}",
        f"{low:+.4g} to {high:+.4g}",
        *(str(found[key]) for key in ("improved", "regressed")),
        *(f"{found[key]:.2g}" for key in ("p", "holm_p")),
        found["verdict"],
    ]


def _row(name: str, a: Any, b: Any) -> list[str]:
    return [name, _value(a), _value(b)]


def _value(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}..."


def _ending(compared: Mapping[str, Any]) -> Iterator[str]:
    if compared["tasks"] and all(all(task["same_predictions"].values()) for task in compared["tasks"].values()):
        what = "adapter" if compared["same_adapter"] else "predictions"
        yield f"no difference: both runs have the same {what}"
    for side, names in compared["only"].items():
        if names:
            yield f"only {side.upper()} was asked {json.dumps(names)}"
    if alone := compared.get("groups_not_compared"):
        yield f"groups that are not compared, since the runs do not have the same: {json.dumps(alone)}"
    outcome = compared.get("gate")
    if outcome is not None:
        yield from (f"policy: {line}" for line in (lines(outcome["policy"]) if "policy" in outcome else ()))
        yield "gate: met" if outcome["passed"] else f"gate: not met: {'; '.join(outcome['reasons'])}"
