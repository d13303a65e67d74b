"""The geometry of charts: numbers become shares of a frame, which the report's template draws at any width.

Places are in thousandths of the frame, from its left and its top, so that a line needs few characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FRAME = 1000
MOST_POINTS = 600
"""A line of more points is drawn through the means of equal groups of them."""


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A line by step; `path` and `marks` are drawn in the frame, `said` is for who cannot see it."""

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


@dataclass(frozen=True)
class Span:
    """An interval around its estimate."""

    label: str
    kind: str
    text: str
    low: float
    at: float
    high: float


@dataclass(frozen=True)
class Spans:
    """Intervals on one axis; `zero` is where nothing lies, if that is within the frame."""

    spans: tuple[Span, ...]
    ticks: tuple[Tick, ...]
    zero: float | None


def line(
    title: str,
    unit: str,
    points: Sequence[tuple[int, float]],
    write: Callable[[float], str],
    *,
    marks: Sequence[float] = (),
    from_zero: bool = True,
) -> Line | None:
    """A line through (step, value); None where nothing was measured.

    Args:
        title: What it shows.
        unit: Of the values.
        points: In order of the steps.
        write: How a value is written.
        marks: Places between steps to mark.
        from_zero: Whether the axis of values begins at zero, rather than near the least of them.
    """
    if not points:
        return None
    group = math.ceil(len(points) / MOST_POINTS)
    drawn = [_mean(points[start : start + group]) for start in range(0, len(points), group)]
    values = [value for _, value in points]
    y_ticks = nice_ticks(0.0 if from_zero else min(values), max(values))
    left, right = float(points[0][0]), float(points[-1][0])
    right = max(right, left + 1)
    steps = [tick for tick in nice_ticks(left, right, most=6) if left <= tick <= right and tick == int(tick)]
    lowest, highest = y_ticks[0], y_ticks[-1]
    first, last = points[0], points[-1]
    return Line(
        title=title,
        unit=unit,
        said=f"From {write(first[1])} at step {first[0]} to {write(last[1])} at step {last[0]}; "
        f"between {write(min(values))} and {write(max(values))}.",
        path="M"
        + "L".join(f"{_share(x, left, right):g} {_down(y, lowest, highest):g}" for x, y in drawn)
        # a line of one point has no length; it is drawn as a dot
        + ("h0" if len(drawn) == 1 else ""),
        x_ticks=tuple(Tick(_share(tick, left, right), f"{tick:,.0f}") for tick in steps),
        y_ticks=tuple(Tick(_down(tick, lowest, highest), write(tick)) for tick in y_ticks),
        marks=tuple(_share(mark, left, right) for mark in marks if left <= mark <= right),
        first=write(first[1]),
        last=write(last[1]),
        grouped=group,
    )


def spans(
    given: Sequence[tuple[str, str, str, float, float, float]], write: Callable[[float], str], *, zero: bool
) -> Spans:
    """Intervals given as (label, kind, text, low, estimate, high).

    Args:
        given: In order, from the top.
        write: How a value on the axis is written.
        zero: Whether zero has to be within the frame.
    """
    bounds = [value for *_, low, _, high in given for value in (low, high)] + [0.0] * zero
    ticks = nice_ticks(min(bounds), max(bounds), most=5)
    left, right = ticks[0], ticks[-1]
    return Spans(
        tuple(
            Span(label, kind, text, *(_share(value, left, right) for value in (low, at, high)))
            for label, kind, text, low, at, high in given
        ),
        tuple(Tick(_share(tick, left, right), write(tick)) for tick in ticks),
        _share(0.0, left, right) if left <= 0 <= right else None,
    )


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten that reach from `low` or below to `high` or above.

    At most `most` steps apart, two ticks at least.
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
