"""Sizes of public models, data sets and tasks, used if the hub cannot be reached. `plan` marks them as assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from job.model.architecture import Architecture

ARCHITECTURES: Mapping[str, Architecture] = {
    # its published config.json
    "mistralai/Mistral-7B-v0.1": Architecture(
        hidden=4096,
        intermediate=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_size=128,
        vocabulary=32000,
        window=32768,
    ),
}

CHARACTERS_PER_TOKEN = 4.3
"""Measured on Alpaca's rendered rows with Mistral-7B-v0.1's tokenizer: 4.32. Other languages and code have fewer."""


@dataclass(frozen=True)
class DatasetTokens:
    """The first `rows` valid rows of a data set, rendered and tokenized: tokens in all, and of the longest row."""

    rows: int
    tokens: int
    longest: int
    squares: int
    """Sum of the squared lengths: the cost of attention is proportional to it."""


DATASET_TOKENS: Mapping[str, tuple[DatasetTokens, ...]] = {
    # Counted on the public file with Mistral-7B-v0.1's tokenizer; the last is the whole data set.
    "tatsu-lab/alpaca": (
        DatasetTokens(1500, 174_466, 503, 25_030_444),
        DatasetTokens(51_974, 6_350_630, 1243, 974_291_538),
    ),
}


@dataclass(frozen=True)
class TaskTokens:
    """A task's questions: their number, their tokens when packed, and how many of these have logits (`reads`).

    Of the longest prompt with a generated answer, `prompt` are its tokens, and `answered` those with the answer.
    """

    count: int
    tokens: int
    reads: int
    prompt: int = 0
    answered: int = 0

    def first(self, limit: int | None) -> TaskTokens:
        """The first `limit` questions, assumed to be as long as the others on average; None: all."""
        share = min(1.0, limit / self.count) if limit else 1.0
        return TaskTokens(round(share * self.count), round(share * self.tokens), round(share * self.reads))


TASK_TOKENS: Mapping[str, TaskTokens] = {
    # its test split, counted with Mistral-7B-v0.1's tokenizer; 113,985 tokens where questions that begin alike share
    # nothing (35.83 of 47.97 a question: tests/bench/results/2026-11-29-h200-evaluation.jsonl)
    "arc_easy": TaskTokens(2376, 85_131, 48_906),
}
