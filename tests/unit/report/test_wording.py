"""Words and figures for people: verdicts that say no more than the statistics, numbers as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.common import formatting
from job.report import wording
from tests.example_run import answers, evidence, results


def tasks(**counts: tuple[int, int]) -> dict[str, Any]:
    """`evaluation.tasks` with so many of 400 questions better and worse in each task."""
    found = evidence(**{name: answers(*changes, 400) for name, changes in counts.items()})
    evaluated: dict[str, Any] = results(found)["evaluation"]["tasks"]
    return evaluated


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_difference_is_claimed_only_where_it_is_shown(improved: int, regressed: int) -> None:
    """`Better` and `worse` are the verdicts of the statistics; everything else is no difference shown."""
    task = {"verdict": _verdict(improved, regressed)}
    ((verdict, sentence),) = wording.headline({"arc_easy": task})
    start = {"improved": "Better than", "regressed": "Worse than", "inconclusive": "No difference shown"}
    assert sentence.startswith(start[verdict])
    assert verdict == task["verdict"]


def _verdict(improved: int, regressed: int) -> str:
    from job.evaluation.statistics import compare

    before = [False] * improved + [True] * regressed + [True] * 100
    after = [True] * improved + [False] * regressed + [True] * 100
    return compare(before, after).verdict


def test_several_tasks_are_told_apart() -> None:
    """One sentence a verdict, naming up to three tasks and counting more."""
    found = tasks(one=(60, 0), two=(0, 60), three=(0, 0), four=(60, 1))
    assert wording.headline(found) == [
        ("improved", "Better than its base at one and four."),
        ("regressed", "Worse than its base at two."),
        ("inconclusive", "No difference shown at three."),
    ]
    many = {f"task{number}": found["one"] for number in range(5)}
    assert wording.headline({**many, "last": found["three"]})[0][1] == "Better than its base at 5 of 6 tasks."


def test_a_verdict_is_explained_by_its_numbers() -> None:
    """Both accuracies, the difference with its interval, the counts, and the p value that was tested."""
    task = tasks(arc_easy=(60, 10))["arc_easy"]
    first, second = wording.explanation("arc_easy", task, 1)
    assert formatting.percent(task["base"]["acc"]) in first
    assert formatting.percent(task["adapter"]["acc"]) in first
    assert f"+12.50 percentage points (95 % interval {formatting.points(task['ci95'][0])} to" in first
    assert second.startswith("60 questions got better and 10 worse;")
    assert f"p = {formatting.p_value(task['holm_p'])} (exact McNemar test)." in second
    assert "Holm's correction for 3 tasks" in wording.explanation("arc_easy", task, 3)[1]


def test_what_was_not_shown_is_not_called_absent() -> None:
    """Without a verdict the reader is told what the test could have found; without a change, that there was none."""
    found = tasks(some=(5, 4), none=(0, 0))
    *_, last = wording.explanation("some", found["some"], 2)
    assert last.startswith("That is not the same as no difference")
    least = f"{100 * found['some']['minimum_detectable_effect']:.2f}"
    assert f"a true difference of {least} points" in last
    assert "Not one question" in wording.explanation("none", found["none"], 2)[1]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formatting.percent(0.798), "79.80\N{NO-BREAK SPACE}%"),
        (formatting.points(0.0139), "+1.39"),
        (formatting.points(-0.0139), "\N{MINUS SIGN}1.39"),
        (formatting.p_value(0.0405), "0.041"),
        (formatting.p_value(1.0), "1.000"),
        (formatting.p_value(1.577e-50), "1.6 \N{MULTIPLICATION SIGN} 10⁻⁵⁰"),
        (formatting.p_value(0.0), "0"),
        (formatting.duration(12.345), "12.3\N{NO-BREAK SPACE}s"),
        (formatting.duration(59.96), "1 min 0 s"),
        (formatting.duration(250), "4 min 10 s"),
        (formatting.duration(7505), "2 h 5 min"),
        (formatting.size(218), "218\N{NO-BREAK SPACE}B"),
        (formatting.size(83_945_296), "80.1\N{NO-BREAK SPACE}MiB"),
        (formatting.size(2**50), "1024.0\N{NO-BREAK SPACE}TiB"),
        (formatting.figure(0.0002), "0.0002"),
        (formatting.figure(4354.3), "4,354"),
        (formatting.figure(1.0283), "1.028"),
        (formatting.figure(-2e-5), "\N{MINUS SIGN}2 \N{MULTIPLICATION SIGN} 10⁻⁵"),
        (formatting.figure(0), "0"),
        (formatting.dollars(1234.5), "$1,234.50"),
        (formatting.dollars(-0.5), "\N{MINUS SIGN}$0.50"),
        (formatting.dollars(None), "\N{EN DASH}"),
        (formatting.count(1, "step"), "1 step"),
        (formatting.count(2000, "step"), "2,000 steps"),
        (formatting.enumeration(["a"]), "a"),
        (formatting.enumeration(["a", "b", "c"]), "a, b and c"),
        (formatting.moment("2026-01-05T10:17:00.250Z"), "2026-01-05 10:17:00"),
        (formatting.moment("2026-01-05T12:17:00+02:00"), "2026-01-05 10:17:00"),
    ],
)
def test_numbers_as_people_write_them(written: str, expected: str) -> None:
    """Signs, thousands, units and powers; times in UTC."""
    assert written == expected


def test_the_time_between_attempts() -> None:
    """Seconds from end to start, never negative; not known where the end is not."""
    assert formatting.between("2026-01-05T09:05:00Z", "2026-01-05T10:00:00Z") == 3300
    assert formatting.between("2026-01-05T09:05:00Z", "2026-01-05T09:00:00Z") == 0
    assert formatting.between(None, "2026-01-05T09:00:00Z") is None


def test_validation_is_told_apart_from_the_test() -> None:
    """What the step was selected by, and what the accuracy is of; nothing where nothing was validated."""
    rows = {"rows": 28, "held_out": True, "duplicates": 0, "near_duplicates": 0}
    found = {
        "first_loss": 4.6,
        "last_loss": 1.2,
        "best_loss": 1.1,
        "best_step": 28,
        "kept_step": 28,
        "stale": 3,
        "planned_steps": 60,
        "stopped_early": True,
        "keep": "best",
    }
    training = {"steps": 40, "validation": found}
    said = " ".join(wording.validation(training, {"validation": rows}))
    assert "28 validation rows held out of the training data" in said
    assert "stopped after step 40 of 60, when 3 validations in a row" in said
    assert "of step 28, selected on validation; accuracy is reported on the test questions" in said
    said = " ".join(wording.validation({**training, "validation": found | {"kept_step": 0}}, {"validation": rows}))
    assert "The adapter is the adapter before training, selected" not in said
    assert "before training" in said
    own = rows | {"held_out": False, "duplicates": 2, "near_duplicates": 1}
    assert "3 of the validation rows are" in " ".join(wording.validation(training, {"validation": own}))
    assert wording.validation({"steps": 40}, {}) == []
    assert wording.validation({"steps": 40, "validation": None}, {"validation": None}) == []


@pytest.mark.parametrize("pair", wording._SAYS_OF_BOTH)
def test_a_recovered_loss_is_never_called_an_improvement(pair: tuple[str, str]) -> None:
    """Only a model that is better than its quantized and its unquantized base has the verdict improved."""
    original = {"arc_easy": {"adapter_versus_original": {"acc": {"verdict": pair[1]}}}}
    ((verdict, sentence),) = wording.headline({"arc_easy": {"verdict": pair[0]}}, {"tasks": original})
    assert (verdict == "improved") == (pair == ("improved", "improved"))
    assert "arc_easy" in sentence
    assert "unquantized" in sentence
