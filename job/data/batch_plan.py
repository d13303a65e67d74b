"""Which examples an optimizer step trains on, and how they are cut into micro-batches. Pure functions, no torch.

`batch` depends only on the seed, the number of rows, the global batch size and the step. Restarts, the number of GPUs
and the micro-batch size cannot change which examples a step trains on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from heapq import heapreplace

from job.data.examples import lengths_of, weights_of
from job.records import Example


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """Optimizer steps in one epoch; the last one has fewer rows if the rows do not divide evenly."""
    return -(-rows // global_batch_size)


@lru_cache(maxsize=4)
def epoch_order(seed: int, rows: int, epoch: int) -> tuple[int, ...]:
    """A permutation of `range(rows)` for one epoch.

    Sorted by hash instead of drawn from a generator, whose random stream may differ between versions of a library.
    """
    return tuple(sorted(range(rows), key=lambda row: sha256(f"{seed}:{epoch}:{row}".encode()).digest()))


def batch(seed: int, rows: int, global_batch_size: int, step: int) -> tuple[int, ...]:
    """The rows that optimizer step `step` (from 0) trains on, over all GPUs. Every epoch visits every row once."""
    epoch, index = divmod(step, steps_per_epoch(rows, global_batch_size))
    start = index * global_batch_size
    return epoch_order(seed, rows, epoch)[start : start + global_batch_size]


def assign(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Assigns the examples of a step to processes: the longest first, each to the process with the fewest tokens.

    Args:
        lengths: Tokens of each example.
        processes: How many there are.

    Returns:
        Positions into `lengths` by process, each exactly once, in order. With few examples some processes get none.
    """
    dealt: list[list[int]] = [[] for _ in range(processes)]
    tokens = [(0, process) for process in range(processes)]  # a heap
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least, process = tokens[0]
        dealt[process].append(index)
        heapreplace(tokens, (least + lengths[index], process))
    return [sorted(positions) for positions in dealt]


def without_divided(lengths: Sequence[int], above: int | None) -> tuple[list[int], list[int]]:
    """Positions of the examples that all processes compute together (more than `above` tokens), and of the others."""
    longest = [i for i, length in enumerate(lengths) if above is not None and length > above]
    return longest, [i for i, length in enumerate(lengths) if above is None or length <= above]


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Packs examples into micro-batches of at most `budget` tokens by first-fit decreasing.

    Args:
        lengths: Tokens of each example.
        budget: Tokens a micro-batch may hold; a longer example is the only one of its micro-batch.

    Returns:
        Positions into `lengths`, each exactly once, grouped.
    """
    groups: list[list[int]] = []
    remaining: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = next((i for i, free in enumerate(remaining) if free >= lengths[index]), None)
        if slot is None:
            groups.append([])
            remaining.append(budget)
            slot = len(groups) - 1
        groups[slot].append(index)
        remaining[slot] -= lengths[index]
    return groups


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
        divided_above: Examples of more tokens than this are computed by all processes together; None for none.
    """

    examples: Sequence[Example]
    seed: int
    global_batch_size: int
    total: int
    rank: int = 0
    world_size: int = 1
    divided_above: int | None = None

    def of(self, step: int) -> list[Example]:
        """The examples of a step (from 0), over all processes."""
        rows = batch(self.seed, len(self.examples), self.global_batch_size, step)
        return [self.examples[row] for row in rows]

    def divided(self, step: int) -> list[Example]:
        """Those of them that all processes compute together, in the order in which they do so."""
        examples = self.of(step)
        return [examples[i] for i in without_divided(lengths_of(examples), self.divided_above)[0]]

    def assigned(self, step: int) -> list[Example]:
        """Those of the others that this process computes."""
        examples = self.of(step)
        others = [examples[i] for i in without_divided(lengths_of(examples), self.divided_above)[1]]
        mine = assign(lengths_of(others), self.world_size)[self.rank]
        return [others[i] for i in mine]

    def micro_batches(self, step: int, budget: int) -> list[list[Example]]:
        """The examples of a step that this process computes alone, cut by a budget of tokens."""
        mine = self.assigned(step)
        return [[mine[i] for i in group] for group in micro_batches([len(e.input_ids) for e in mine], budget)]

    def sequences(self, budget: int, longest: int | None = None) -> list[tuple[int, int]]:
        """Tokens and number of examples of every packed sequence that any process has in any step.

        A sequence is a micro-batch, or of a micro-batch the examples of one weight; see `by_weight`. Those with an
        example of more than `longest` tokens are left out.
        """
        lengths, weights = lengths_of(self.examples), weights_of(self.examples)  # without the tokens of all rows
        weighted = any(weight != 1 for weight in weights)
        sequences = []
        for step in range(self.total):
            rows = batch(self.seed, len(lengths), self.global_batch_size, step)
            rows = tuple(rows[i] for i in without_divided([lengths[row] for row in rows], self.divided_above)[1])
            for positions in assign([lengths[row] for row in rows], self.world_size):
                mine = [rows[i] for i in positions]
                for group in micro_batches([lengths[row] for row in mine], budget):
                    parts: dict[float, list[int]] = {}
                    for i in group:
                        parts.setdefault(weights[mine[i]] if weighted else 1.0, []).append(lengths[mine[i]])
                    sequences += [
                        (sum(part), len(part))
                        for weight, part in parts.items()
                        if weight and (longest is None or max(part) <= longest)
                    ]
        return sequences

    def epoch(self, step: int) -> float:
        """How many epochs the first `step` steps are."""
        return step / steps_per_epoch(len(self.examples), self.global_batch_size)


def by_weight(examples: Sequence[Example]) -> list[tuple[Sequence[Example], float]]:
    """The examples in groups of the same weight, in the order in which the weights appear; none of weight 0."""
    weights = dict.fromkeys(example.weight for example in examples)
    if len(weights) == 1 and 1.0 in weights:
        return [(examples, 1.0)]
    return [([one for one in examples if one.weight == weight], weight) for weight in weights if weight]


def weighted_targets(examples: Sequence[Example]) -> float:
    """What the summed loss of a step is divided by (transformers' `num_items_in_batch`).

    Target tokens, each as often as its row weighs: a row of weight 2 counts like the same row twice, and one of weight
    0 like none. 1 where every row weighs 0, since the sum is 0 as well; a whole number where all weigh 1.
    """
    if all(example.weight == 1 for example in examples):
        return targets_of(examples)
    return sum(example.weight * sum(example.targets) for example in examples) or 1


def targets_of(examples: Sequence[Example]) -> int:
    """Target tokens of all of them: the tokens that the loss counts."""
    return sum(sum(example.targets) for example in examples)
