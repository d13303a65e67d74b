"""What base and adapter answered to the prompts of JOB_EVAL__PROMPTS, as report and model card show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from job.records import PromptAnswer

MAX_TEXT = 2000
"""Longest prompt and answer shown, in characters: of a longer prompt the end, of a longer answer the beginning."""


@dataclass(frozen=True)
class ShownAnswer:
    """An answer, and whether it was cut off at the maximum number of new tokens.

    `unsafe` is the probability that it is unsafe, where a classifier scored it.
    """

    text: str
    cut: bool
    unsafe: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt, and what was answered to it; `reference` is the row's own answer, if it has one."""

    where: str
    prompt: str
    reference: str | None
    base: ShownAnswer
    adapter: ShownAnswer

    @property
    def same(self) -> bool:
        """Whether both models answered the same."""
        return self.base == self.adapter


def shown_prompts(base: Sequence[PromptAnswer], adapter: Sequence[PromptAnswer]) -> list[ShownPrompt]:
    """Both sides of each prompt, in their order.

    Raises:
        ValueError: The files are not of the same prompts.
    """
    prompts = []
    for before, after in zip(base, adapter, strict=True):
        if (before.where, before.prompt) != (after.where, after.prompt):
            raise ValueError(f"the answers are not to the same prompts: {before.where!r} and {after.where!r}")
        prompt = before.prompt if len(before.prompt) <= MAX_TEXT else f"… {before.prompt[-MAX_TEXT:]}"
        reference = None if before.reference is None else _cut(before.reference)
        prompts.append(ShownPrompt(before.where, prompt, reference, _shown(before), _shown(after)))
    return prompts


def _shown(answer: PromptAnswer) -> ShownAnswer:
    cut = answer.ended_by == "length" or len(answer.answer) > MAX_TEXT
    return ShownAnswer(_cut(answer.answer.strip()), cut, answer.unsafe)


def _cut(text: str) -> str:
    return text[:MAX_TEXT].rstrip()
