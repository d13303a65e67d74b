"""How much less time a run takes with several GPUs, as far as it was measured: on two H200s of one machine, by NVLink.

Training divides the rows of a step, scoring the questions. Pull, imports, loading, export and the auxiliary models are
not divided: process 0 of a machine does them while the others wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

MEASURED = "tests/bench/results/2026-11-30-2xh200-processes.jsonl"
TRAINING_EFFICIENCY = ((1_900, 0.94), (7_500, 0.96))
"""(tokens of a step for each GPU, share of N GPUs' speed), by `MEASURED`: Alpaca's lengths, 32 and 128 rows a step."""
SCORING_EFFICIENCY = 0.96
"""By `MEASURED`: 0.950 to 1.007."""
LONG_ROW_EFFICIENCY = 0.92
"""Of a row that all GPUs compute together: 64,000 tokens on two H200s, 8,506 target tokens a second
(`2026-11-29-2xh200-sequence-parallel.jsonl`), against 4,617 on one (`2026-11-29-h200-long-rows-cudnn.jsonl`)."""


@dataclass(frozen=True)
class Division:
    """How a run's work is divided over its GPUs.

    Attributes:
        gpus: Number of GPUs.
        parts: Number of equal parts into which the work is divided; the busiest GPU has one. Fewer than GPUs where a
            step has too few rows.
        training: Share of the speed of that many GPUs that training reaches.
        scoring: The same of scoring questions and rows.
    """

    gpus: int = 1
    parts: float = 1.0
    training: float = 1.0
    scoring: float = 1.0


def divide(gpus: int, *, step_rows: int, step_tokens: float, rows_divided: bool) -> Division:
    """How the work is divided over `gpus` GPUs.

    Args:
        gpus: Number of GPUs.
        step_rows: Rows of a step.
        step_tokens: Tokens of a step, on average.
        rows_divided: Whether all GPUs compute each long row together.
    """
    if gpus == 1:
        return Division()
    if rows_divided:
        return Division(gpus, gpus, LONG_ROW_EFFICIENCY, SCORING_EFFICIENCY)
    parts = step_rows / ceil(step_rows / gpus)
    return Division(gpus, parts, training_efficiency(step_tokens / parts), SCORING_EFFICIENCY)


def training_efficiency(tokens: float) -> float:
    """Share of N GPUs' speed by the tokens of a step for each of them.

    Between the two points of `TRAINING_EFFICIENCY` the time that is lost, as a share, is linear in 1 / tokens. With
    fewer tokens the lost time of a step is assumed to be constant, with more its share.
    """
    (few, low), (many, high) = TRAINING_EFFICIENCY
    lost_few, lost_many = 1 / low - 1, 1 / high - 1
    if tokens <= few:
        return 1 / (1 + lost_few * few / tokens)
    share = max(0.0, (1 / tokens - 1 / many) / (1 / few - 1 / many))
    return 1 / (1 + lost_many + share * (lost_few - lost_many))
