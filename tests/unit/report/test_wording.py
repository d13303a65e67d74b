"""Wording of verdicts and numbers: no stronger than the statistics, and formatted for people."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.common import formatting
from job.report import wording
from job.results.summary import verdict_in_words
from tests.example_run import answers, evidence, results
from tests.published_run import publish_run


def run(**counts: tuple[int, int]) -> dict[str, Any]:
    """A manifest with so many of 400 questions better and worse in each task; its base is quantized."""
    return results(evidence(**{name: answers(*changes, 400) for name, changes in counts.items()}))


def judged(verdict: str, left: str | None = None, *, quantization: str = "nf4") -> dict[str, Any]:
    """What a headline needs of a manifest: the verdicts against the base and, if given, against the unquantized one."""
    original = {"arc_easy": {"adapter_versus_original": {"acc": {"verdict": left}}}}
    evaluation: dict[str, Any] = {"tasks": {"arc_easy": {"verdict": verdict}}}
    if left is not None:
        evaluation["full_precision"] = {"tasks": original}
    return {"model": {"quantization": quantization}, "evaluation": evaluation}


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_difference_is_claimed_only_where_it_is_shown(improved: int, regressed: int) -> None:
    """`Better` and `worse` are the verdicts of the statistics; everything else is no difference shown."""
    found = _verdict(improved, regressed)
    ((verdict, sentence),) = wording.headline(judged(found))
    start = {"improved": "Better than", "regressed": "Worse than", "inconclusive": "No difference shown"}
    assert sentence.startswith(start[verdict])
    assert verdict == found


def _verdict(improved: int, regressed: int) -> str:
    from job.evaluation.statistics import compare

    before = [False] * improved + [True] * regressed + [True] * 100
    after = [True] * improved + [False] * regressed + [True] * 100
    return compare(before, after).verdict


def test_several_tasks_are_told_apart() -> None:
    """One sentence a verdict, naming up to three tasks and counting more."""
    found = run(one=(60, 0), two=(0, 60), three=(0, 0), four=(60, 1))
    assert wording.headline(found) == [
        ("improved", "Better than its quantized base on one and four."),
        ("regressed", "Worse than its quantized base on two."),
        ("inconclusive", "No difference shown on three."),
    ]
    found["model"]["quantization"] = "none"
    one, three = (found["evaluation"]["tasks"][name] for name in ("one", "three"))
    found["evaluation"]["tasks"] = {f"task{number}": one for number in range(5)} | {"last": three}
    assert wording.headline(found)[0][1] == "Better than its base on 5 of 6 tasks."


def test_the_headline_is_about_what_was_scored() -> None:
    """Questions of JOB_EVAL__DATA are named by their file; tasks without choices by their metric if these differ."""
    found = judged("improved")
    found["settings"] = {"eval.data": {"value": {"arc_easy": "/data/ours.jsonl"}}}
    assert wording.headline(found) == [
        ("improved", "Better than its quantized base on arc_easy (questions of ours.jsonl).")
    ]
    metrics = {name: {"verdict": "inconclusive"} for name in ("exact_match", "f1")}
    found["evaluation"] = {"tasks": {}, "measured": {"sums": {"num_fewshot": 5, "metrics": metrics}}}
    assert wording.headline(found) == [("inconclusive", "No difference shown on sums.")]
    assert "without examples" not in wording.scope(found["evaluation"])
    metrics["f1"] = {"verdict": "regressed"}
    assert wording.headline(found) == [
        ("regressed", "Worse than its quantized base on sums by f1."),
        ("inconclusive", "No difference shown on sums by exact_match."),
    ]


@pytest.mark.parametrize(
    ("counts", "holds", "expected"),
    [
        ((0, 0), True, "No question is a near tie (two likeliest choices at most 0.44 nats apart, which rounding in "),
        (
            (1200, 3),
            True,
            "are 1,200 of the base's answers and 3 of the adapter's. Depending on them, the difference is ",
        ),
        (
            (3, 3),
            True,
            "the difference is between \N{MINUS SIGN}1.50 and +4.25 points; in the worst case the verdict holds.",
        ),
        (
            (3, 3),
            False,
            "points; in the worst case the verdict would not hold.",
        ),
    ],
    ids=str,
)
def test_near_ties_are_told_in_a_sentence(counts: tuple[int, int], expected: str, *, holds: bool) -> None:
    """How many questions rounding may decide, how far that could move the difference, and whether the verdict holds."""
    ends = {"lowest": {"delta": -0.015}, "highest": {"delta": 0.0425}}
    acc = {**dict(zip(("base", "adapter"), counts, strict=True)), **ends, "holds": holds}
    found = {"evaluation": {"near_ties": {"dtype": "bf16", "bound": 0.44, "tasks": {"quiz": {"acc": acc}}}}}
    (sentence,) = wording.near_ties("quiz", found)
    assert expected in sentence
    assert wording.near_ties("quiz", {"evaluation": {}}) == []


def test_a_verdict_is_explained_by_its_numbers() -> None:
    """Both accuracies, the difference with its interval, the counts, and the p value that was tested."""
    made = run(arc_easy=(60, 10))
    task = made["evaluation"]["tasks"]["arc_easy"]
    first, second = wording.explanation("arc_easy", made)
    assert formatting.percent(task["base"]["acc"]) in first
    assert formatting.percent(task["adapter"]["acc"]) in first
    assert f"+12.50 percentage points (95 % interval {formatting.points(task['ci95'][0])} to" in first
    assert second.startswith("60 questions got better and 10 worse;")
    assert f"p = {formatting.p_value(task['holm_p'])} (exact McNemar test)." in second
    three = run(arc_easy=(60, 10), piqa=(1, 0), boolq=(1, 0))
    assert "Holm's correction for 3 tasks" in wording.explanation("arc_easy", three)[1]


def test_what_was_not_shown_is_not_called_absent() -> None:
    """Without a verdict the reader is told what the test could have found; without a change, that there was none."""
    made = run(some=(5, 4), none=(0, 0))
    *_, last = wording.explanation("some", made)
    assert last.startswith("That is not the same as no difference")
    least = f"{100 * made['evaluation']['tasks']['some']['minimum_detectable_effect']:.2f}"
    assert f"a true difference of {least} points" in last
    assert "No question" in wording.explanation("none", made)[1]


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


@pytest.mark.parametrize("pair", wording._SENTENCES_FOR_BOTH)
def test_a_recovered_loss_is_never_called_an_improvement(pair: tuple[str, str]) -> None:
    """Only a model that is better than its quantized and its unquantized base has the verdict improved."""
    found = judged(*pair)
    ((verdict, sentence),) = wording.headline(found)
    assert (verdict == "improved") == (pair == ("improved", "improved"))
    assert verdict == "regressed" if pair[0] == "regressed" else verdict != "regressed"
    assert "arc_easy" in sentence
    assert "quantized" in sentence
    assert ("improved" in verdict_in_words(*pair, quantized=True)) == (pair == ("improved", "improved"))


@pytest.mark.parametrize("verdict", ["improved", "regressed", "inconclusive"])
def test_without_the_unquantized_base_a_gain_is_one_on_the_quantized_base(verdict: str) -> None:
    """Headline and last line name the base that was compared with; a base that is not quantized is just the base."""
    quantized, plain = judged(verdict), judged(verdict, quantization="none")
    assert verdict_in_words(verdict, None, quantized=False) == verdict
    assert ("quantized" in verdict_in_words(verdict, None, quantized=True)) == (verdict == "improved")
    assert "quantized" not in wording.headline(plain)[0][1]
    assert ("quantized" in wording.headline(quantized)[0][1]) == (verdict != "inconclusive")


@pytest.fixture(scope="module")
def three_arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of 200 questions quantization lost 30, and training won 12 of them back."""
    folder = tmp_path_factory.mktemp("three") / "run"
    right = [(number >= 12, True) if number < 12 else (number >= 30,) * 2 for number in range(200)]
    publish_run(folder, {"quiz": right}, original={"quiz": [True] * 200})
    made: dict[str, Any] = json.loads((folder / "results.json").read_bytes())
    return made


