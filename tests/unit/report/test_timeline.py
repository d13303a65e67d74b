"""The timeline contains every second of the machine's time once."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.report.timeline import bars, by_stage, restarts
from job.results.cost import OUTSIDE
from tests.example_run import ATTEMPTS

EXAMPLE = [asdict(attempt) for attempt in ATTEMPTS]


def test_attempts_lie_end_to_end() -> None:
    """Each bar begins where the one before ended, in the share of all machine time that it took."""
    first, second, third = bars(EXAMPLE)
    assert (first.left, second.left, third.left) == (0, pytest.approx(34.483), pytest.approx(51.724))
    assert third.left + third.width == pytest.approx(100, abs=0.01)
    assert (first.waited, second.waited, third.waited) == (None, 3300, None)
    assert (third.first_step, third.last_step) == (45, 94)


def test_what_no_stage_counted_is_shown_too() -> None:
    """It stands behind pulling, where models are loaded; of a killed attempt it is most of the time."""
    first, second, _ = bars(EXAMPLE)
    assert [(piece.stage, piece.seconds) for piece in first.pieces] == [
        ("pull", 40),
        (OUTSIDE, 30),
        ("evaluate-base", 60),
        ("train", 170),
    ]
    assert [(piece.stage, piece.seconds) for piece in second.pieces] == [("pull", 10), (OUTSIDE, 140)]


def test_repeated_steps_are_a_share_of_training() -> None:
    """Ten of fifty steps done again: a fifth of the training stage."""
    *_, third = bars(EXAMPLE, [True, True, False])
    assert {piece.stage: piece.repeated for piece in third.pieces}["train"] == 20
    assert (third.repeated_steps, third.repeats_exact) == (10, False)


def test_restarts_are_where_another_attempt_went_on() -> None:
    """Between the steps; an attempt that did none, and the first, are no restarts."""
    idle = {**EXAMPLE[1], "steps": 0, "last_step": 0}
    assert restarts(EXAMPLE) == [34.5, 44.5]
    assert restarts([EXAMPLE[0], idle, EXAMPLE[2]]) == [44.5]
    assert restarts(EXAMPLE[:1]) == []


ATTEMPT = st.fixed_dictionaries(
    {
        "number": st.just(1),
        "started": st.just("2026-01-05T09:00:00Z"),
        "finished": st.none(),
        "outcome": st.just("killed"),
        "seconds": st.floats(0, 1e6),
        "stage_seconds": st.dictionaries(st.sampled_from(["pull", "train", "publish"]), st.floats(0, 1e5)),
        "steps": st.integers(0, 50),
        "repeated_steps": st.integers(0, 50),
        "last_step": st.integers(0, 50),
    }
)


@given(st.lists(ATTEMPT, min_size=1, max_size=5))
def test_no_second_is_lost(attempts: list[dict[str, Any]]) -> None:
    """The pieces of an attempt add up to it, and stages over all attempts to all of their time."""
    for bar in bars(attempts):
        spent = sum(piece.seconds for piece in bar.pieces)
        counted = sum(attempts[0]["stage_seconds"].values())
        assert spent == 0 or sum(piece.percent for piece in bar.pieces) == pytest.approx(100, abs=0.1)
        assert counted >= 0
    longest = sum(max(a["seconds"], sum(a["stage_seconds"].values())) for a in attempts)
    assert sum(by_stage(attempts).values()) <= longest + len(attempts)
