"""The command `status`: how a run is, from its store, without a GPU and without the libraries that training needs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from job import log
from job.cli.arguments import COMMANDS, Arguments, parse_arguments
from job.cli.reading import reading
from job.common.tables import visible
from job.errors import JobError, Problem, SettingsError, VerificationError
from job.results.status import as_json, read_status
from job.results.status_text import as_lines


def status_command(argv: Sequence[str]) -> int:
    """`status RUN`: prints how the run is; nothing is written to its store.

    Raises:
        SettingsError: It is not clear which run.
        VerificationError: A record of the run is damaged; what the others say is printed before.
        AccessDenied, Unreachable: As the store says.
    """
    parsed = parse_arguments(argv, COMMANDS["status"].arguments)
    stalled_after = _stalled_after(parsed)
    storage, _ = reading(parsed, quick=True)
    status = read_status(parsed.runs[0], storage, stalled_after=stalled_after)
    if parsed.options["--format"] == "json":
        lines = [json.dumps(as_json(status), indent=2)]
    else:
        lines = [visible(line) for line in as_lines(status)]
    printed = log.print_result("\n".join(lines) + "\n")
    if status.problems:
        raise VerificationError(list(status.problems))
    return 0 if printed else JobError.exit_code


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
