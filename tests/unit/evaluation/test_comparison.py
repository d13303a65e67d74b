"""Comparison and gate: figures computed from the answers, and a gate that uses the confidence interval."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.evaluation import comparison, statistics
from job.evaluation.policy import Policy
from tests.helpers import task_scores as scores

ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


def compared(improved: int, regressed: int, n: int = 1000) -> dict[str, Any]:
    """`evaluation.tasks` of a manifest in which so many questions got better and worse, by both metrics."""
    before = [False] * improved + [True] * (n - improved)
    after = [True] * improved + [False] * regressed + [True] * (n - improved - regressed)
    return comparison.compare_tasks({"t": scores("t", before, after)}, {"t": scores("t", after, before)})


@given(ANSWERS, ANSWERS)
def test_tasks_are_compared_by_the_statistics(one: list[tuple[bool, bool]], two: list[tuple[bool, bool]]) -> None:
    """Every figure of a task is `statistics.compare`'s on its answers; p values are Holm's over the tasks."""
    pairs = {"one": one, "two": two}
    base = {name: scores(name, [before for before, _ in answers]) for name, answers in pairs.items()}
    adapter = {name: scores(name, [after for _, after in answers]) for name, answers in pairs.items()}
    tasks = comparison.compare_tasks(base, adapter)
    expected = {name: statistics.compare(base[name].correct, adapter[name].correct) for name in pairs}
    corrected = statistics.holm([expected[name].mcnemar_p for name in pairs])
    for (name, task), holm_p in zip(tasks.items(), corrected, strict=True):
        same = ("delta", "ci95", "mcnemar_p", "improved", "regressed", "minimum_detectable_effect", "n")
        assert [task[key] for key in same] == [getattr(expected[name], key) for key in same]
        assert task["holm_p"] == holm_p
        assert task["verdict"] == statistics.verdict(holm_p, expected[name].ci95)
        assert (task["base"]["acc"], task["adapter"]["acc"]) == (expected[name].base, expected[name].adapter)
        assert task["acc_norm"] is None


def test_a_verdict_holds_for_all_tasks_at_once() -> None:
    """What is significant alone need not be among several tasks: the word is about the corrected p."""
    before, after = [False] * 8 + [True] * 92, [True] * 8 + [False] + [True] * 91
    base, adapter = scores("x", before), scores("x", after)
    alone = comparison.compare_tasks({"a": base}, {"a": adapter})["a"]
    among = comparison.compare_tasks(dict.fromkeys("abc", base), dict.fromkeys("abc", adapter))["a"]
    assert alone["mcnemar_p"] == among["mcnemar_p"] < 0.05
    assert alone["verdict"] == "improved"
    assert among["holm_p"] == pytest.approx(3 * alone["mcnemar_p"])
    assert among["verdict"] == "inconclusive"


def test_examples_in_the_prompts_are_recorded() -> None:
    """Their number where there are any; a task without examples has no such field."""
    found = scores("t", [True, False])
    (task,) = comparison.compare_tasks({"t": found}, {"t": replace(found, num_fewshot=5)}).values()
    assert task["num_fewshot"] == 5
    assert "num_fewshot" not in comparison.compare_tasks({"t": found}, {"t": found})["t"]


def test_acc_norm_is_compared_apart() -> None:
    """The second metric has its own comparison, and its own correction, over the tasks that have it."""
    task = compared(improved=40, regressed=10)["t"]
    assert (task["improved"], task["regressed"]) == (40, 10)
    assert (task["acc_norm"]["improved"], task["acc_norm"]["regressed"]) == (10, 40)
    assert task["acc_norm"]["delta"] == -task["delta"]
    assert task["acc_norm"]["holm_p"] == task["mcnemar_p"]


def test_no_gate_is_no_verdict() -> None:
    """Where nothing was asked for, there is nothing to pass."""
    assert comparison.gate_failures(compared(0, 500), "acc", None, None) is None


@given(st.integers(0, 100), st.integers(0, 100), st.floats(-0.1, 0.1))
def test_the_gate_asks_the_interval_for_the_gain(improved: int, regressed: int, least: float) -> None:
    """It passes exactly where the whole interval is at or above the gain that was asked for."""
    tasks = compared(improved, regressed)
    reasons = comparison.gate_failures(tasks, "acc", least, None)
    assert (reasons == []) is (tasks["t"]["ci95"][0] >= least)


@given(st.integers(0, 100), st.integers(0, 100), st.floats(0, 0.1))
def test_the_gate_asks_the_interval_for_the_loss(improved: int, regressed: int, most: float) -> None:
    """It passes exactly where no loss greater than the allowed one is within the interval."""
    tasks = compared(improved, regressed)
    reasons = comparison.gate_failures(tasks, "acc", None, most)
    assert (reasons == []) is (-tasks["t"]["ci95"][0] <= most)


def test_a_point_above_the_gate_is_not_enough() -> None:
    """A gain that may be chance does not pass, though its point lies above what was asked for."""
    tasks = compared(improved=12, regressed=8)
    assert tasks["t"]["delta"] == pytest.approx(0.004)
    (reason,) = comparison.gate_failures(tasks, "acc", 0.0, None) or []
    assert reason.startswith("t: acc may have gained only -0.00")
    assert reason.endswith("the gate requires +0.0000")


def test_the_gate_looks_at_the_metric_it_was_told() -> None:
    """A gain in one metric does not pass for the other; a task that lacks the metric does not pass."""
    tasks = compared(improved=80, regressed=0)
    assert comparison.gate_failures(tasks, "acc", 0.01, 0.0) == []
    reasons = comparison.gate_failures(tasks, "acc_norm", 0.01, 0.0) or []
    assert len(reasons) == 2
    assert "may have lost 0.09" in reasons[1]
    tasks["t"]["acc_norm"] = None
    assert comparison.gate_failures(tasks, "acc_norm", None, 0.5) == ["t has no acc_norm"]


def test_a_task_with_several_metrics_of_the_name_is_not_left_out() -> None:
    """`exact_match` of a task with two filters could be either: the gate does not pass without it."""
    gained = {"higher_is_better": True, "ci95": (0.1, 0.2)}
    one = {"kind": "generate_until", "metrics": {"exact_match,none": gained}}
    two = {"kind": "generate_until", "metrics": {"exact_match,strict": gained, "exact_match,loose": gained}}
    assert comparison.gate_failures({"one": one}, "exact_match", 0.0, None) == []
    reasons = comparison.gate_failures({"one": one, "two": two}, "exact_match", 0.0, None)
    assert reasons == ["two has several metrics exact_match"]
    assert comparison.gate_failures({"one": one, "two": two}, "exact_match,strict", 0.0, None) == []


def test_one_task_below_the_gate_is_enough() -> None:
    """All tasks have to pass; those that do not are named."""
    tasks = {"good": compared(80, 0)["t"], "bad": compared(0, 80)["t"]}
    (reason,) = comparison.gate_failures(tasks, "acc", None, 0.01) or []
    assert reason.startswith("bad: ")


def test_the_record_of_the_gate() -> None:
    """It holds the thresholds and the reasons; a gate that was not set is told apart from one that was met."""
    tasks = compared(improved=80, regressed=0)
    unset = comparison.evaluate_gate(tasks, metric="acc", min_delta=None, max_regression=None)
    assert (unset["passed"], unset["reasons"], unset["baseline"]) == (None, [], None)
    met = comparison.evaluate_gate(tasks, metric="acc", min_delta=0.01, max_regression=None)
    assert (met["passed"], met["min_delta"], met["reasons"]) == (True, 0.01, [])
    assert comparison.evaluate_gate(tasks, metric="acc", min_delta=0.5, max_regression=None)["passed"] is False


def test_the_gate_of_a_policy_is_met_by_its_rules() -> None:
    """The record has the policy's verdict; reasons name what was judged, where that is not the adapter."""
    policy = Policy.model_validate({"tasks": {"t": {"role": "critical", "min_gain": 0.0}}})
    asked: dict[str, Any] = {"metric": "acc", "min_delta": None, "max_regression": None, "policy": policy}
    met = comparison.evaluate_gate(compared(improved=80, regressed=0), **asked)
    assert (met["passed"], met["reasons"], met["policy"]["outcome"]) == (True, [], "passed")
    missed = comparison.evaluate_gate(compared(improved=0, regressed=80), **asked, on="merged")
    assert (missed["passed"], missed["on"], missed["policy"]["outcome"]) == (False, "merged", "failed")
    assert [reason.partition(": ")[0] for reason in missed["reasons"]] == ["merged, t"]


