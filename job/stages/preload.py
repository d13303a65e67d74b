"""Imports the libraries that later stages need while the model is being downloaded."""

from __future__ import annotations

from job import log


def import_libraries() -> None:
    """Imports the libraries of training and evaluation, which takes seconds."""
    with log.silence_stdout():
        from job.stages import train  # noqa: F401 - it imports them
