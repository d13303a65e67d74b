"""Errors of several inputs are reported together, with places named by their settings."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest

from job.errors import (
    AccessDenied,
    DataError,
    JobError,
    Preempted,
    Problem,
    SettingsError,
    Unreachable,
    check_all,
    combine,
    exit_codes,
    most_serious,
    named_by,
)


def data_error(count: int) -> DataError:
    """An error with so many rows."""
    return DataError([Problem(f"x:{n}", "is bad") for n in range(count)], advice="skip them")


def test_one_error_stays_what_it_is() -> None:
    """Nothing is added to an error that is the only one."""
    error = Unreachable("silence")
    assert combine([("data", error)]) is error


def test_all_problems_are_told_with_the_code_of_the_first_kind() -> None:
    """Settings come before data, data before access; what lists no problems is named; many rows hide no other one."""
    found = combine(
        [("data", data_error(30)), ("storage", AccessDenied("no key")), ("tasks", SettingsError([Problem("T", "no")]))]
    )
    assert isinstance(found, SettingsError)
    assert [str(problem) for problem in found.problems[:3]] == ["storage: no key", "T: no", "x:0: is bad"]
    assert found.total == 32
    assert str(found).splitlines()[-2:] == ["... and 12 more", "skip them"]
    assert isinstance(combine([("a", AccessDenied("x")), ("b", data_error(1))]), DataError)


@pytest.mark.parametrize(
    ("kind", "count", "once"),
    [(DataError, 2, False), (DataError, 3, True), (DataError, 30, True), (SettingsError, 3, False)],
)
def test_a_fix_that_many_rows_have_is_said_once(kind: type[DataError | SettingsError], count: int, once: bool) -> None:  # noqa: FBT001
    """At the end, before the advice that is given; a fix of one row alone stays with it."""
    problems = [
        Problem("x:0", "is odd; even; mend it"),
        *(Problem(f"x:{n}", "is bad; mend") for n in range(1, count + 1)),
    ]
    found = kind(problems, advice="skip them")
    shown = [str(one) for one in found.problems]
    assert shown[:2] == ["x:0: is odd; even; mend it", "x:1: is bad" if once else "x:1: is bad; mend"]
    assert str(found).splitlines()[-2:] == (["mend", "skip them"] if once else [shown[-1], "skip them"])
    assert found.total == count + 1


def test_the_advice_of_two_errors_is_said_once() -> None:
    """A line that both have is one line."""
    one, other = (DataError([Problem("x", "is bad")], advice=f"{name}\nskip them") for name in ("long", "empty"))
    assert str(combine([("a", one), ("b", other)])).splitlines()[2:] == ["long", "skip them", "empty"]


@pytest.mark.parametrize("kind", [AccessDenied, Unreachable])
def test_errors_without_problems_are_one_line(kind: type[JobError]) -> None:
    """Two services that fail are named in one message."""
    found = combine([("model", Unreachable("silence")), ("data", kind("no"))])
    assert (type(found), str(found)) == (kind, "model: silence; data: no")


def test_the_most_serious_code_wins_in_any_order() -> None:
    """Codes that no retry helps outweigh those that count, these 69, and that 75; the order of the ends is nothing."""
    weight = {"no": 3, "counts against the limit": 2, "yes": 1, "yes, free": 0}
    table = exit_codes()
    for one, other in permutations(table, 2):
        assert most_serious([one, other]) == most_serious([other, one])
        assert weight[table[most_serious([one, other])][1]] == max(weight[table[code][1]] for code in (one, other))
    assert most_serious(table) == 2


def test_all_checks_are_made() -> None:
    """What they raise is one error of the most serious kind; a run that has to stop makes no further check."""
    made = list[str]()

    def check(name: str, error: JobError | None = None) -> tuple[str, Callable[[], None]]:
        def work() -> None:
            made.append(name)
            if error is not None:
                raise error

        return name, work

    wrong = SettingsError([Problem("JOB_TRAIN__EPOCHS", "bad")])
    with pytest.raises(SettingsError) as caught:
        check_all([check("rows", data_error(2)), check("good"), check("settings", wrong)])
    assert (caught.value.total, made) == (3, ["rows", "good", "settings"])
    with pytest.raises(Preempted):
        check_all([check("settings", wrong), check("stop", Preempted("stop")), check("never")])
    assert made[-1] == "stop"
    check_all([check("good")])


def test_a_place_is_named_by_its_setting() -> None:
    """The path follows the setting; errors that are not about data pass as they are."""
    with pytest.raises(DataError, match=r"^JOB_DATA__SOURCE: /x does not exist$"), named_by("JOB_DATA__SOURCE"):
        raise DataError([Problem("/x", "does not exist")])
    with pytest.raises(DataError, match=r"^S: /x no\n\.\.\. and 1 more\nmend$"), named_by("S"):
        raise DataError([Problem("/x", "no")], 2, "mend")
    with pytest.raises(SettingsError, match=r"^JOB_MODEL__ID: s3://b: no$"), named_by("JOB_MODEL__ID", ": "):
        raise SettingsError([Problem("s3://b", "no")])
    with pytest.raises(Unreachable, match=r"^silence$"), named_by("JOB_DATA__SOURCE"):
        raise Unreachable("silence")
