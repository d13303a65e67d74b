"""Importing the libraries that later stages need, while downloads are under way."""

from __future__ import annotations

from job import log


def import_libraries() -> None:
    """What the stages need, which takes seconds."""
    with log.hush():
        from job.stages import train  # noqa: F401 - for what it imports
