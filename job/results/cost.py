"""What a run cost: seconds, dollars and joules, by stage and by attempt, and what interruptions wasted.

Wasted time is what a run without interruptions would not have needed: the start-up of every attempt but the longest
one, and optimizer steps that had to be repeated. An attempt's start-up is its time outside `WORK`: starting, pulling,
loading. Evaluation resumes from cached scores, and saving a checkpoint is work: both count as useful.

    usd          = sum over attempts of seconds / 3600 * price of the attempt's machine
    goodput      = seconds in optimizer steps, each counted once / seconds of all attempts

An attempt that was killed without notice is known by its last note (`Attempt.note`), seconds earlier. Its seconds, with
all that is computed from them, are therefore lower bounds, and so are repeated steps unless `exact_repeats`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from job.records import AttemptRecord
from job.runs.layout import Stage

WORK = tuple(stage.value for stage in Stage if stage != Stage.PULL)
_AFTER_TRAINING = frozenset(WORK[WORK.index(Stage.TRAIN) + 1 :])
OUTSIDE = "outside stages"
HOUR = 3600.0
JOULES_PER_KWH = 3.6e6


def compute_cost(
    attempts: Sequence[AttemptRecord],
    training_seconds: float,
    on_demand_usd_per_hour: float | None,
    *,
    taken_over: Sequence[int] = (),
) -> dict[str, Any]:
    """The manifest's `cost`: seconds, US dollars, joules.

    Args:
        attempts: All attempts of the run. One without a price is charged the price of the newest attempt that has one.
        training_seconds: Seconds in optimizer steps, each step counted once.
        on_demand_usd_per_hour: Price of the same machine without preemption; None if unknown.
        taken_over: Number of the last attempt of the finished run that is exported, and of those before it
            (`ExportedRun.last_attempts`). Each of them, and this run, needed a start-up.
    """
    seconds = sum(attempt.seconds for attempt in attempts)
    recorded_prices = [attempt.usd_per_hour for attempt in attempts if attempt.usd_per_hour is not None]
    newest = recorded_prices[-1] if recorded_prices else None
    prices = [newest if attempt.usd_per_hour is None else attempt.usd_per_hour for attempt in attempts]
    runs = groupby(attempts, lambda attempt: sum(attempt.number > last for last in taken_over))
    wasted = [seconds for _, part in runs for seconds in _wasted(list(part))]
    usd = _sum(_usd(attempt.seconds, price) for attempt, price in zip(attempts, prices, strict=True))
    wasted_usd = _sum(_usd(waste, price) for waste, price in zip(wasted, prices, strict=True))
    joules = [attempt.energy_joules for attempt in attempts if attempt.energy_joules is not None]
    repeated, exact = sum(attempt.repeated_steps for attempt in attempts), all(exact_repeats(attempts))
    return {
        "seconds": seconds,
        "usd": usd,
        "goodput": min(1.0, training_seconds / seconds) if seconds else None,
        "repeated_steps": repeated if repeated or exact else None,
        "repeated_steps_exact": exact,
        "wasted_seconds": sum(wasted),
        "wasted_usd": wasted_usd,
        "energy_joules": sum(joules) if joules else None,
        "energy_kwh": sum(joules) / JOULES_PER_KWH if joules else None,
        "stages": _stages(attempts, prices),
        "attempts": [
            {
                "number": attempt.number,
                "seconds": attempt.seconds,
                "usd": _usd(attempt.seconds, price),
                "wasted_seconds": waste,
                "wasted_usd": _usd(waste, price),
                "energy_joules": attempt.energy_joules,
            }
            for attempt, price, waste in zip(attempts, prices, wasted, strict=True)
        ],
        "savings": _savings(seconds, sum(wasted), usd, on_demand_usd_per_hour),
    }


def exact_repeats(attempts: Sequence[AttemptRecord], *, training_noted: bool = True) -> list[bool]:
    """Of each attempt, whether its `repeated_steps` are all that it repeated; otherwise they are a lower bound.

    Steps that a killed attempt did after its last note are in no record. A later attempt that does them again counts
    them as new, unless a record of another attempt reaches as far.

    Args:
        attempts: All attempts of the run, in order.
        training_noted: Whether each attempt has noted before its first step that it trains, as it does since the
            manifest has `repeated_steps_exact`; if so, a killed attempt whose record lacks that has done no step.
    """
    exact, furthest, unrecorded = list[bool](), 0, False
    for attempt in attempts:
        may_have_more = _may_have_done_more(attempt, training_noted=training_noted)
        later_repeats = may_have_more and (unrecorded or attempt.last_step < furthest)
        exact.append(not later_repeats and (not unrecorded or attempt.last_step <= furthest))
        furthest, unrecorded = max(furthest, attempt.last_step), unrecorded or may_have_more
    return exact


def _may_have_done_more(attempt: AttemptRecord, *, training_noted: bool) -> bool:
    """Whether an attempt may have done steps that its record lacks."""
    if attempt.outcome != "killed" or _AFTER_TRAINING & attempt.stage_seconds.keys():
        return False
    record_is_lost = not attempt.seconds  # its record was damaged or removed
    return record_is_lost or not training_noted or attempt.last_step > 0 or Stage.TRAIN.value in attempt.stage_seconds


def repeated_steps(results: Mapping[str, Any]) -> tuple[int, bool, list[bool]]:
    """The repeated steps that a manifest of any version knows of, whether these are all, and that of each attempt."""
    attempts = [AttemptRecord(**attempt) for attempt in results["run"]["attempts"]]
    exact = exact_repeats(attempts, training_noted="repeated_steps_exact" in results["cost"])
    return sum(attempt.repeated_steps for attempt in attempts), all(exact), exact


def _wasted(attempts: Sequence[AttemptRecord]) -> list[float]:
    """Wasted seconds of each attempt."""
    starts = [max(0.0, a.seconds - sum(a.stage_seconds.get(stage, 0.0) for stage in WORK)) for a in attempts]
    needed = starts.index(max(starts))
    return [
        min(attempt.seconds, attempt.repeated_seconds + (0.0 if index == needed else starts[index]))
        for index, attempt in enumerate(attempts)
    ]


def _stages(attempts: Sequence[AttemptRecord], prices: Sequence[float | None]) -> dict[str, Any]:
    """Seconds and dollars by stage, over all attempts; they add up to the run's."""
    spent: dict[str, list[tuple[float, float | None]]] = {}
    for attempt, price in zip(attempts, prices, strict=True):
        outside = max(0.0, attempt.seconds - sum(attempt.stage_seconds.values()))
        for stage, seconds in {**attempt.stage_seconds, OUTSIDE: outside}.items():
            spent.setdefault(stage, []).append((seconds, price))
    return {
        stage: {"seconds": sum(seconds for seconds, _ in parts), "usd": _sum(_usd(*part) for part in parts)}
        for stage, parts in spent.items()
    }


def _savings(seconds: float, wasted: float, usd: float | None, on_demand: float | None) -> dict[str, float] | None:
    """What the run saved against an on-demand machine; negative if it cost more.

    `percent` compares the prices of the same seconds. That is SageMaker's `(1 - billable / training seconds) * 100`,
    whose billable seconds are the seconds times the ratio of the prices. `net_percent` is stricter: on demand
    there would have been no wasted seconds.
    """
    if usd is None or not on_demand or not seconds > wasted:
        return None
    on_demand_usd, useful_usd = on_demand * seconds / HOUR, on_demand * (seconds - wasted) / HOUR
    return {
        "on_demand_usd_per_hour": on_demand,
        "usd": on_demand_usd - usd,
        "percent": 100 * (1 - usd / on_demand_usd),
        "net_usd": useful_usd - usd,
        "net_percent": 100 * (1 - usd / useful_usd),
    }


def _usd(seconds: float, usd_per_hour: float | None) -> float | None:
    return None if usd_per_hour is None else usd_per_hour * seconds / HOUR


def _sum(parts: Iterable[float | None]) -> float | None:
    """The sum; None if a part is unknown."""
    total = 0.0
    for part in parts:
        if part is None:
            return None
        total += part
    return total