def test_the_gate_looks_back_to_a_baseline() -> None:
    """Where there is an earlier run, the thresholds are about the difference from it, not from the base model."""
    gain, loss = compared(improved=80, regressed=0), compared(improved=0, regressed=80)
    assert comparison.evaluate_gate(gain, metric="acc", min_delta=None, max_regression=0.01)["passed"] is True
    record = comparison.evaluate_gate(gain, metric="acc", min_delta=None, max_regression=0.01, baseline={"tasks": loss})
    assert record["passed"] is False
    assert record["baseline"] == {"tasks": loss}


def test_an_export_is_compared_with_each_of_the_others() -> None:
    """Its figures less the other's: of 20 questions it has 12 right, the others 8, 14 and 16."""
    base, adapter, exported, original = (
        {"quiz": scores("quiz", [n < right for n in range(20)])} for right in (8, 14, 12, 16)
    )
    found = comparison.compare_export(base, adapter, exported, original)["quiz"]
    assert (found["n"], found["scores"]["acc"]) == (20, 0.6)
    for name, delta, improved, regressed in (("base", 0.2, 4, 0), ("adapter", -0.1, 0, 2), ("original", -0.2, 0, 4)):
        acc = found[f"versus_{name}"]["acc"]
        assert acc["delta"] == pytest.approx(delta)
        assert (acc["improved"], acc["regressed"]) == (improved, regressed)
    assert "versus_original" not in comparison.compare_export(base, adapter, exported)["quiz"]


