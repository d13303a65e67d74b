"""Claimed and found values: every differing leaf is named, except for irrelevant digits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.verification.differences import Difference, find_differences, show

values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_a_value_is_like_itself(value: Any) -> None:
    """Nothing differs from itself, nor from itself read back from JSON."""
    assert list(find_differences("x", value, value)) == []
    assert list(find_differences("x", value, json.loads(json.dumps(value)))) == []


@given(values, values)
def test_values_that_differ_in_json_differ(one: Any, two: Any) -> None:
    """What is written differently is found, both ways round, but for late digits and how whole numbers are written."""
    rough = [json.loads(json.dumps(value), parse_int=_rounded, parse_float=_rounded) for value in (one, two)]
    assert list(find_differences("x", one, two)) or rough[0] == rough[1]
    assert bool(list(find_differences("x", one, two))) == bool(list(find_differences("x", two, one)))


def _rounded(text: str) -> float:
    return float(f"{float(text):.5g}")


@pytest.mark.parametrize(
    ("claimed", "found"),
    [
        (1, 1.5),
        (1, True),
        (True, 1),
        (0.0, 1e-300),
        (1e-50, 1e-51),
        (1.0, 1.000001),
        (None, 0),
        ("1", 1),
        ([1], [1, 2]),
    ],
)
def test_other_values_differ(claimed: Any, found: Any) -> None:
    """Also p values that are both next to nothing, a truth that is no number, and lists of other lengths."""
    assert list(find_differences("f", claimed, found)) == [Difference("f", json.dumps(claimed), json.dumps(found))]


def test_places_are_told() -> None:
    """The way to each leaf, through names and numbers, and what is on one side only."""
    claimed = {"a": {"b": [1, 2]}, "c": 1, "e": 5}
    found = {"a": {"b": [1, 3]}, "d": 4, "e": 5.0}
    assert [str(difference) for difference in find_differences("results.json", claimed, found)] == [
        "results.json a.b[1]: claimed 2, found 3",
        "results.json c: claimed 1, found nothing",
        "results.json d: claimed nothing, found 4",
    ]


def test_late_digits_do_not_count() -> None:
    """Another version of scipy ends its iterations elsewhere; and a whole number may be written as a fraction."""
    assert list(find_differences("f", 0.123456789012, 0.123456789013)) == []
    assert list(find_differences("f", 60, 60.0)) == []
    assert list(find_differences("f", 10**17, 10**17 + 1)) != []
    assert list(find_differences("f", 10**400, 1.0)) != []


def test_what_is_shown_stays_on_its_line() -> None:
    """Control characters of a hostile file do not reach the terminal, nor do endless values."""
    assert show("\x1b[31mred\n") == '"\\u001b[31mred\\n"'
    assert len(show("x" * 10_000)) < 200
