"""The amount of training: counted as in the batch plan, or extrapolated from means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.batch_plan import batch, steps_per_epoch
from job.planning.workload import SPREAD, Workload, count, scale

LENGTHS = st.lists(st.integers(2, 500), min_size=1, max_size=80)


@given(LENGTHS, st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
def test_it_is_what_the_batch_plan_takes(lengths: list[int], size: int, steps: int, seed: int) -> None:
    """Tokens, targets and squares of exactly the examples that the steps will see; the largest step and example."""
    targets = [length - 1 for length in lengths]
    found = count(lengths, targets, seed=seed, global_batch_size=size, steps=steps)
    seen = [[lengths[row] for row in batch(seed, len(lengths), size, step)] for step in range(steps)]
    every = [length for step in seen for length in step]
    assert found == Workload(
        steps=steps,
        rows=len(lengths),
        tokens=sum(every),
        target_tokens=sum(every) - len(every),
        squares=sum(length**2 for length in every),
        longest=max(lengths),
        largest_step=max(map(sum, seen)),
    )


@given(st.integers(1, 3000), st.integers(2, 400), st.integers(1, 64), st.integers(1, 3))
def test_scaling_agrees_where_all_rows_are_alike(rows: int, length: int, size: int, epochs: int) -> None:
    """With rows of one length, and whole epochs, the means say everything but the spread, which is an allowance."""
    steps = epochs * steps_per_epoch(rows, size)
    exact = count([length] * rows, [length - 1] * rows, seed=0, global_batch_size=size, steps=steps)
    scaled = scale(rows, length, length**2, length, global_batch_size=size, steps=steps)
    assert scaled.largest_step == max(length, round(SPREAD * exact.largest_step))
    for name in ("steps", "rows", "tokens", "target_tokens", "squares", "longest"):
        assert getattr(scaled, name) == getattr(exact, name)


def test_a_run_that_stops_early_sees_less() -> None:
    """Steps, not epochs, decide."""
    assert scale(100, 10.0, 100.0, 20, global_batch_size=30, steps=6).tokens == 100 * 10 + 60 * 10
    assert scale(100, 10.0, 100.0, 20, global_batch_size=30, steps=4).tokens == pytest.approx(1000)