def test_cost_gain_and_rest_are_told_with_their_intervals(three_arms: dict[str, Any]) -> None:
    """Every figure of the sentences is the manifest's: what quantization cost, training gave, and what is left."""
    first, second, last = wording.quantization_cost("quiz", three_arms)
    one, gain = three_arms["evaluation"]["full_precision"]["tasks"]["quiz"], three_arms["evaluation"]["tasks"]["quiz"]

    def figures(found: dict[str, Any]) -> list[str]:
        return [f"{abs(100 * value):.2f}" for value in sorted((found["delta"], *found["ci95"]), key=abs)]

    told = re.findall(r"\d+\.\d\d", second)
    cost, left = (figures(one[f"{side}_versus_original"]["acc"]) for side in ("base", "adapter"))
    expected = [figure for low, mid, high in (cost, figures(gain), left) for figure in (mid, low, high)]
    assert told == expected
    assert first == "Unquantized, the base answers 100.00\N{NO-BREAK SPACE}% right."
    assert re.fullmatch(
        r"Quantization to NF4 cost 15\.00 points \(95 % interval .* to .*\); training gained 6\.00 points \(.*\); "
        r"the adapter is 9\.00 points below the unquantized base \(.*\)\.",
        second,
    )
    assert last == "Training regained only a part of what quantization cost."


def test_a_change_that_is_not_shown_is_told_with_signs() -> None:
    """An interval with zero in it has bounds with signs, negated for a loss, and the words that nothing is shown."""
    pair = {"delta": -0.01, "ci95": [-0.03, 0.02], "verdict": "inconclusive"}
    gain = {"delta": 0.0, "ci95": [-0.01, 0.01], "verdict": "inconclusive"}
    one = {"scores": {"acc": 0.5}, "base_versus_original": {"acc": pair}, "adapter_versus_original": {"acc": gain}}
    made = {
        "model": {"quantization": "nf4"},
        "evaluation": {"tasks": {"quiz": gain}, "full_precision": {"tasks": {"quiz": one}}},
    }
    _, said = wording.quantization_cost("quiz", made)
    assert said == (
        "Quantization to NF4 cost 1.00 points (95 % interval \N{MINUS SIGN}2.00 to +3.00, no difference shown); "
        "training changed accuracy by 0.00 points (\N{MINUS SIGN}1.00 to +1.00, no difference shown); "
        "the adapter is 0.00 points from the unquantized base (\N{MINUS SIGN}1.00 to +1.00, no difference shown)."
    )
    made["evaluation"]["full_precision"] = {"not_scored": "it takes 2 GiB", "tasks": {}}
    (why,) = wording.quantization_cost("quiz", made)
    assert why.endswith("since the unquantized base was not scored: it takes 2 GiB.")
