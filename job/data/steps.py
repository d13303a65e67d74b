"""The steps of a training: which examples each of them trains on, in this process and in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from job.data import batch_plan
from job.records import Example


@dataclass(frozen=True)
class Steps:
    """The batch plan over a data set.

    Attributes:
        examples: The data set; the plan's rows are positions in it.
        seed: The run's.
        global_batch_size: Examples of a step, over all processes.
        total: Steps in all epochs.
        rank: This process.
        world_size: How many there are.
    """

    examples: Sequence[Example]
    seed: int
    global_batch_size: int
    total: int
    rank: int = 0
    world_size: int = 1

    def of(self, step: int) -> list[Example]:
        """The examples of a step (from 0), over all processes."""
        rows = batch_plan.batch(self.seed, len(self.examples), self.global_batch_size, step)
        return [self.examples[row] for row in rows]

    def share(self, step: int) -> list[Example]:
        """Those of them that are this process's."""
        examples = self.of(step)
        mine = batch_plan.shares([len(example.input_ids) for example in examples], self.world_size)[self.rank]
        return [examples[i] for i in mine]

    def micro_batches(self, step: int, budget: int) -> list[list[Example]]:
        """This process's share of a step, cut by a budget of tokens."""
        share = self.share(step)
        return [
            [share[i] for i in group] for group in batch_plan.micro_batches([len(e.input_ids) for e in share], budget)
        ]

    def largest(self, budget: int) -> list[Example]:
        """The examples of the largest micro-batch that this process will meet in any step."""
        longest = max(self.examples, key=lambda example: len(example.input_ids))
        return max(
            [[longest], *(group for step in range(self.total) for group in self.micro_batches(step, budget))],
            key=tokens_of,
        )

    def epoch(self, step: int) -> float:
        """How many epochs the first `step` steps make."""
        return step / batch_plan.steps_per_epoch(len(self.examples), self.global_batch_size)


def tokens_of(examples: Sequence[Example]) -> int:
    """Tokens of all of them."""
    return sum(len(example.input_ids) for example in examples)


def targets_of(examples: Sequence[Example]) -> int:
    """Target tokens of all of them: those that are learned."""
    return sum(sum(example.targets) for example in examples)
