"""The outcome of a run is read from its manifest once; its text and its values agree."""

from __future__ import annotations

import copy
from dataclasses import asdict
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


def _figures(at: int, verdict: str, **more: Any) -> dict[str, Any]:
    """Figures of a comparison, of which no two are alike."""
    return {
        "base": at / 100,
        "adapter": (at + 6) / 100,
        "delta": round(0.06 + at / 10_000, 4),
        "ci95": [round(end + at / 10_000, 4) for end in (0.01, 0.09)],
        "verdict": verdict,
        "improved": at + 1,
        "regressed": at + 2,
        "p": at / 1000,
        **more,
    }


def _scores(acc: float, delta: float) -> dict[str, Any]:
    """The entry of a task in an exported format's candidate."""
    return {
        "scores": {"acc": acc, "acc_norm": 0.999},
        "versus_base": {"acc": {"delta": 0.999}},
        "versus_adapter": {"acc": {"delta": delta}},
    }


def _export(name: str, **more: Any) -> dict[str, Any]:
    """An entry of `exports` in a manifest, with the answers of one candidate."""
    scored = {"original": {"arc": _scores(0.7, -0.02)}}
    return {"format": name, "candidate": "original", "reason": "as set", "candidates": scored} | more


@pytest.fixture
def full() -> dict[str, Any]:
    """The parts of a manifest that an outcome is read from, written by hand: no two figures are alike."""
    by_acc = {"acc": _figures(50, "improved", n=1200, tasks=2, weight_by_size=False)}
    side = {"acc_norm": 0.999}
    arc = _figures(20, "improved", n=200, mcnemar_p=0.021, holm_p=0.999) | {
        "base": {**side, "acc": 0.2},
        "adapter": {**side, "acc": 0.26},
    }
    versus = {
        "base_versus_original": {"acc": {"delta": -0.03, "ci95": [-0.05, -0.01], "verdict": "regressed"}},
        "adapter_versus_original": {"acc": {"delta": 0.04, "ci95": [-0.02, 0.1], "verdict": "inconclusive"}},
    }
    original = {"arc": {"scores": {"acc": 0.23, "acc_norm": 0.999}, **versus}}
    chat = _figures(30, "regressed", higher_is_better=True, aggregation="weighted_perplexity")
    both = {"original": {"arc": _scores(0.71, -0.01)}, "dequantized": {"arc": _scores(0.74, 0.02)}}
    rule = {"task": "arc", "role": "critical", "kind": "min_gain", "outcome": "met", "n": 200, "threshold": 0.01}
    rule |= {"found": 0.062, "holm_p_met": 0.003, "holm_p_missed": 0.999}
    paths = ("report.html", "adapter/adapter_model.safetensors", "export/adapter-bf16/x", "export/awq/x")
    return {
        "model": {"id": "org/base", "quantization": "nf4"},
        "training": {
            "steps": 1,
            "loss": 1.25,
            "tokens_per_second": 4321.0,
            "method": "dpo",
            "beta": 0.25,
            "preference": {"rewards/margins": 0.5, "rewards/accuracies": 0.75, "rewards/chosen": 0.9},
            "validation": {"first_loss": 2.0, "last_loss": 1.5, "best_loss": 1.4, "best_step": 0, "count": 9}
            | {"keep": "last", "stopped_early": False},
        },
        "dataset": {"rows": 80, "skipped": {"empty": 2, "too_long": 3}},
        "evaluation": {
            "groups": {"exams": {"tasks": ["law", "tax"], "metrics": by_acc}},
            "tasks": {"arc": arc},
            "measured": {"chat": {"n": 40, "metrics": {"word_perplexity": chat}}},
            "full_precision": {"tasks": original},
        },
        "gate": {"passed": False, "policy": {"rules": [rule], "outcome": "met"}},
        "settings": {"eval.data": {"value": {"chat": "s3://bucket/in/ours.jsonl"}}},
        "exports": [
            _export("merged", candidates=both, published=False),
            _export("adapter:bf16"),
            _export("awq", not_scored="no reader"),
            _export("gptq", not_made="unknown family", published=False),
        ],
        "run": {"attempts": [{}, {}]},
        "cost": {"seconds": 3700.0, "wasted_seconds": 90.0, "usd": 0.75, "energy_kwh": 0.5},
        "artifacts": [{"path": f"artifacts/{path}"} for path in paths],
    }


