"""The comparison of two runs as plain text and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from job.common import tables
from job.common.formatting import at_least, size
from job.evaluation.policy import of_metric
from job.evaluation.policy_verdict import lines

_COMPARED = ("difference", "95 % interval", "better", "worse", "p", "Holm p", "verdict")
_TASK_COLUMNS = ("task", "questions", "A", "B", *_COMPARED)
_GROUP_COLUMNS = ("group, metric", "tasks", "questions", "A", "B", "better is", *_COMPARED)
_METRIC_COLUMNS = ("task, metric", "questions", "A", "B", "better is", *_COMPARED)
_BASE_ROWS = (
    ("unquantized base", "original"),
    ("quantization", "quantization"),
    ("base trained on", "base"),
    ("training", "training"),
    ("adapter less unquantized base", "both"),
)
"""What the table of the bases says of each task, and its name in `bases`."""
_WIDEST = 80
_ONLY_IF_DIFFERENT = ("execution.", "adapter.")
"""Beginnings of figures of training that the tables have only where the runs differ; JSON has them all."""


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
    header = ("", "A", "B")
    yield (
        "Runs",
        header,
        [_row(name, compared["a"][name], compared["b"][name]) for name in ("run", "results", "finished")],
    )
    same = compared["exports_of_one_run"]  # which the last line says in place of tables
    if not same:
        yield from _scores(compared)
    if compared.get("exports"):
        yield "Exported formats, acc", header, list(_export_rows(compared["exports"]))
    differing = [
        _row(f"{group}.{name}" if group != "settings" else name, *pair.values())
        for group, differing_values in compared["differs"].items()
        for name, pair in differing_values.items()
    ]
    yield "What differs", header, differing
    for group in ("training", "cost"):
        pairs = {name: (pair["a"], pair["b"]) for name, pair in compared[group].items()}
        exact = pairs.pop("repeated_steps_exact", None)
        if exact is not None:
            a, b = (at_least(n or 0, exact=e) for n, e in zip(pairs["repeated_steps"], exact, strict=True))
            pairs["repeated_steps"] = a, b
        rows = [
            [_label(name), *(_figure(name, value) for value in pair)]
            for name, pair in pairs.items()
            if any(value is not None for value in pair)
            and not (pair[0] == pair[1] and (same or name.startswith(_ONLY_IF_DIFFERENT)))
        ]
        if rows or not same:
            yield group.capitalize(), header, rows


def _scores(compared: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], list[list[str]]]]:
    """The tables of what the adapters, and the bases, were scored with."""
    yield "Adapters", _TASK_COLUMNS, list(_task_rows(compared["tasks"]))
    if any(one["original"] is not None for pair in compared.get("bases", {}).values() for one in pair.values()):
        yield "Each adapter and its own bases, acc", ("", "A", "B"), list(_base_rows(compared["bases"]))
    if compared.get("groups"):
        yield "Groups of tasks", _GROUP_COLUMNS, list(_group_rows(compared["groups"]))
    if compared.get("measured"):
        yield "Metrics of other tasks", _METRIC_COLUMNS, list(_metric_rows(compared["measured"]))


def _task_rows(tasks: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, task in tasks.items():
        for metric in ("acc", "acc_norm"):
            comparison = of_metric(task, metric)
            if comparison is None:
                continue
            low, high = comparison["ci95"]
            yield [
                f"{name}, {metric}",
                f"{task['n']:,}",
                *(f"{100 * task[side][metric]:.2f} %" for side in ("a", "b")),
                f"{100 * comparison['delta']:+.2f}",
                f"{100 * low:+.2f} to {100 * high:+.2f}",
                *(str(comparison[key]) for key in ("improved", "regressed")),
                *(f"{comparison[key]:.2g}" for key in ("mcnemar_p", "holm_p")),
                "no difference" if task["same_predictions"][metric] else comparison["verdict"],
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
        if any(export["bytes"] is not None for export in runs):  # older versions did not record them
            yield _row(f"{name}, bytes", *(export["bytes"] for export in runs))
        for task in dict.fromkeys(task for export in runs for task in export["tasks"]):
            task_figures = [export["tasks"].get(task, {}) for export in runs]
            yield [f"{name}, {task}", *(_of_base(export.get("acc")) for export in task_figures)]
            yield [
                f"{name}, {task}, less adapter",
                *(_of_base(export.get("versus_adapter")) for export in task_figures),
            ]
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


def _metric_cells(comparison: Mapping[str, Any]) -> list[str]:
    """Both figures of a metric, and how they compare."""
    low, high = comparison["ci95"]
    ratio = "ln of the ratio " * (comparison.get("aggregation") in {"perplexity", "weighted_perplexity"})
    return [
        *(f"{comparison[side]:.4g}" for side in ("a", "b")),
        "higher" if comparison["higher_is_better"] else "lower",
        f"{ratio}{comparison['delta']:+.4g}",
        f"{low:+.4g} to {high:+.4g}",
        *(str(comparison[key]) for key in ("improved", "regressed")),
        *(f"{comparison[key]:.2g}" for key in ("p", "holm_p")),
        comparison["verdict"],
    ]


def _row(name: str, a: Any, b: Any) -> list[str]:
    return [name, _value(a), _value(b)]


def _label(name: str) -> str:
    """A figure's field of the manifest in words: `stages.pull.seconds` is "pull, seconds"."""
    words = name.removeprefix("stages.").removesuffix("_bytes").replace("outside stages", "outside of stages")
    return words.replace(".", ", ").replace("_", " ")


def _figure(name: str, value: Any) -> str:
    """A figure with its unit, or with separators between thousands."""
    if name.endswith("_bytes") and isinstance(value, int):
        return size(value, " ")
    return f"{value:,}" if type(value) is int else _value(value)


def _value(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}..."


def _ending(compared: Mapping[str, Any]) -> Iterator[str]:
    if compared["exports_of_one_run"]:
        yield "no difference: what was trained and scored is the same; one of the two runs exports it, or both do"
    elif compared["tasks"] and all(all(task["same_predictions"].values()) for task in compared["tasks"].values()):
        what = "adapter" if compared["same_adapter"] else "predictions"
        yield f"no difference: both runs have the same {what}"
    for side, names in compared["only"].items():
        if names:
            yield f"only {side.upper()} was asked {json.dumps(names)}"
    if group_names := compared.get("groups_not_compared"):
        yield f"groups that are not compared, since the runs do not have the same: {json.dumps(group_names)}"
    outcome = compared.get("gate")
    if outcome is not None:
        yield from (f"policy: {line}" for line in (lines(outcome["policy"]) if "policy" in outcome else ()))
        yield "gate: met" if outcome["passed"] else f"gate: not met: {'; '.join(outcome['reasons'])}"
