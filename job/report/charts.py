"""Geometry of the report's charts. The template draws them as SVG of any width.

Coordinates are thousandths of the frame, from its left and its top edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FRAME = 1000
MAX_POINTS = 600
"""A line of more points is drawn through the means of groups of consecutive points."""


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class LineChart:
    """A value by step: SVG `path`, restarts as `marks`; `said` is the description for screen readers.

    `second` is the path of another value on the same axes, and `dot` a point of it that is marked; both may be empty.
    """

    title: str
    unit: str
    said: str
    path: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[float, ...]
    first: str
    last: str
    grouped: int
    second: str = ""
    dot: str = ""


@dataclass(frozen=True)
class ControlChart:
    """A value by run, at equal distances: SVG `path` and `dots`, the newest apart, and the lines of mean and limits.

    The lines are positions from the top edge; None where there are no limits.
    """

    path: str
    dots: str
    newest: str
    centre: float | None
    limits: tuple[float, float] | None
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Interval:
    """A confidence interval `low` to `high` with its estimate `at`."""

    label: str
    kind: str
    text: str
    low: float
    at: float
    high: float


@dataclass(frozen=True)
class IntervalChart:
    """Intervals on a common axis; `zero` is the position of the value 0, None where it is outside the frame."""

    spans: tuple[Interval, ...]
    ticks: tuple[Tick, ...]
    zero: float | None


def line_chart(
    title: str,
    unit: str,
    points: Sequence[tuple[int, float]],
    write: Callable[[float], str],
    *,
    marks: Sequence[float] = (),
    from_zero: bool = True,
    second: Sequence[tuple[int, float]] = (),
    dot: int | None = None,
) -> LineChart | None:
    """A chart of (step, value); None if there are no points.

    Args:
        title: Heading.
        unit: Unit of the values.
        points: By rising step.
        write: Formats a value.
        marks: Steps to mark with a vertical line; 2.5 is between steps 2 and 3.
        from_zero: Whether the value axis begins at zero instead of near the smallest value.
        second: Points of another value, drawn on the same axes.
        dot: The step of the point of `second` to mark.
    """
    if not points:
        return None
    group = math.ceil(len(points) / MAX_POINTS)
    drawn = [_mean(points[start : start + group]) for start in range(0, len(points), group)]
    values = [value for _, value in points]
    all_values = [*values, *(value for _, value in second)]
    y_ticks = nice_ticks(0.0 if from_zero else min(all_values), max(all_values))
    left = float(min(step for step, _ in (points[0], *second[:1])))
    right = float(max(step for step, _ in (points[-1], *second[-1:])))
    right = max(right, left + 1)
    steps = [tick for tick in nice_ticks(left, right, most=6) if left <= tick <= right and tick == int(tick)]
    lowest, highest = y_ticks[0], y_ticks[-1]
    first, last = points[0], points[-1]

    def path(drawn: Sequence[tuple[float, float]]) -> str:
        # a path of one point would be invisible: with h0 its round line cap is drawn as a dot
        coordinates = "L".join(f"{_share(x, left, right):g} {_down(y, lowest, highest):g}" for x, y in drawn)
        return f"M{coordinates}" + ("h0" if len(drawn) == 1 else "") if drawn else ""

    return LineChart(
        title=title,
        unit=unit,
        said=f"From {write(first[1])} at step {first[0]} to {write(last[1])} at step {last[0]}; "
        f"between {write(min(values))} and {write(max(values))}."
        + (f" On validation rows from {write(second[0][1])} to {write(second[-1][1])}." if second else ""),
        path=path(drawn),
        x_ticks=tuple(Tick(_share(tick, left, right), f"{tick:,.0f}") for tick in steps),
        y_ticks=tuple(Tick(_down(tick, lowest, highest), write(tick)) for tick in y_ticks),
        marks=tuple(_share(mark, left, right) for mark in marks if left <= mark <= right),
        first=write(first[1]),
        last=write(last[1]),
        grouped=group,
        second=path(second),
        dot=path([(step, value) for step, value in second if step == dot]),
    )


def control_chart(
    points: Sequence[tuple[str, float]], limits: tuple[float, float, float] | None, write: Callable[[float], str]
) -> ControlChart:
    """A control chart of (label, value) by run.

    Args:
        points: In the order of time, at least one.
        limits: Lower limit, mean, upper limit.
        write: Formats a value on the axis.
    """
    values = [value for _, value in points]
    y_ticks = nice_ticks(min([*values, *(limits or ())]), max([*values, *(limits or ())]))
    lowest, highest = y_ticks[0], y_ticks[-1]
    last = max(len(points) - 1, 1)
    coordinates = [(_share(number, 0, last), _down(value, lowest, highest)) for number, value in enumerate(values)]
    labelled = sorted({round(last * part / 4) for part in range(5)} & set(range(len(points))))
    lines = None if limits is None else tuple(_down(value, lowest, highest) for value in limits)
    return ControlChart(
        path="M" + "L".join(f"{x:g} {y:g}" for x, y in coordinates),
        dots="".join(f"M{x:g} {y:g}h0" for x, y in coordinates[:-1]),
        newest=f"M{coordinates[-1][0]:g} {coordinates[-1][1]:g}h0",
        centre=None if lines is None else lines[1],
        limits=None if lines is None else (lines[0], lines[2]),
        x_ticks=tuple(Tick(coordinates[number][0], points[number][0]) for number in labelled),
        y_ticks=tuple(Tick(_down(tick, lowest, highest), write(tick)) for tick in y_ticks),
    )


def interval_chart(
    intervals: Sequence[tuple[str, str, str, float, float, float]], write: Callable[[float], str], *, zero: bool
) -> IntervalChart:
    """A chart of intervals.

    Args:
        intervals: (label, kind, text, low, estimate, high), from the top.
        write: Formats a value on the axis.
        zero: Whether the axis must include zero.
    """
    bounds = [value for *_, low, _, high in intervals for value in (low, high)] + [0.0] * zero
    ticks = nice_ticks(min(bounds), max(bounds), most=5)
    left, right = ticks[0], ticks[-1]
    return IntervalChart(
        tuple(
            Interval(label, kind, text, *(_share(value, left, right) for value in (low, at, high)))
            for label, kind, text, low, at, high in intervals
        ),
        tuple(Tick(_share(tick, left, right), write(tick)) for tick in ticks),
        _share(0.0, left, right) if left <= 0 <= right else None,
    )


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Ticks of an axis: multiples of 1, 2, 2.5 or 5 times a power of ten that enclose `low` and `high`.

    At least two of them, at most about `most` intervals.
    """
    if not high > low:
        high = low + (abs(low) or 1.0)
    width = (high - low) / most
    power = 10.0 ** math.floor(math.log10(width))
    step = next(size for factor in (1, 2, 2.5, 5, 10, 20) if (size := factor * power) >= width * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _mean(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _share(value: float, low: float, high: float) -> float:
    return round(FRAME * (value - low) / (high - low), 1)


def _down(value: float, low: float, high: float) -> float:
    return round(FRAME - _share(value, low, high), 1)
