"""Imports the libraries that later stages need while the model is being downloaded."""

from __future__ import annotations

from job import log
from job.common.imports import without

_NOT_NEEDED = ("scipy", "sklearn", "wandb")
"""Optional to transformers, PEFT and TRL. The job's own statistics import scipy when they are first computed, and wandb
belongs to a process of its own; sklearn needs scipy."""


def import_libraries() -> None:
    """Imports the libraries of training and evaluation, which takes seconds."""
    with log.silence_stdout(), without(*_NOT_NEEDED):
        from job.stages import train  # noqa: F401 - it imports them
