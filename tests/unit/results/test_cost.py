"""What a run cost: the parts add up, and waste is what an uninterrupted run would not have paid."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.records import AttemptRecord
from job.results.cost import compute_cost, exact_repeats, repeated_steps

WHOLE = AttemptRecord(
    number=1,
    started="2026-01-05T09:00:00Z",
    finished="2026-01-05T09:10:00Z",
    outcome="complete",
    seconds=600.0,
    stage_seconds={"pull": 60.0, "evaluate-base": 100.0, "train": 300.0, "evaluate-adapter": 100.0, "publish": 1.0},
    steps=30,
    repeated_steps=0,
    last_step=30,
    usd_per_hour=3.6,
)
SECONDS = st.floats(0, 1e6)


@st.composite
def attempts(draw: st.DrawFn) -> list[AttemptRecord]:
    """One to five attempts with stages, repeated steps, prices and energy, as far as these are known."""
    made = []
    for number in range(1, draw(st.integers(1, 5)) + 1):
        stages = draw(st.dictionaries(st.sampled_from(["pull", "evaluate-base", "train", "publish"]), SECONDS))
        seconds = sum(stages.values()) + draw(SECONDS) + 0.001
        repeated = draw(st.floats(0, 1)) * stages.get("train", 0.0)
        price, joules = draw(st.none() | st.floats(0, 100)), draw(st.none() | st.floats(0, 1e9))
        made.append(
            replace(
                WHOLE,
                number=number,
                seconds=seconds,
                stage_seconds=stages,
                repeated_seconds=repeated,
                usd_per_hour=price,
                energy_joules=joules,
            )
        )
    return made


def test_a_run_that_exports_a_finished_one_needs_a_start_of_its_own() -> None:
    """It is not lost to an interruption, as the second start of a run that was killed is."""
    exporting = replace(WHOLE, number=2, stage_seconds={"pull": 30.0, "export": 500.0})
    assert compute_cost([WHOLE, exporting], 300.0, None)["wasted_seconds"] == pytest.approx(99.0)
    cost = compute_cost([WHOLE, exporting], 300.0, None, taken_over=[1])
    assert cost["wasted_seconds"] == 0.0
    assert cost["seconds"] == 1200.0
    again = replace(exporting, number=3)  # exports the one before it
    assert compute_cost([WHOLE, exporting, again], 300.0, None, taken_over=[2])["wasted_seconds"] > 0
    assert compute_cost([WHOLE, exporting, again], 300.0, None, taken_over=[1, 2])["wasted_seconds"] == 0.0


@given(attempts(), st.none() | st.floats(0.01, 100))
def test_the_parts_add_up(made: list[AttemptRecord], on_demand: float | None) -> None:
    """Stages and attempts both sum to the run, in seconds and in dollars; waste is a part of each attempt."""
    cost = compute_cost(made, 0.0, on_demand)
    close = pytest.approx
    for parts in (cost["stages"].values(), cost["attempts"]):
        assert sum(part["seconds"] for part in parts) == close(cost["seconds"])
        if cost["usd"] is not None:
            assert sum(part["usd"] for part in parts) == close(cost["usd"])
    assert sum(part["wasted_seconds"] for part in cost["attempts"]) == close(cost["wasted_seconds"])
    assert all(0 <= part["wasted_seconds"] <= part["seconds"] for part in cost["attempts"])
    assert (cost["usd"] is None) is all(attempt.usd_per_hour is None for attempt in made)
    assert (cost["wasted_usd"] is None) is (cost["usd"] is None)
    assert cost["savings"] is None or cost["savings"]["net_usd"] <= cost["savings"]["usd"]


def test_an_undisturbed_run_wastes_nothing() -> None:
    """One attempt that repeats no step: all of its cost was needed, and net savings are the savings."""
    cost = compute_cost([WHOLE], 290.0, 7.2)
    assert (cost["wasted_seconds"], cost["wasted_usd"]) == (0, 0)
    assert cost["usd"] == pytest.approx(0.6)
    assert cost["stages"]["train"] == {"seconds": 300.0, "usd": pytest.approx(0.3)}
    assert cost["stages"]["outside stages"]["seconds"] == pytest.approx(39)
    assert cost["savings"]["percent"] == cost["savings"]["net_percent"] == pytest.approx(50)


def test_waste_is_start_ups_and_repeated_steps() -> None:
    """A run killed in training: the shorter start-up and the repeated steps' seconds are wasted, the rest is work."""
    killed = replace(WHOLE, outcome="killed", seconds=260.0, stage_seconds={"pull": 60.0, "evaluate-base": 100.0})
    killed = replace(killed, stage_seconds=killed.stage_seconds | {"train": 60.0})
    resumed = replace(
        WHOLE,
        number=2,
        seconds=430.0,
        stage_seconds={"pull": 10.0, "train": 270.0, "evaluate-adapter": 100.0},
        repeated_steps=3,
        repeated_seconds=30.0,
    )
    cost = compute_cost([killed, resumed], 290.0, None)
    assert [part["wasted_seconds"] for part in cost["attempts"]] == [0, 60.0 + 30.0]
    assert cost["wasted_usd"] == pytest.approx(0.09)
    assert cost["savings"] is None
    # The first start-up may be the one that came to nothing.
    stillborn = replace(killed, seconds=20.0, stage_seconds={"pull": 5.0})
    cost = compute_cost([stillborn, resumed], 290.0, None)
    assert [part["wasted_seconds"] for part in cost["attempts"]] == [20.0, 30.0]


