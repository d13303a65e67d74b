"""Imports the libraries that later stages need while the model is being downloaded.

`python -m job.stages.preload` prints the files that this reads, for the image, whose entrypoint reads them ahead.
"""

from __future__ import annotations

import sys
from pathlib import Path

from job import log
from job.common.imports import distributions_read_when_needed, imported_files, without
from job.evaluation.task_names import import_tasks

_NOT_NEEDED = ("chardet", "scipy", "sklearn", "wandb")
"""Optional to transformers, PEFT, TRL and requests. The job's own statistics import scipy when they are first computed,
and wandb runs in a separate process; sklearn needs scipy. A module that another thread may import at the same time,
such as boto3, which accelerate imports, must not be in this list."""


def import_libraries() -> None:
    """Imports the libraries of training and evaluation, which takes seconds."""
    with log.silence_stdout(), without(*_NOT_NEEDED), distributions_read_when_needed():
        import_tasks()
        from job.stages import train  # noqa: F401 - it imports the others


def files_to_read_ahead() -> list[str]:
    """The files that importing all of a run reads, and the sources that transformers searches for names."""
    with log.silence_stdout():
        import_libraries()
        from job.stages import evaluate, load, publish, pull  # noqa: F401

    files, transformers = imported_files(), Path(str(sys.modules["transformers"].__file__)).parent
    return [*files, *map(str, sorted((transformers / "models").rglob("*.py")))]


if __name__ == "__main__":
    sys.stdout.write("\0".join(files_to_read_ahead()))
