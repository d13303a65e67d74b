"""The outcome of a run is read from its manifest once; its words and its values say the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from job.report.wording import without_overlap
from job.results.outcome import outcome_values, read_outcome
from job.results.summary import outcome_lines
from tests.unit.results.test_manifest import built

FIGURES = {
    "base": 0.5,
    "adapter": 0.625,
    "delta": 0.125,
    "ci95": [0.0625, 0.1875],
    "p": 0.01,
    "verdict": "improved",
    "improved": 30,
    "regressed": 5,
    "higher_is_better": True,
}
GROUP = {**FIGURES, "weight_by_size": True, "tasks": 2, "n": 1200}
PERPLEXITY = {**FIGURES, "higher_is_better": False, "aggregation": "perplexity"}


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """A manifest with everything that an outcome may have."""
    results = copy.deepcopy(built())
    results["evaluation"] |= {
        "groups": {"exams": {"version": 1, "tasks": ["arc_easy"], "metrics": {"acc": GROUP}}},
        "measured": {"chat": {"n": 40, "metrics": {"perplexity": PERPLEXITY}}},
    }
    overlap = {"n": 150, "delta": 0.1, "verdict": "inconclusive"}
    results["evaluation"]["tasks"]["arc_easy"]["without_overlap"] = overlap
    results["dataset"]["audit"] = {"overlap": {"arc_easy": list(range(50))}}
    losses = {"first_loss": 2.0, "last_loss": 1.5, "best_loss": 1.25, "best_step": 4}
    results["training"] |= {
        "validation": losses | {"keep": "best", "stopped_early": True},
        "method": "dpo",
        "beta": 0.1,
        "preference": {"rewards/margins": 0.5},
        "first_stage": {"method": "sft", "steps": 9, "loss": 1.75, "run_seconds": 90.0, "usd": 0.5},
    }
    return results


def test_each_part_has_its_words(manifest: dict[str, Any]) -> None:
    """Validation, both stages, rewards, groups, metrics and questions that were trained on each have their line."""
    lines = outcome_lines(read_outcome(manifest, "/x"))
    assert lines[1:5] == [
        "validation loss 2.000 -> 1.500, lowest 1.250 after step 4; its adapter is published; stopped early",
        "before that 9 steps of sft, loss 1.750; this took 1 min 30 s, $0.50, in addition to the time below",
        "dpo, beta 0.1; rewards in the last epoch: margins 0.500",
        (
            "exams, 2 tasks, 1,200 questions, all questions weighing the same: acc 0.5 -> 0.625 (+0.125, 95 % interval "
            "+0.0625 to +0.1875), improved against the quantized base, 30 better and 5 worse, p = 0.01"
        ),
    ]
    assert (
        "training rows contain 50 of these questions: +10.00 points on the other 150, inconclusive against the "
        "quantized base"
    ) in lines
    assert (
        "chat, 40 questions: perplexity 0.5 -> 0.625 (lower is better; ln of the ratio +0.125, 95 % interval +0.0625 "
        "to +0.1875), improved against the quantized base, 30 better and 5 worse, p = 0.01"
    ) in lines
    assert lines[-1] == (
        "exams acc improved against the quantized base, chat perplexity improved against the quantized base; "
        "results: /x/results.json"
    )


@pytest.mark.parametrize(("contained", "which"), [(200, "all"), (199, "all but one")])
def test_questions_that_were_trained_on_are_told_also_if_no_others_are_left(
    manifest: dict[str, Any], contained: int, which: str
) -> None:
    """No comparison without them is possible, so the accuracies would otherwise be read as if they were sound."""
    results = copy.deepcopy(manifest)
    results["evaluation"]["tasks"]["arc_easy"]["without_overlap"] = None
    results["dataset"]["audit"]["overlap"]["arc_easy"] = list(range(contained))
    said = f"raining rows contain {which} of these questions: the accuracies say little about other questions"
    assert f"t{said}" in outcome_lines(read_outcome(results, "/x"))
    assert without_overlap("arc_easy", results) == [f"T{said}."]


@pytest.mark.parametrize(("attempts", "whose"), [(1, "attempt 1 is that"), (3, "attempts 1 to 3 are those")])
def test_attempts_of_an_exported_run_are_told(manifest: dict[str, Any], attempts: int, whose: str) -> None:
    """One or several, since they are counted with the run's own."""
    exported = {"id": "trained", "results_sha256": "0" * 64, "attempts": attempts}
    lines = outcome_lines(read_outcome(manifest | {"run": manifest["run"] | {"exported_run": exported}}, "/x"))
    assert any(line.endswith(f"; {whose} of run trained, which this run exports") for line in lines)


def test_the_values_are_those_of_the_words(manifest: dict[str, Any]) -> None:
    """Groups come first, then tasks with choices, then metrics of the others."""
    values = outcome_values(read_outcome(manifest, "/x"))
    compared = [(comparison.name, comparison.metric, comparison.questions) for comparison in values.comparisons]
    assert compared == [("exams", "acc", 1200), ("arc_easy", "acc", 200), ("chat", "perplexity", 40)]
    assert (values.results, values.report, values.adapter, values.exports) == ("/x/results.json", None, None, {})


def test_a_published_candidate_without_scores_is_an_error(manifest: dict[str, Any]) -> None:
    """A copy of the adapter whose own scores are missing is not called published without them."""
    export = {"format": "adapter:bf16", "candidate": "original", "reason": "", "candidates": {"other": {}}}
    with pytest.raises(KeyError, match="original"):
        outcome_lines(read_outcome(manifest | {"exports": [export]}, "/x"))
