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
from job.results.compare import compare, gate_reasons, judge_by_policy
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


def verify_command(words: Sequence[str]) -> int:
    """`verify RESULTS`: prints every check.

    Raises:
        VerificationError: Something differs.
    """
    given = parse_arguments(words, COMMANDS["verify"].arguments)
    storage, cache = reading(given)
    key = signer(given)
    store = open_run_or_pointer(given.runs[0], storage)
    with folder_for(f"verification of {store.uri}", cache) as work:
        checks = verify(store, work, storage, key=key)
    code = _print([json.dumps(as_json(store.uri, checks), indent=2)] if _is(given, "json") else as_lines(checks))
    require_verified(checks)
    return code


def signer(given: Arguments) -> str | None:
    """The public key in PEM that `--key` names; None without it. Raises SettingsError if the file holds none."""
    return load_public_key(given.options["--key"]) if "--key" in given.options else None


def compare_command(words: Sequence[str]) -> int:
    """`compare A B`: prints both side by side. `compare --history RUN...`: prints a metric over all of them.

    Raises:
        GateError: B does not pass, or the newest run of the history is out of the control limits.
    """
    given = parse_arguments(words, COMMANDS["compare"].arguments)
    if HISTORY in given.flags:
        return _history(given)
    if "--output" in given.options:
        raise SettingsError([Problem("--output", f"is only for {HISTORY}")])
    _thresholds(given.options)  # wrong ones are refused before anything is read
    storage, _ = reading(given, quick=True)
    runs, errors = [], []
    for where in given.runs:
        try:
            runs.append(read_published(open_run_or_pointer(where, storage)))
        except JobError as error:
            errors.append((where, error))
    if errors:
        raise combine(errors)
    compared = compare(*runs)
    compared["gate"] = gate = _gate(given, compared)
    if _is(given, "json"):
        code = _print([json.dumps(compared, indent=2)])
    else:
        code = _print(as_markdown(compared) if _is(given, "markdown") else as_text(compared))
    if gate is not None and gate["reasons"]:
        raise GateError("; ".join(gate["reasons"]))
    return code


def _gate(given: Arguments, compared: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a policy or the thresholds say of B against A; None if neither is asked for."""
    if (path := given.options.get("--policy")) is not None:
        if given.options.keys() & THRESHOLDS.keys():
            raise SettingsError(
                [Problem("--policy", "has rules by task; remove either this, or --metric and the thresholds")]
            )
        with naming("--policy", "JOB_GATE__POLICY"):
            return judge_by_policy(compared, path)
    if given.flags or given.options.keys() & THRESHOLDS.keys():  # a threshold asks for a gate
        thresholds = _thresholds(given.options)
        reasons = gate_reasons(compared, **thresholds)
        return {**thresholds, "passed": not reasons, "reasons": reasons}
    return None


def _history(given: Arguments) -> int:
    alone = [
        name
        for name in ("--gate", "--min-delta", "--max-regression", "--policy")
        if name in given.flags | given.options.keys()
    ]
    if alone:
        raise SettingsError([Problem(name, f"has no effect with {HISTORY}; remove it") for name in alone])
    output = given.options.get("--output")
    if output is not None:
        _refuse_folder(output)
    storage, _ = reading(given, quick=True)
    runs, unreadable = find_runs(given.runs, storage)
    found = history(runs, given.options.get("--metric"), unreadable)
    if output is not None:
        _write_page(output, render_history(found))
    if _is(given, "json"):
        code = _print([json.dumps(history_json(found), indent=2)])
    else:
        code = _print(history_lines(found, markdown=_is(given, "markdown")))
    if found.out:
        raise GateError(found.verdict)
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


def _is(given: Arguments, name: str) -> bool:
    return given.options["--format"] == name


def _print(lines: Iterable[str]) -> int:
    """The exit code if nothing else is wrong: a result that nobody gets is no success."""
    return 0 if log.print_result("\n".join(lines) + "\n") else JobError.exit_code


def report_command(words: Sequence[str]) -> int:
    """`report RESULTS`: writes the HTML report again, with what was recorded of the run since it was published.

    Raises:
        SettingsError: It is not clear which run, or there is none.
        VerificationError: The manifest is not what the job wrote.
        DataError: What was published is gone, or was altered.
    """
    given = parse_arguments(words, COMMANDS["report"].arguments)
    output = given.options.get("--output", OUTPUT)
    _refuse_folder(output)
    storage, _ = reading(given, quick=True)
    run = read_published(open_run_or_pointer(given.runs[0], storage))
    with tempfile.TemporaryDirectory(prefix="qlora-job-") as folder:
        try:
            evidence = read_report_data(run.results, lambda artifact: fetch_artifact(run.store, artifact, Path(folder)))
        except (KeyError, TypeError, ValueError) as error:  # the hashes are right, so it was written like this
            raise DataError([Problem(run.store.uri, f"its records were not written by this job: {error}")]) from error
    page = render_report(run.results, evidence, read_after_run(run.store))
    _write_page(output, page)
    return _print([f"report: {output}"])
