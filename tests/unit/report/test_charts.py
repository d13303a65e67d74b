"""Charts: round tick values, and lines and intervals at the right positions."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from job.report.charts import FRAME, MAX_POINTS, interval_chart, line_chart, nice_ticks

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)


def places(path: str) -> list[tuple[float, float]]:
    """The points of a path of straight lines."""
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.e+-]+) ([\d.e+-]+)", path)]


@given(NUMBERS, NUMBERS, st.integers(2, 8))
def test_ticks_enclose_what_is_drawn(one: float, two: float, most: int) -> None:
    """They reach over both ends, are evenly spaced, and few; their steps are 1, 2, 2.5 or 5 times a power of ten."""
    low, high = sorted((one, two))
    assume(high - low > 1e-6 * max(1.0, abs(high), abs(low)))
    ticks = nice_ticks(low, high, most)
    slack = 1e-6 * (high - low)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= most + 2
    step = ticks[1] - ticks[0]
    assert all(after - before == pytest.approx(step) for before, after in itertools.pairwise(ticks))
    leading = float(f"{step:.6e}".partition("e")[0])
    assert any(leading == pytest.approx(nice, rel=1e-5) for nice in (1, 2, 2.5, 5))


@pytest.mark.parametrize("value", [0.0, 3.0, -2e-7])
def test_a_level_line_has_an_axis_too(value: float) -> None:
    """Where all values are the same there are ticks around them."""
    ticks = nice_ticks(value, value)
    assert ticks[0] <= value < ticks[-1]


def test_a_line_goes_through_its_points() -> None:
    """First and last step at the frame's sides, values between the outermost ticks, and the same said in words."""
    drawn = line_chart("Loss", "nats", [(1, 4.0), (2, 3.0), (3, 0.0)], "{:.1f}".format)
    assert drawn
    assert places(drawn.path) == [(0, 0), (FRAME / 2, FRAME / 4), (FRAME, FRAME)]
    assert next((tick.at, tick.label) for tick in drawn.y_ticks) == (FRAME, "0.0")
    assert [tick.label for tick in drawn.x_ticks] == ["1", "2", "3"]
    assert drawn.said == "From 4.0 at step 1 to 0.0 at step 3; between 0.0 and 4.0."
    assert (drawn.first, drawn.last, drawn.grouped) == ("4.0", "0.0", 1)


def test_nothing_measured_is_no_line() -> None:
    """A chart without a point is left out; with one point it is a dot."""
    assert line_chart("Speed", "", [], str) is None
    dot = line_chart("Speed", "", [(1, 5.0)], str)
    assert dot
    assert dot.path.endswith("h0")


def test_a_long_line_is_drawn_through_means() -> None:
    """Never more points than a screen shows; the mean stays, and the chart knows how many steps a point stands for."""
    drawn = line_chart("Loss", "", [(step, float(step % 2)) for step in range(1, 10 * MAX_POINTS + 1)], str)
    assert drawn
    assert drawn.grouped == 10
    assert len(places(drawn.path)) == MAX_POINTS
    assert {y for _, y in places(drawn.path)} == {FRAME / 2}


def test_marks_lie_between_the_steps() -> None:
    """A restart before step 3 of 1 to 5 is drawn between 2 and 3; one outside is not drawn."""
    drawn = line_chart("Loss", "", [(step, 1.0) for step in range(1, 6)], str, marks=(2.5, 9.5))
    assert drawn
    assert drawn.marks == (375.0,)


def test_intervals_share_an_axis() -> None:
    """Ends and estimate by the same scale, zero where it is asked for."""
    chart = interval_chart(
        [("a", "base", "", 10.0, 15.0, 20.0), ("b", "adapter", "", 20.0, 30.0, 40.0)], str, zero=True
    )
    assert [(span.low, span.at, span.high) for span in chart.spans] == [(250, 375, 500), (500, 750, 1000)]
    assert chart.zero == 0
    assert interval_chart([("a", "base", "", 10.0, 15.0, 20.0)], str, zero=False).zero is None


def test_two_lines_share_their_axes() -> None:
    """A second value is drawn on the first one's axes, which make room for it; one of its points can be marked."""
    points = [(1, 2.0), (2, 1.0), (3, 0.5)]
    plot = line_chart("Loss", "", points, str, from_zero=False, second=[(0, 4.0), (3, 1.0)], dot=3)
    assert plot is not None
    assert plot.second == "M0 0L1000 750"
    assert plot.dot == "M1000 750h0"
    assert plot.y_ticks[-1].label == "4.0"
    assert "On validation rows from 4.0 to 1.0" in plot.said
    alone = line_chart("Loss", "", points, str)
    assert alone is not None
    assert (alone.second, alone.dot) == ("", "")
