"""The command `export`: `run` with JOB_EXPORT__RUN and JOB_EXPORT__FORMATS."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from job.cli.run import run_command
from job.common.export_formats import split_name
from job.errors import Problem, SettingsError


def export_command(argv: Sequence[str]) -> int:
    """`export RUN FORMATS`: exports a finished run as a new run, which resumes like any other.

    Raises:
        SettingsError: RUN and FORMATS are not the two words before the options.
        JobError: As the run ends.
    """
    words = [word.strip() for word in takewhile(lambda word: not word.startswith("-"), argv)]
    if what := _mistake(words, options=len(argv) > len(words)):
        raise SettingsError([Problem("export", what)], advice="such as: export runs/my-first-run merged,gguf:q4_k_m")
    run, formats = words
    return run_command([f"--export.run={run}", f"--export.formats={formats}", *argv[2:]])


def _mistake(words: Sequence[str], *, options: bool) -> str | None:
    """What is wrong with the words before the options; None if nothing is."""
    match words:
        case ["", *_] | [_, ""]:
            return "is given an empty word; give the finished run and the formats"
        case [run, formats]:
            if _are_formats(run) and not _are_formats(formats):
                return f"{run} is a format; give the finished run first, then the formats"
            return None
        case [_, _, *_]:
            return "takes the finished run and the formats only; separate the formats by commas, without spaces"
        case _:
            missing = "the formats are missing" if words else "the finished run and the formats are missing"
            where = "; give them before the options" if options else "; give them"
            return f"{missing}{where}"


def _are_formats(word: str) -> bool:
    try:
        return bool([split_name(name) for name in word.split(",")])
    except ValueError:
        return False
