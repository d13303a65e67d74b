"""The command `compare`: two finished runs side by side, or a metric over many (`--history`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from job.cli.arguments import COMMANDS, Arguments, parse_arguments
from job.cli.output import print_json, print_lines, refuse_folder, write_page
from job.cli.reading import reading
from job.errors import GateError, JobError, Problem, SettingsError, combine, naming
from job.report.report import render_history
from job.results.compare import compare, evaluate_by_policy, gate_reasons
from job.results.compare_text import as_markdown, as_text
from job.results.history import as_json as history_json
from job.results.history import as_lines as history_lines
from job.results.history import find_runs, history
from job.results.promotion import open_run_or_pointer
from job.results.reader import read_published
from job.settings.field_types import explain
from job.settings.schema import Gate

HISTORY = "--history"
THRESHOLDS = {"--metric": "metric", "--min-delta": "min_delta", "--max-regression": "max_regression"}


def compare_command(argv: Sequence[str]) -> int:
    """`compare A B`: prints both side by side. `compare --history RUN...`: prints a metric over all of them.

    Raises:
        GateError: B does not pass, or the newest run of the history is out of the control limits.
    """
    parsed = parse_arguments(argv, COMMANDS["compare"].arguments)
    if HISTORY in parsed.flags:
        return _history(parsed)
    if "--output" in parsed.options:
        raise SettingsError([Problem("--output", f"is only for {HISTORY}")])
    _thresholds(parsed.options)  # wrong ones are refused before anything is read
    storage, _ = reading(parsed, quick=True)
    runs, errors = [], []
    for where in parsed.runs:
        try:
            runs.append(read_published(open_run_or_pointer(where, storage)))
        except JobError as error:
            errors.append((where, error))
    if errors:
        raise combine(errors)
    compared = compare(*runs)
    compared["gate"] = gate = _gate(parsed, compared)
    if _is_format(parsed, "json"):
        code = print_json(compared)
    else:
        code = print_lines(as_markdown(compared) if _is_format(parsed, "markdown") else as_text(compared))
    if gate is not None and gate["reasons"]:
        raise GateError("; ".join(gate["reasons"]))
    return code


def _gate(parsed: Arguments, compared: Mapping[str, Any]) -> dict[str, Any] | None:
    """The verdict of a policy or of thresholds on B against A; None if neither is given."""
    if (path := parsed.options.get("--policy")) is not None:
        if parsed.options.keys() & THRESHOLDS.keys():
            raise SettingsError(
                [Problem("--policy", "has rules by task; remove either this, or --metric and the thresholds")]
            )
        with naming("--policy", "JOB_GATE__POLICY"):
            return evaluate_by_policy(compared, path)
    if parsed.flags or parsed.options.keys() & THRESHOLDS.keys():  # a threshold implies a gate
        thresholds = _thresholds(parsed.options)
        reasons = gate_reasons(compared, **thresholds)
        return {**thresholds, "passed": not reasons, "reasons": reasons}
    return None


def _history(parsed: Arguments) -> int:
    alone = [
        name
        for name in ("--gate", "--min-delta", "--max-regression", "--policy")
        if name in parsed.flags | parsed.options.keys()
    ]
    if alone:
        raise SettingsError([Problem(name, f"has no effect with {HISTORY}; remove it") for name in alone])
    output = parsed.options.get("--output")
    if output is not None:
        refuse_folder(output)
    storage, _ = reading(parsed, quick=True)
    runs, unreadable = find_runs(parsed.runs, storage)
    computed = history(runs, parsed.options.get("--metric"), unreadable)
    if output is not None:
        write_page(output, render_history(computed))
    if _is_format(parsed, "json"):
        code = print_json(history_json(computed))
    else:
        code = print_lines(history_lines(computed, markdown=_is_format(parsed, "markdown")))
    if computed.out:
        raise GateError(computed.verdict)
    return code


def _thresholds(options: Mapping[str, str]) -> dict[str, Any]:
    """The gate's settings, validated like the job's own."""
    values = {name: options[option] for option, name in THRESHOLDS.items() if option in options}
    try:
        return Gate.model_validate(values).model_dump(include=set(THRESHOLDS.values()))
    except ValidationError as error:
        names = {name: option for option, name in THRESHOLDS.items()}
        records = error.errors(include_url=False, include_input=False)
        raise SettingsError([Problem(names[str(r["loc"][0])], explain(r)) for r in records]) from None


def _is_format(parsed: Arguments, name: str) -> bool:
    return parsed.options["--format"] == name