def test_every_figure_has_its_place(full: dict[str, Any]) -> None:
    """All lines of a run with each kind of figure, and all values: a figure in the place of another is found."""
    outcome = read_outcome(full, "/x")
    assert outcome_lines(outcome) == [
        "org/base + LoRA, 1 step on 80 examples (5 rows left out), loss 1.250, 4,321 target tokens/s",
        "validation loss 2.000 -> 1.500, lowest 1.400 after step 0; the last step's adapter is published",
        "dpo, beta 0.25; rewards in the last epoch: margins 0.500, accuracies 0.750",
        (
            "exams, 2 tasks, 1,200 questions, all tasks weighing the same: acc 0.5 -> 0.56 (+0.065, 95 % interval "
            "+0.015 to +0.095), improved against the quantized base, 51 better and 52 worse, p = 0.05"
        ),
        "arc, 200 questions: accuracy 20.00 % -> 26.00 % (+6.20, 95 % interval +1.20 to +9.20)",
        "verdict against the quantized base: improved, 21 questions better and 22 worse, McNemar p = 0.021",
        (
            "chat (questions of ours.jsonl), 40 questions: word_perplexity 0.3 -> 0.36 (higher is better; ln of the "
            "ratio +0.063, 95 % interval +0.013 to +0.093), regressed against the quantized base, 31 better and 32 "
            "worse, p = 0.03"
        ),
        (
            "arc, unquantized base: 23.00 %; quantization -3.00 (-5.00 to -1.00, regressed), adapter against it +4.00 "
            "(-2.00 to +10.00, inconclusive)"
        ),
        (
            "merged: arc onto original weights 71.00 % (-1.00 against the adapter); arc onto dequantized weights "
            "74.00 % (+2.00 against the adapter); not published, but the source of other formats: original (as set)"
        ),
        "adapter:bf16: arc 70.00 % (-2.00 against the adapter); published",
        "awq: published, not scored: no reader",
        "gptq: not published, since its export failed: unknown family",
        "1 h 1 min in 2 attempts, $0.75, 0.50 kWh of the GPU; 1 min 30 s of it wasted",
        "report: /x/artifacts/report.html",
        "policy: arc (critical), a gain above +0.0100 is shown (difference +0.0620, p = 0.003 after Holm)",
        "policy: met",
        (
            "exams acc improved against the quantized base, arc better than the quantized base but not shown to be "
            "better than the unquantized one, chat (questions of ours.jsonl) word_perplexity regressed against the "
            "quantized base, gate not met, policy met; results: /x/results.json"
        ),
    ]
    values = asdict(outcome_values(outcome))
    shown = [tuple(one.values()) for one in values.pop("comparisons")]
    assert shown == [
        ("exams", "acc", 1200, 0.5, 0.56, 0.065, (0.015, 0.095), 0.05, "improved"),
        ("arc", "acc", 200, 0.2, 0.26, 0.062, (0.012, 0.092), 0.021, "improved"),
        ("chat", "word_perplexity", 40, 0.3, 0.36, 0.063, (0.013, 0.093), 0.03, "regressed"),
    ]
    assert values == {
        "attempts": 2,
        "seconds": 3700.0,
        "usd": 0.75,
        "energy_kwh": 0.5,
        "results": "/x/results.json",
        "report": "/x/artifacts/report.html",
        "adapter": "/x/artifacts/adapter",
        "exports": {"adapter:bf16": "/x/artifacts/export/adapter-bf16", "awq": "/x/artifacts/export/awq"},
    }


@pytest.mark.parametrize(
    ("part", "change", "said", "unsaid"),
    [
        ("dataset", {"skipped": {"empty": 1}}, "(1 row left out)", "rows left out"),
        ("dataset", {"skipped": {}}, "80 examples, loss", "left out"),
        ("training", {"tokens_per_second": None}, "loss 1.250, 0 target tokens/s", "None"),
        ("training", {"validation": {"best_step": None}}, "dpo, beta", "validation loss"),
        ("cost", {"usd": 0.0}, "2 attempts, $0.00, 0.50 kWh", "None"),
        ("cost", {"usd": None, "energy_kwh": None}, "1 h 1 min in 2 attempts; 1 min 30 s of it wasted", "None"),
        ("run", {"attempts": [{}]}, "1 h 1 min in 1 attempt, $0.75", "wasted"),
        ("gate", {"passed": None}, "policy met", "gate"),
        ("gate", {"passed": True}, "gate met", "gate not met"),
        ("evaluation", {"full_precision": {"not_scored": "no room", "tasks": {}}}, "not scored: no room", "23.00 %"),
        ("report", {}, "results: /x/results.json", "report: "),
    ],
)
def test_what_a_run_lacks_is_not_told(full: dict[str, Any], part: str, change: Any, said: str, unsaid: str) -> None:
    """Nothing left out, no price, no gate, one attempt, no unquantized base: no words for them, none made up."""
    if part == "report":
        full["artifacts"][0]["path"] = "artifacts/report.html.old"
    else:
        full[part] |= change
    text = "\n".join(outcome_lines(read_outcome(full, "/x")))
    assert said in text
    assert unsaid not in text


@pytest.mark.parametrize(
    ("verdict", "against_original", "words"),
    [
        ("improved", "improved", "improved"),
        ("improved", "regressed", "better than the quantized base but worse than the unquantized one"),
        ("inconclusive", "improved", "inconclusive against the quantized base but better than the unquantized one"),
        ("inconclusive", "regressed", "inconclusive against the quantized base and worse than the unquantized one"),
        ("regressed", "improved", "worse than the quantized base but better than the unquantized one"),
        ("regressed", "inconclusive", "worse than the quantized base and inconclusive against the unquantized one"),
    ],
)
def test_the_last_line_has_the_verdict_against_both_bases(
    full: dict[str, Any], verdict: str, against_original: str, words: str
) -> None:
    """A gain on the quantized base alone, or a loss that only the quantized base hides, is told as that."""
    evaluation = full["evaluation"]
    evaluation["tasks"]["arc"]["verdict"] = verdict
    evaluation["full_precision"]["tasks"]["arc"]["adapter_versus_original"]["acc"]["verdict"] = against_original
    assert f", arc {words}, chat " in outcome_lines(read_outcome(full, "/x"))[-1]


def test_metrics_of_a_groups_tasks_are_not_in_the_last_line(full: dict[str, Any]) -> None:
    """The group speaks for them, whichever kind of task they are."""
    full["evaluation"]["groups"]["exams"]["tasks"] = ["arc", "chat"]
    assert outcome_lines(read_outcome(full, "/x"))[-1].startswith(
        "exams acc improved against the quantized base, gate not met, "
    )
