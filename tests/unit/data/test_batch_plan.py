"""The batch plan: a step's examples do not depend on which process computes them, nor on micro-batches."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from job.data.batch_plan import assign, batch, epoch_order, micro_batches, steps_per_epoch

SEEDS = st.integers(0, 2**63)
ROWS = st.integers(1, 300)
SIZES = st.integers(1, 64)
LENGTHS = st.lists(st.integers(1, 200), max_size=60)
BUDGETS = st.integers(1, 500)


@given(SEEDS, ROWS, SIZES, st.integers(0, 3))
def test_every_epoch_visits_every_row_once(seed: int, rows: int, size: int, epoch: int) -> None:
    """The steps of an epoch hold every row exactly once; all are full but perhaps the last, and none is empty."""
    steps = steps_per_epoch(rows, size)
    plan = [batch(seed, rows, size, epoch * steps + index) for index in range(steps)]
    assert Counter(row for rows_of_step in plan for row in rows_of_step) == Counter(range(rows))
    assert all(len(rows_of_step) == size for rows_of_step in plan[:-1])
    assert 1 <= len(plan[-1]) <= size


@given(SEEDS, ROWS, SIZES, st.lists(st.integers(0, 100), min_size=1, max_size=10))
def test_a_step_is_computable_alone(seed: int, rows: int, size: int, wanted: list[int]) -> None:
    """A step asked for alone, from nothing, is the step of a walk from the start, in whatever order it is asked."""
    walk = [batch(seed, rows, size, step) for step in range(max(wanted) + 1)]
    for step in wanted:
        epoch_order.cache_clear()
        assert batch(seed, rows, size, step) == walk[step]


def test_the_plan_is_the_same_in_every_process_and_version() -> None:
    """Golden: a plan that changed would make a resumed run another run."""
    assert epoch_order(0, 8, 0) == (7, 4, 1, 2, 3, 0, 6, 5)
    assert epoch_order(0, 8, 1) == (3, 0, 4, 1, 2, 5, 7, 6)
    assert batch(7, 10, 4, 5) == (6, 0)


@given(SEEDS, st.integers(0, 1000), st.integers(20, 300))
def test_epochs_and_seeds_are_shuffled_differently(seed: int, epoch: int, rows: int) -> None:
    """Another epoch and another seed give another order (with 20 rows or more, a coincidence is impossible)."""
    order = epoch_order(seed, rows, epoch)
    assert order != epoch_order(seed, rows, epoch + 1)
    assert order != epoch_order(seed + 1, rows, epoch)
    assert order != tuple(range(rows))


def test_the_order_is_unbiased() -> None:
    """Over 2,000 epochs every row comes to every place about equally often."""
    counts = Counter(
        (place, row) for epoch in range(2000) for place, row in enumerate(epoch_order.__wrapped__(3, 5, epoch))
    )
    # 400 expected in each of 25 cells; six standard deviations of a binomial are 108
    assert len(counts) == 25
    assert all(292 < count < 508 for count in counts.values())


@settings(max_examples=60)
@given(LENGTHS, BUDGETS)
@example([], 1)
@example([500, 500], 1)
def test_micro_batches_partition_within_the_budget(lengths: list[int], budget: int) -> None:
    """Every example is in exactly one group; a group over the budget holds one example that is longer itself."""
    groups = micro_batches(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        assert sum(lengths[index] for index in group) <= budget or len(group) == 1


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [([5, 5], [[0, 1]]), ([4, 5, 5, 6], [[3, 0], [1, 2]]), ([3, 3, 3, 3], [[0, 1, 2], [3]]), ([11, 2], [[0], [1]])],
)
def test_micro_batches_fit_the_longest_first(lengths: list[int], groups: list[list[int]]) -> None:
    """Golden, for a budget of 10: an exact fit is a fit, the longest are placed first, and ties keep their order."""
    assert micro_batches(lengths, 10) == groups


@given(LENGTHS, BUDGETS)
def test_micro_batches_are_packed_well(lengths: list[int], budget: int) -> None:
    """First fit leaves no two groups that would go together in one."""
    assume(all(length <= budget for length in lengths))
    sums = sorted(sum(lengths[index] for index in group) for group in micro_batches(lengths, budget))
    assert len(sums) < 2 or sums[0] + sums[1] > budget


PROCESSES = st.integers(1, 9)


@given(LENGTHS, PROCESSES)
def test_every_example_is_dealt_to_one_process(lengths: list[int], processes: int) -> None:
    """Each exactly once, in the plan's order; nobody has more than the others by more than one example's tokens."""
    dealt = assign(lengths, processes)
    assert len(dealt) == processes
    assert Counter(index for positions in dealt for index in positions) == Counter(range(len(lengths)))
    assert all(positions == sorted(positions) for positions in dealt)
    tokens = [sum(lengths[index] for index in positions) for positions in dealt]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


@given(LENGTHS)
def test_one_process_gets_the_step_as_it_is(lengths: list[int]) -> None:
    """Alone it trains on the plan's rows in the plan's order."""
    assert assign(lengths, 1) == [list(range(len(lengths)))]


@pytest.mark.parametrize(
    ("lengths", "dealt"),
    [
        ([1, 1, 1, 1, 4], [[4], [0, 1, 2, 3]]),
        ([5, 5, 5], [[0, 2], [1]]),
        ([3, 5, 4], [[1], [2], [0]]),
        ([2], [[0], []]),
    ],
)
def test_examples_are_dealt_the_longest_first(lengths: list[int], dealt: list[list[int]]) -> None:
    """Golden: of equal lengths the first example comes first, and of processes with equally many tokens the first."""
    assert assign(lengths, len(dealt)) == dealt
