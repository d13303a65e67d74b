"""How a comparison of two runs is told to a person: as plain text or as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from job.common import tables

HEAD = ("task", "questions", "A", "B", "difference", "95 % interval", "better", "worse", "p", "Holm p", "verdict")
_WIDEST = 80


def as_text(compared: Mapping[str, Any]) -> list[str]:
    """Plain text."""
    lines = []
    for title, head, rows in _sections(compared):
        lines += [title, *(f"  {line}" for line in (tables.plain(head, rows) if rows else ["nothing"])), ""]
    return [*lines, *_ending(compared)]


def as_markdown(compared: Mapping[str, Any]) -> list[str]:
    """Markdown, for the comment of a pipeline."""
    lines = []
    for title, head, rows in _sections(compared):
        lines += [f"### {title}", "", *(tables.markdown(head, rows) if rows else ["nothing"]), ""]
    return [*lines, *_ending(compared)]


def _sections(compared: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], list[list[str]]]]:
    """(title, head, rows) of every table."""
    both = ("", "A", "B")
    yield (
        "Runs",
        both,
        [_row(name, compared["a"][name], compared["b"][name]) for name in ("run", "results", "finished")],
    )
    yield "Adapters", HEAD, list(_tasks(compared["tasks"]))
    differing = [
        _row(f"{group}.{name}" if group != "settings" else name, *pair.values())
        for group, found in compared["differs"].items()
        for name, pair in found.items()
    ]
    yield "What differs", both, differing
    for group in ("training", "cost"):
        yield group.capitalize(), both, [_row(name, *pair.values()) for name, pair in compared[group].items()]


def _tasks(tasks: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, task in tasks.items():
        for metric in ("acc", "acc_norm"):
            found = task if metric == "acc" else task[metric]
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
    for side, names in compared["only"].items():
        if names:
            yield f"only {side.upper()} was asked {json.dumps(names)}"
    gate = compared.get("gate")
    if gate is not None:
        yield "gate: met" if gate["passed"] else f"gate: not met: {'; '.join(gate['reasons'])}"