KILLED = replace(
    WHOLE, outcome="killed", finished=None, stage_seconds={"pull": 60.0, "train": 9.0}, steps=7, last_step=7
)
AGAIN = replace(WHOLE, number=2, repeated_steps=7)
IN_PULL = replace(KILLED, stage_seconds={"pull": 60.0}, steps=0, last_step=0)
LOST = replace(IN_PULL, seconds=0.0, stage_seconds={})
STOPPED = replace(KILLED, outcome="preempted", finished="2026-01-05T09:10:00Z")


@pytest.mark.parametrize(
    ("made", "exact", "of_earlier_version"),
    [
        ([KILLED, AGAIN], [True, False], [True, False]),
        ([STOPPED, AGAIN], [True, True], [True, True]),
        ([IN_PULL, WHOLE], [True, True], [True, False]),
        ([LOST, WHOLE], [True, False], [True, False]),
        # killed in its first step, or while that was noted
        ([replace(KILLED, steps=0, last_step=0), WHOLE], [True, False], [True, False]),
        ([replace(KILLED, last_step=30), AGAIN], [True, True], [True, True]),
        ([replace(KILLED, stage_seconds={"train": 9.0, "evaluate-adapter": 1.0}), AGAIN], [True] * 2, [True] * 2),
        # killed while it repeated what a stopped one had done
        ([replace(STOPPED, last_step=20), KILLED, AGAIN], [True, False, False], [True, False, False]),
        # stopped before it got as far as the killed one's last record: all that it did is repeated
        ([KILLED, replace(STOPPED, last_step=5), AGAIN], [True, True, False], [True, True, False]),
    ],
)
def test_it_is_known_whether_all_repeated_steps_are(
    made: list[AttemptRecord], exact: list[bool], of_earlier_version: list[bool]
) -> None:
    """Steps that a killed attempt did after its last record are in none; earlier versions do not note training."""
    assert exact_repeats(made) == exact
    assert exact_repeats(made, training_noted=False) == of_earlier_version


def test_repeated_steps_are_never_a_wrong_zero() -> None:
    """Without a known one the manifest has null if an attempt was killed in training; of earlier ones it is derived."""
    for made, number in (([KILLED, AGAIN], 7), ([KILLED, WHOLE], None), ([STOPPED, WHOLE], 0)):
        cost = compute_cost(made, 0.0, None)
        assert cost["repeated_steps"] == number
        assert cost["repeated_steps_exact"] is (made[0] is STOPPED)
    results = {"run": {"attempts": [asdict(IN_PULL), asdict(WHOLE)]}, "cost": {"repeated_steps": 0}}
    assert repeated_steps(results) == (0, False, [True, False])
    assert repeated_steps({**results, "cost": {"repeated_steps_exact": True}}) == (0, True, [True, True])


def test_attempts_are_charged_at_their_own_price() -> None:
    """Spot prices move, and a run may move to another machine; who was told no price pays the newest."""
    cost = compute_cost([replace(WHOLE, usd_per_hour=price) for price in (1.0, None, 3.0)], 0.0, None)
    assert [part["usd"] for part in cost["attempts"]] == pytest.approx([600 / 3600, 3 * 600 / 3600, 3 * 600 / 3600])
    assert compute_cost([replace(WHOLE, usd_per_hour=None)], 0.0, 5.0)["usd"] is None


def test_savings_are_sagemakers_figure_and_a_stricter_one() -> None:
    """`percent` is (1 - billable / training seconds) * 100; net of it goes what interruptions cost."""
    again = replace(WHOLE, number=2, repeated_seconds=100.0)
    cost = compute_cost([WHOLE, again], 290.0, 9.0)
    billable = cost["seconds"] * 3.6 / 9.0
    assert cost["savings"]["percent"] == pytest.approx((1 - billable / cost["seconds"]) * 100)
    needed = (cost["seconds"] - cost["wasted_seconds"]) * 9.0 / 3600
    assert cost["savings"]["net_usd"] == pytest.approx(needed - cost["usd"])
    assert cost["savings"]["net_percent"] == pytest.approx(100 * (1 - cost["usd"] / needed))


def test_energy_is_that_of_the_attempts_that_were_metered() -> None:
    """An attempt that was killed before the meter was read adds nothing; no meter at all is None, not 0."""
    made = [replace(WHOLE, energy_joules=joules) for joules in (None, 1.8e6, 3.6e6)]
    cost = compute_cost(made, 0.0, None)
    assert (cost["energy_joules"], cost["energy_kwh"]) == (5.4e6, pytest.approx(1.5))
    assert compute_cost([WHOLE], 0.0, None)["energy_joules"] is None
