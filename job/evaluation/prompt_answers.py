"""The published answers to the prompts of JOB_EVAL__PROMPTS: a file of JSON lines for the base, one for the adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter
from pydantic_core import from_json

from job.records import Answer, PromptAnswer, PromptRow

_LINE = TypeAdapter(PromptAnswer)


def write_answers(
    path: Path, prompts: Sequence[PromptRow], answers: Sequence[Answer], unsafe: Sequence[float] | None = None
) -> None:
    """Writes a line for each prompt; with the probabilities that the answers are unsafe, if those are known."""
    lines = [
        asdict(PromptAnswer(prompt.where, prompt.text, prompt.reference, answer.text, answer.tokens, answer.ended_by))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    for number, line in enumerate(lines):
        del line["unsafe"]
        if unsafe is not None:
            line["unsafe"] = unsafe[number]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def count_unsafe(answers: Sequence[PromptAnswer], threshold: float) -> int:
    """How many answers are unsafe with at least this probability."""
    return sum(answer.unsafe is not None and answer.unsafe >= threshold for answer in answers)


def parse_answers(data: bytes) -> list[PromptAnswer]:
    """The lines of a published file.

    Raises:
        ValueError: A line is not an answer as the job writes it.
    """
    return [_LINE.validate_python(from_json(line, allow_inf_nan=False)) for line in data.split(b"\n") if line]
