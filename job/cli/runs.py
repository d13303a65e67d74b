"""The commands that read published runs, `verify`, `compare` and `report`: what they do, and what they print."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job import log
from job.cli.arguments import COMMANDS, Arguments, parse_arguments
from job.cli.reading import reading
from job.common.disk import disk_errors
from job.errors import DataError, GateError, JobError, Problem, SettingsError, combine, naming
from job.report.report import read_report_data, render_history, render_report
from job.results.after_run import read_after_run
from job.results.compare import compare, evaluate_by_policy, gate_reasons
from job.results.compare_text import as_markdown, as_text
from job.results.history import as_json as history_json
from job.results.history import as_lines as history_lines
from job.results.history import find_runs, history
from job.results.promotion import open_run_or_pointer
from job.results.reader import read_published
from job.results.signing import load_public_key
from job.runs.work_folder import folder_for
from job.settings.field_types import explain
from job.settings.schema import Gate
from job.storage.verified_download import fetch_artifact
from job.verification.verify import as_json, as_lines, require_verified, verify

OUTPUT = "report.html"
HISTORY = "--history"
THRESHOLDS = {"--metric": "metric", "--min-delta": "min_delta", "--max-regression": "max_regression"}


def verify_command(argv: Sequence[str]) -> int:
    """`verify RESULTS`: prints every check.

    Raises:
        VerificationError: Something differs.
    """
    parsed = parse_arguments(argv, COMMANDS["verify"].arguments)
    storage, cache = reading(parsed)
    key = signer(parsed)
    store = open_run_or_pointer(parsed.runs[0], storage)
    with folder_for(f"verification of {store.uri}", cache) as work:
        checks = verify(store, work, storage, key=key)
    code = _print(
        [json.dumps(as_json(store.uri, checks), indent=2)] if _is_format(parsed, "json") else as_lines(checks)
    )
    require_verified(checks)
    return code


def signer(parsed: Arguments) -> str | None:
    """The public key in PEM that `--key` names; None without it. Raises SettingsError if the file holds none."""
    return load_public_key(parsed.options["--key"]) if "--key" in parsed.options else None


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
        code = _print([json.dumps(compared, indent=2)])
    else:
        code = _print(as_markdown(compared) if _is_format(parsed, "markdown") else as_text(compared))
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
        _refuse_folder(output)
    storage, _ = reading(parsed, quick=True)
    runs, unreadable = find_runs(parsed.runs, storage)
    computed = history(runs, parsed.options.get("--metric"), unreadable)
    if output is not None:
        _write_page(output, render_history(computed))
    if _is_format(parsed, "json"):
        code = _print([json.dumps(history_json(computed), indent=2)])
    else:
        code = _print(history_lines(computed, markdown=_is_format(parsed, "markdown")))
    if computed.out:
        raise GateError(computed.verdict)
    return code


def _refuse_folder(output: str) -> None:
    if Path(output).is_dir():
        raise SettingsError([Problem(f"--output {output}", f"is a folder; name a file, such as {output}/{OUTPUT}")])


def _write_page(output: str, page: bytes) -> None:
    with disk_errors(f"--output {output}"):
        try:
            Path(output).write_bytes(page)
        except FileNotFoundError as error:
            raise SettingsError(
                [Problem(f"--output {output}", "its folder does not exist; create it first")]
            ) from error


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


def _print(lines: Iterable[str]) -> int:
    """The exit code if nothing else is wrong: a result that could not be written is no success."""
    return 0 if log.print_result("\n".join(lines) + "\n") else JobError.exit_code


def report_command(argv: Sequence[str]) -> int:
    """`report RESULTS`: writes the HTML report again, with the records made since the run was published.

    Raises:
        SettingsError: It is not clear which run, or there is none.
        VerificationError: The manifest is not what the job wrote.
        DataError: What was published is gone, or was altered.
    """
    parsed = parse_arguments(argv, COMMANDS["report"].arguments)
    output = parsed.options.get("--output", OUTPUT)
    _refuse_folder(output)
    storage, _ = reading(parsed, quick=True)
    run = read_published(open_run_or_pointer(parsed.runs[0], storage))
    with tempfile.TemporaryDirectory(prefix="qlora-job-") as folder:
        try:
            evidence = read_report_data(run.results, lambda artifact: fetch_artifact(run.store, artifact, Path(folder)))
        except (KeyError, TypeError, ValueError) as error:  # the hashes are right, so it was written like this
            raise DataError([Problem(run.store.uri, f"its records were not written by this job: {error}")]) from error
    page = render_report(run.results, evidence, read_after_run(run.store))
    _write_page(output, page)
    return _print([f"report: {Path(output).absolute()}"])