@pytest.mark.parametrize(
    ("right", "best", "reason"),
    [
        (
            {"original": (7, 5), "dequantized": (8, 3)},
            "original",
            "the higher accuracy: original 60.00 %, dequantized 55.00 %",
        ),
        (
            {"original": (8, 4), "dequantized": (7, 5)},  # as floats the first mean is above the second by rounding
            "dequantized",
            "the same accuracy (original 60.00 %, dequantized 60.00 %), and the adapter was trained on",
        ),
        (
            {"one": (1, 1), "two": (2, 2), "three": (2, 2)},
            "two",
            "the same accuracy (one 10.00 %, two 20.00 %, three 20.00 %)",
        ),
    ],
)
def test_the_candidate_of_the_highest_mean_is_published(
    right: dict[str, tuple[int, int]], best: str, reason: str
) -> None:
    """Over two tasks of ten questions; of equal ones what the adapter was trained on, else the first."""
    found = {
        name: {task: scores(task, [n < count for n in range(10)]) for task, count in zip("ab", counts, strict=True)}
        for name, counts in right.items()
    }
    chosen, why = comparison.choose_candidate(found)
    assert chosen == best
    assert why.startswith(reason)


def test_questions_that_rows_have_are_left_out_of_a_second_comparison() -> None:
    """It is the comparison of the other questions alone; with fewer than two of them there is none."""
    base, adapter = [True, False, False, False, True, False], [True, True, True, False, True, False]
    scored = {"quiz": scores("quiz", base, adapter)}, {"quiz": scores("quiz", adapter, base)}
    whole = comparison.compare_tasks(*scored)["quiz"]
    found = comparison.compare_tasks(*scored, overlap={"quiz": [1, 2], "other": [0]})["quiz"]
    rest = found.pop("without_overlap")
    assert found == whole
    assert (rest["n"], rest["base"]["acc"], rest["adapter"]["acc"]) == (4, 0.5, 0.5)
    assert (rest["improved"], rest["regressed"], rest["delta"]) == (0, 0, 0.0)
    assert (rest["base"]["acc_norm"], rest["acc_norm"]["delta"]) == (0.5, 0.0)
    assert comparison.compare_tasks(*scored, overlap={"quiz": [0, 1, 2, 3, 4]})["quiz"]["without_overlap"] is None
    assert "without_overlap" not in comparison.compare_tasks(*scored, overlap={"quiz": []})["quiz"]
