"""The commands that look at published runs, `verify` and `compare`: what they are told, and what they print."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job import log
from job.errors import GateError, Problem, SettingsError
from job.results.compare import compare, gate_reasons
from job.results.compare_text import as_markdown, as_text
from job.results.reader import open_run, read_published
from job.settings.field_types import explain
from job.settings.load import load_reading, secrets
from job.settings.schema import Gate, Settings
from job.storage.base import disk_errors
from job.verification.verify import as_json, as_lines, demand, verify

THRESHOLDS = {"--metric": "metric", "--min-delta": "min_delta", "--max-regression": "max_regression"}


@dataclass(frozen=True)
class Given:
    """The words after a command: runs, options with their values, flags, and settings for `load_reading`."""

    runs: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    settings: list[str] = field(default_factory=list)


def verify_command(words: Sequence[str]) -> int:
    """`verify RESULTS`: prints every check.

    Raises:
        VerificationError: Something differs.
    """
    given = split(words, ["RESULTS"], formats=("table", "json"))
    storage, cache = _reading(given)
    if cache is not None:
        with disk_errors(f"cannot make the folder {cache}"):
            Path(cache).mkdir(parents=True, exist_ok=True)
    store = open_run(given.runs[0], **storage)
    with tempfile.TemporaryDirectory(prefix="qlora-job-", dir=cache, ignore_cleanup_errors=True) as work:
        checks = verify(store, Path(work))
    _print([json.dumps(as_json(store.uri, checks), indent=2)] if _is(given, "json") else as_lines(checks))
    demand(checks)
    return 0


def compare_command(words: Sequence[str]) -> int:
    """`compare A B`: prints both side by side.

    Raises:
        GateError: B does not pass.
    """
    given = split(words, ["A", "B"], THRESHOLDS, {"--gate"}, ("table", "json", "markdown"))
    thresholds = _thresholds(given.options)
    storage, _ = _reading(given)
    compared = compare(*(read_published(open_run(where, **storage)) for where in given.runs))
    reasons: list[str] = []
    compared["gate"] = None
    if given.flags or given.options.keys() & THRESHOLDS.keys():  # a threshold asks for a gate
        reasons = gate_reasons(compared, **thresholds)
        compared["gate"] = {**thresholds, "passed": not reasons, "reasons": reasons}
    if _is(given, "json"):
        _print([json.dumps(compared, indent=2)])
    else:
        _print(as_markdown(compared) if _is(given, "markdown") else as_text(compared))
    if reasons:
        raise GateError("; ".join(reasons))
    return 0


def split(
    words: Sequence[str],
    runs: Sequence[str],
    options: Collection[str] = (),
    flags: Collection[str] = (),
    formats: Sequence[str] = (),
) -> Given:
    """Tells the words after a command apart.

    Args:
        words: As they were typed.
        runs: What the command's arguments are called.
        options: Names with a value, beside `--format`.
        flags: Names without one.
        formats: What `--format` takes, the first by default.

    Raises:
        SettingsError: With all that is wrong.
    """
    given, problems = Given(), []
    known = ["--format", *options, *flags]
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            given.runs.append(word)
        elif name in flags and not equals:
            given.flags.add(name)
        elif name in known or "." in name:
            value = value if equals else next(rest, "")
            if not value:
                problems.append(Problem(name, f"needs a value: {name} VALUE"))
            elif "." in name:
                given.settings.append(f"{name}={value}")
            else:
                given.options[name] = value
        else:
            near = get_close_matches(name, known, n=1)
            problems.append(Problem(name, f"is unknown; the nearest is {near[0]}" if near else "is unknown"))
    if len(given.runs) != len(runs):
        problems.append(Problem(" ".join(runs), f"needs {_count(runs)}, path or s3:// URI; {len(given.runs)} given"))
    if given.options.setdefault("--format", formats[0]) not in formats:
        problems.append(Problem("--format", f"must be {' or '.join(formats)}"))
    if problems:
        raise SettingsError(problems)
    return given


def _count(runs: Sequence[str]) -> str:
    return "one run" if len(runs) == 1 else f"{len(runs)} runs"


def _thresholds(options: Mapping[str, str]) -> dict[str, Any]:
    """The gate's settings, of the same kinds as the job's own."""
    values = {name: options[option] for option, name in THRESHOLDS.items() if option in options}
    try:
        return Gate.model_validate(values).model_dump(exclude={"baseline"})
    except ValidationError as error:
        names = {name: option for option, name in THRESHOLDS.items()}
        records = error.errors(include_url=False, include_input=False)
        raise SettingsError([Problem(names[str(r["loc"][0])], explain(r)) for r in records]) from None


def _reading(given: Given) -> tuple[dict[str, Any], str | None]:
    """Sets the log up; returns the options of `objects.open_store`, and the folder for copies."""
    settings: Settings = load_reading(given.settings)
    log.configure(settings.log.format, settings.log.level, secrets())
    return settings.storage.model_dump(exclude={"cache"}), settings.storage.cache


def _is(given: Given, name: str) -> bool:
    return given.options["--format"] == name


def _print(lines: Iterable[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
