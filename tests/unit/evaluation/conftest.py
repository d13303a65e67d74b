"""lm-eval's index of tasks, without those that no test asks for."""

from __future__ import annotations

import pytest


@pytest.fixture
def one_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the whole index by that of the tasks that tests name."""
    from lm_eval import tasks

    from tests.unit.evaluation.example_tasks import whole_index

    index = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **options: index(**options) if options else whole_index())
