"""The steps of training: processes and micro-batches divide a step's examples, and leave none out."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from job.data.batch_plan import Steps, by_weight, targets_of
from job.records import Example
from tests.helpers import tokens_of

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30)


def steps(lengths: list[int], batch_size: int) -> Steps:
    """Two epochs over examples that can be told apart; all tokens but the first are learned."""
    examples = [Example((n,) * length, (False, *[True] * (length - 1))) for n, length in enumerate(lengths)]
    return Steps(examples, seed=3, global_batch_size=batch_size, total=2 * -(-len(lengths) // batch_size))


@given(LENGTHS, st.integers(1, 12), st.integers(1, 4), st.integers(1, 90))
def test_shares_and_micro_batches_divide_a_step(lengths: list[int], size: int, world: int, budget: int) -> None:
    """Every example of a step is in one micro-batch of one process; none is over the budget but an example alone."""
    plan = steps(lengths, size)
    for step in range(plan.total):
        of_each = [replace(plan, rank=rank, world_size=world).micro_batches(step, budget) for rank in range(world)]
        groups = [group for of_one in of_each for group in of_one]
        assert sorted(e.input_ids for group in groups for e in group) == sorted(e.input_ids for e in plan.of(step))
        assert all(tokens_of(group) <= budget or len(group) == 1 for group in groups)
        assert sum(targets_of(group) for group in groups) == targets_of(plan.of(step))


@given(LENGTHS, st.integers(1, 12), st.integers(1, 3), st.integers(1, 90))
def test_the_sequences_of_a_run_are_those_that_come(lengths: list[int], size: int, world: int, budget: int) -> None:
    """Tokens and examples of every sequence are known beforehand; other weights are apart, and 0 is left out."""
    plan = replace(steps(lengths, size), world_size=world)
    weighted = [replace(e, weight=(0.0, 1.0, 2.5)[n % 3]) for n, e in enumerate(plan.examples)]
    for examples in (plan.examples, weighted):
        plan = replace(plan, examples=examples)
        processes = [replace(plan, rank=rank) for rank in range(world)]
        groups = [group for own in processes for step in range(plan.total) for group in own.micro_batches(step, budget)]
        found = [(tokens_of(part), len(part)) for group in groups for part, _ in by_weight(group)]
        assert sorted(plan.sequences(budget)) == sorted(found)


def test_epochs_count_steps() -> None:
    """A last step that is smaller counts as one."""
    plan = steps([3] * 10, 4)
    assert [plan.epoch(step) for step in (0, 3, 6)] == [0, 1, 2]
