"""The command `export`: `run` with JOB_EXPORT__RUN and JOB_EXPORT__FORMATS."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from job.cli.run import run_command
from job.errors import Problem, SettingsError


def export_command(argv: Sequence[str]) -> int:
    """`export RUN FORMATS`: exports a finished run as a new run, which resumes like any other.

    Raises:
        SettingsError: One of the two is missing.
        JobError: As the run ends.
    """
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    if len(words) != 2 or not words[0].strip():  # noqa: PLR2004 - RUN and FORMATS; without RUN it would train
        what = "takes the path or URI of a finished run, and the formats, such as: export runs/my-first-run gguf:q4_k_m"
        raise SettingsError([Problem("export", what)])
    run, formats = words
    return run_command([f"--export.run={run}", f"--export.formats={formats}", *argv[2:]])
