"""The command `status`: how a run is, from its store, without a GPU and without the libraries that training needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from job.cli.arguments import COMMANDS, Arguments, parse_arguments
from job.cli.output import print_json, print_lines
from job.cli.reading import reading
from job.common.tables import visible
from job.errors import Problem, SettingsError, VerificationError
from job.results.status import as_json, read_status
from job.results.status_text import as_lines, without_run


def status_command(argv: Sequence[str]) -> int:
    """`status RUN`: prints how the run is; nothing is written to its store.

    Raises:
        SettingsError: It is not clear which run, or there is no record of it, which is also printed as its state.
        VerificationError: A record of the run is damaged; what the others say is printed before.
        AccessDenied, Unreachable: As the store says.
    """
    parsed = parse_arguments(argv, COMMANDS["status"].arguments)
    stalled_after = _stalled_after(parsed)
    storage, _ = reading(parsed, quick=True)
    status = read_status(parsed.runs[0], storage, stalled_after=stalled_after)
    as_object = parsed.options["--format"] == "json"
    code = print_json(as_json(status)) if as_object else print_lines(map(visible, as_lines(status)))
    if status.problems:
        raise VerificationError(list(status.problems))
    if status.state == "not-started":
        what = f"has not started, or is not a run: {without_run(status)}; correct the name, or start the run first"
        raise SettingsError([Problem(status.run, what)])
    return code


def _stalled_after(parsed: Arguments) -> float | None:
    if "--stalled-after" not in parsed.options:
        return None
    try:
        seconds = float(parsed.options["--stalled-after"])
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise SettingsError([Problem("--stalled-after", "must be a number of seconds above 0")])
    return seconds
