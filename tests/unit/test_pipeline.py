"""What the pipeline tells others of an attempt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from job import pipeline
from job.distributed.processes import ALONE
from job.preemption.stop_flag import Stop
from job.settings.load import load_settings
from job.tracking.webhook import Notifier


def test_the_webhook_is_told_whether_the_gate_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results that the trackers get say it to the webhook, too, before its last event is sent."""
    seen: list[Notifier] = []

    @contextmanager
    def notifying(url: str | None, run: str) -> Iterator[Notifier]:
        seen.append(Notifier(url, run))
        yield seen[0]

    monkeypatch.setattr(pipeline, "notifying", notifying)
    environ = {"JOB_PRESET": "demo", "JOB_RUN__OUTPUT": str(tmp_path / "runs"), "JOB_RUN__DEVICE": "cpu"}
    cost = dict.fromkeys(("seconds", "usd", "wasted_seconds", "goodput", "energy_kwh"))
    results = {"cost": cost, "evaluation": {"tasks": {}}, "gate": {"passed": False}}
    with pipeline._attempt(load_settings([], environ), Stop(), lambda: None, (), ALONE, idle=None) as (_, tell_results):
        tell_results(results)
    assert seen[0].gate_passed is False
