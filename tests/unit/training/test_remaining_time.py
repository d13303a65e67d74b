"""The remaining time of training is estimated from the last steps."""

from __future__ import annotations

import pytest

from job.training import remaining_time


def test_remaining_time_follows_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow first step does not count; a change of pace does within 20 steps; after the last step nothing is left."""
    now = [100.0]
    monkeypatch.setattr(remaining_time.time, "monotonic", lambda: now[0])
    estimate = remaining_time.StepPace(100)
    assert estimate.remaining_seconds(1) is None
    for step in range(2, 51):
        now[0] += 2.0
        left = estimate.remaining_seconds(step)
    assert left == pytest.approx(50 * 2.0)
    for step in range(51, 101):
        now[0] += 4.0
        left = estimate.remaining_seconds(step)
        if step == 70:
            assert left == pytest.approx(30 * 4.0)
    assert left == 0.0
