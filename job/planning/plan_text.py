"""The command `plan` and its output: aligned tables, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from job import log
from job.common.formatting import size
from job.common.tables import aligned, visible
from job.errors import JobError, Problem, SettingsError
from job.planning.forecast import Estimate, GpuForecast
from job.planning.input_checks import EXPORTED
from job.planning.plan import Plan, make_plan
from job.planning.plan_settings import quick_storage
from job.planning.shown_rows import CLOSE, OPEN, as_lines
from job.records import RecordedSettings
from job.results.exported_run import recorded_settings
from job.settings.load import Settings, load_settings, secrets
from job.storage.first_answer import require_answers

_WIDTH = 118
_MOST_SHOWN = 1000
_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"))


def plan_command(argv: Sequence[str]) -> int:
    """`plan`: prints the whole plan, also if something is wrong.

    Raises:
        JobError: The most severe error of the plan, after printing it.
    """
    words, form = _take_format(list(argv))
    words, show = _take_show(words)
    settings, unread = _load(words)
    log.configure(settings.log.format, settings.log.level, secrets(), run=settings.run.id)
    plan = make_plan(settings, show, unread)
    printed = log.print_result(log.scrub(FORMATS[form](plan), secrets()))
    if plan.error is not None:
        raise plan.error
    return 0 if printed else JobError.exit_code


def _load(argv: Sequence[str]) -> tuple[Settings, JobError | None]:
    """(the settings, why those of the run in JOB_EXPORT__RUN could not be read).

    Raises:
        SettingsError: A setting is wrong.
        JobError: That run could not be read, and the settings that were given do not do without it.
    """
    unread: list[JobError] = []

    def read(settings: Settings) -> RecordedSettings:
        try:
            storage = quick_storage(settings)
            require_answers([str(settings.export.run)], storage)
            return recorded_settings(str(settings.export.run), storage)
        except JobError as error:
            unread.append(error)
            raise

    options = ("format", "show")
    try:
        return load_settings(argv, options=options, of_run=read), None
    except JobError:
        if not unread:
            raise
    try:
        return load_settings(argv, options=options), unread[0]
    except SettingsError:  # what is said to be wrong may only be missing
        raise unread[0] from None


def _take_format(argv: list[str]) -> tuple[list[str], str]:
    """The words without `--format FORM` or `--format=FORM`, and the format; by default the first in `FORMATS`."""
    words, form = _take_option(argv, "--format")
    form = next(iter(FORMATS)) if form is None else form
    if form not in FORMATS:
        raise SettingsError([Problem("--format", f"must be {' or '.join(FORMATS)}")])
    return words, form


def _take_show(argv: list[str]) -> tuple[list[str], int]:
    """The words without `--show N` or `--show=N`, and N; by default 0."""
    words, count = _take_option(argv, "--show")
    if count is not None and not (count.isascii() and count.isdecimal() and 0 < int(count) <= _MOST_SHOWN):
        raise SettingsError([Problem("--show", f"must be the number of rows to show, 1 to {_MOST_SHOWN:,}")])
    return words, int(count or 0)


def _take_option(argv: list[str], name: str) -> tuple[list[str], str | None]:
    """The words without an option and its value, and the value; None where the option is not given."""
    position = next((index for index, word in enumerate(argv) if word.partition("=")[0] == name), None)
    if position is None:
        return argv, None
    _, equals, value = argv[position].partition("=")
    end = position + (1 if equals else 2)
    return argv[:position] + argv[end:], value if equals else "".join(argv[position + 1 : end])


def as_json(plan: Plan) -> str:
    """The plan as JSON, with the exit code of the command."""
    document: dict[str, Any] = {
        "title": plan.title,
        "exit_code": plan.error.exit_code if plan.error else 0,
        "checks": [{"name": check.name, "state": check.state, "what": check.what} for check in plan.checks],
        "figures": [asdict(figure) for figure in plan.figures],
        "gpus": [asdict(gpu) for gpu in plan.gpus],
        **({"advice": plan.advice} if plan.advice else {}),
        "assumptions": list(plan.assumptions),
        **({"rows": [asdict(row) for row in plan.shown]} if plan.shown else {}),
    }
    return json.dumps(document, indent=2) + "\n"


def as_table(plan: Plan) -> str:
    """The plan as text: checks, estimates, GPUs, assumptions."""
    parts = [plan.title, _checks(plan)]
    exported = next((check.state for check in plan.checks if check.name == EXPORTED), "ok")
    if exported != "ok":
        why = "cannot be taken over" if exported == "wrong" else "was not checked"
        parts.append(f"No forecast: the run in JOB_EXPORT__RUN {why}.")
    elif any(check.name == "data" and check.state == "wrong" for check in plan.checks):
        parts.append("No forecast: the data cannot be used.")
    else:
        parts += _forecast(plan)
    if plan.shown:
        terminal = sys.stdout is not None and sys.stdout.isatty()
        marked = "in reverse video" if terminal else f"between {OPEN} and {CLOSE}"
        parts.append(f"the first rows, the tokens that the loss counts {marked}:")
        parts.append("\n".join(as_lines(plan.shown, terminal=terminal)))
    return "\n\n".join(parts) + "\n"


def _forecast(plan: Plan) -> list[str]:
    gpus = "No figures for GPUs: the model, or the number of GPUs that share it, is unknown."
    assumptions = ["assumed:", *_folded([("", text) for text in plan.assumptions])]
    return [_figures(plan.figures), _gpus(plan) if plan.gpus else gpus, "\n".join(assumptions)]


def _checks(plan: Plan) -> str:
    rows = [(check.name, check.state, check.what) for check in plan.checks]
    name, state = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(_folded([(f"{row[0]:<{name}}  {row[1]:<{state}}  ", row[2]) for row in rows]))


def _figures(figures: Sequence[Estimate]) -> str:
    if not figures:
        return "No figures: model and data are unknown."
    rows = [(figure.name, _value(figure), figure.basis, figure.note) for figure in figures]
    return "\n".join(aligned(rows, right_aligned=(1,)))


def _value(figure: Estimate) -> str:
    if figure.unit == "bytes":
        return size(figure.value, " ")
    if figure.unit == "FLOP":
        scale, prefix = next((pair for pair in _PREFIXES if figure.value >= pair[0]), (1e9, "G"))
        return f"{figure.value / scale:.1f} {prefix}FLOP"
    if figure.unit == "s":
        return f"{figure.value:.2f} s"
    return f"{figure.value:,.0f} {figure.unit}".rstrip()


def _gpus(plan: Plan) -> str:
    of_training = ("largest budget", "without recomputing", "keeps") if plan.trains else ()
    head = ("GPU", "memory", "fits", *of_training, "hours", "USD", "USD/h", "machine")
    rows = [head, *(_gpu(gpu, plan.largest_step, trains=plan.trains) for gpu in plan.gpus)]
    right = ("memory", "largest budget", "without recomputing", "hours", "USD", "USD/h")
    lines = aligned(rows, right_aligned=tuple(index for index, name in enumerate(head) if name in right))
    if plan.trains:
        lines += [
            "largest budget: the most tokens of a micro-batch that fit; without recomputing: with activations kept;",
            "whole step: all examples of a step fit into one micro-batch",
            "keeps: what is held in memory to save time: the dequantized base, activations",
            "hours, which include all evaluations, and prices: assumed",
        ]
    else:
        lines.append("hours, which include the evaluation of each exported format, and prices: assumed")
    if plan.gpus[0].gpus > 1 and plan.gpus[0].machine != "your price":
        lines.append(f"memory and USD/h of one GPU, hours and USD of {plan.gpus[0].gpus}")
    if any(gpu.fits and gpu.base_held != "gpu" for gpu in plan.gpus):
        lines.append(
            "yes, host: with the base's 4-bit weights in main memory; yes, sharded: divided over the run's GPUs"
        )
    if {gpu.hours for gpu in plan.gpus if gpu.fits} == {None}:
        read = "data and questions that were read" if plan.trains else "questions that were read"
        lines.append(f"hours and USD: only for {read}, and in bf16 or fp16 (JOB_MODEL__DTYPE)")
    lines += _folded([(f"{gpu.name}: ", gpu.note) for gpu in plan.gpus if gpu.note])
    if not all(gpu.main_memory_enough for gpu in plan.gpus):
        lines.append("yes, with main memory: on a machine with so much; how much the one of the price has is not known")
    priced = [gpu for gpu in plan.gpus if gpu.fits and gpu.main_memory_enough and gpu.usd is not None]
    if priced:
        cheapest = min(priced, key=lambda gpu: gpu.usd or 0)
        fastest = min(priced, key=lambda gpu: gpu.hours or 0)
        lines.append(
            f"cheapest: {cheapest.name}, {cheapest.hours:.2f} h, ${cheapest.usd:.2f}; "
            f"fastest: {fastest.name}, {fastest.hours:.2f} h, ${fastest.usd:.2f}"
        )
    elif not any(gpu.fits for gpu in plan.gpus):
        lines.append(f"none of these GPUs fits: {plan.advice}")
    return "\n".join(lines)


def _gpu(gpu: GpuForecast, largest_step: int | None, *, trains: bool) -> tuple[str, ...]:
    def budget(tokens: int) -> str:
        if not tokens:
            return "-"
        return "whole step" if tokens == largest_step else f"{tokens:,}"

    of_training = (budget(gpu.budget_recomputing), budget(gpu.budget_keeping), gpu.keeps or "-") if trains else ()
    return (
        gpu.name if gpu.gpus == 1 else f"{gpu.gpus} x {gpu.name}",
        size(gpu.memory_bytes, " "),
        _fits(gpu),
        *of_training,
        "-" if gpu.hours is None else f"{gpu.hours:.2f}",
        "-" if gpu.usd is None else f"{gpu.usd:.2f}",
        f"{gpu.usd_per_hour:.2f}",
        gpu.machine,
    )


def _fits(gpu: GpuForecast) -> str:
    if not gpu.fits:
        return "no"
    if not gpu.main_memory_enough:
        return f"yes, with {size(gpu.main_memory_needed, ' ')} of main memory"
    return "yes" if gpu.base_held == "gpu" else f"yes, {gpu.base_held}"


def _folded(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Each (prefix, text) on a line; long text is wrapped below its beginning."""
    lines = []
    for start, text in rows:
        first, indent = start or "  ", " " * len(start) or "    "
        for paragraph in text.splitlines():
            lines += wrap(visible(paragraph), _WIDTH, initial_indent=first, subsequent_indent=indent, **_WHOLE_WORDS)
            first = indent
    return lines


FORMATS: Mapping[str, Callable[[Plan], str]] = {"table": as_table, "json": as_json}
