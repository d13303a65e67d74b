"""lm-eval's index of the tasks that these tests need, and its tasks with rows from files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from job.evaluation.tasks import load_tasks

FOLDERS = ("arc", "glue", "gsm8k", "truthfulqa", "wikitext", "winogrande")
"""Of lm-eval's tasks."""


@cache
def whole_index() -> Any:
    """lm-eval's index of the tasks named here, read once: the index of all tasks takes ten seconds."""
    from lm_eval import tasks
    from lm_eval.tasks.manager import TaskManager

    folder = Path(tasks.__file__).parent
    return TaskManager(include_path=[str(folder / name) for name in FOLDERS], include_defaults=False)


def local_tasks(**files: Path) -> Any:
    """lm-eval's tasks by name, each with its questions from a file."""
    return load_tasks(list(files), files, {name: f"file://{name}" for name in files})
