"""The command `plan`: what a run will take, and what is wrong with its settings and inputs."""

from __future__ import annotations

from collections.abc import Sequence

from job import log
from job.cli.config import note_foreign_variables
from job.cli.library_variables import configure_libraries


def plan_command(argv: Sequence[str]) -> int:
    """`plan`: the answer is that of `job/planning/plan_text.py`.

    Raises:
        JobError: As there.
    """
    configure_libraries(None)
    note_foreign_variables()
    with log.silence_stdout():
        from job.planning.plan_text import plan_command as plan

    return plan(argv)
