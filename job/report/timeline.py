"""The report's timeline: the attempts of a run end to end, each divided into its stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.common.formatting import between
from job.results.cost import OUTSIDE
from job.runs.layout import Stage


@dataclass(frozen=True)
class StageShare:
    """A stage's part of an attempt, in percent of the attempt's time.

    `repeated` is the percentage of the stage that went into steps an earlier attempt had done.
    """

    stage: str
    seconds: float
    percent: float
    repeated: float


@dataclass(frozen=True)
class AttemptBar:
    """An attempt's bar: `left` and `width` in percent of the machine time of all attempts, `waited` in seconds."""

    number: int
    outcome: str
    started: str
    seconds: float
    waited: float | None
    left: float
    width: float
    pieces: tuple[StageShare, ...]
    first_step: int
    last_step: int
    steps: int
    repeated_steps: int
    repeats_exact: bool


def bars(attempts: Sequence[Mapping[str, Any]], exact: Sequence[bool] | None = None) -> list[AttemptBar]:
    """One bar for each attempt. The axis leaves out the time between attempts, which is not paid for; see `waited`.

    Args:
        attempts: Of the manifest.
        exact: Of each attempt, whether its `repeated_steps` are exact (`cost.repeated_steps`); None if all are.
    """
    total = sum(attempt["seconds"] for attempt in attempts) or 1.0
    attempt_bars: list[AttemptBar] = []
    elapsed = 0.0
    ended: str | None = None
    for attempt, repeats_exact in zip(attempts, exact or [True] * len(attempts), strict=True):
        attempt_bars.append(
            AttemptBar(
                number=attempt["number"],
                outcome=attempt["outcome"],
                started=attempt["started"],
                seconds=attempt["seconds"],
                waited=between(ended, attempt["started"]),
                left=round(100 * elapsed / total, 3),
                width=round(100 * attempt["seconds"] / total, 3),
                pieces=tuple(_pieces(attempt)),
                first_step=attempt["last_step"] - attempt["steps"] + 1,
                last_step=attempt["last_step"],
                steps=attempt["steps"],
                repeated_steps=attempt["repeated_steps"],
                repeats_exact=repeats_exact,
            )
        )
        elapsed += attempt["seconds"]
        ended = attempt["finished"]
    return attempt_bars


def restarts(attempts: Sequence[Mapping[str, Any]]) -> list[float]:
    """Where training continued in another attempt: 20.5 is between steps 20 and 21."""
    trained = [bar for bar in bars(attempts) if bar.steps]
    return [bar.first_step - 0.5 for bar in trained[1:]]


def _pieces(attempt: Mapping[str, Any]) -> Iterator[StageShare]:
    """The stages in order. Time outside stages is put after the first one: that is when models are loaded."""
    seconds = max(attempt["seconds"], sum(attempt["stage_seconds"].values())) or 1.0
    stages = list(attempt["stage_seconds"].items())
    outside = seconds - sum(attempt["stage_seconds"].values())
    for name, spent in [*stages[:1], (OUTSIDE, outside), *stages[1:]]:
        share = attempt["repeated_steps"] / attempt["steps"] if name == Stage.TRAIN and attempt["steps"] else 0.0
        if spent > 0:
            yield StageShare(name, spent, round(100 * spent / seconds, 3), round(100 * share, 1))


def by_stage(attempts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by stage, summed over all attempts."""
    totals: dict[str, float] = {}
    for attempt in attempts:
        for piece in _pieces(attempt):
            totals[piece.stage] = totals.get(piece.stage, 0.0) + piece.seconds
    return totals
