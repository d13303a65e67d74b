"""A gate's policy: every rule can fail, Holm's adjustment is statsmodels', and null runs pass at the nominal rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, t, ttest_1samp, ttest_ind

from job.errors import SettingsError
from job.evaluation.policy import Policy, check_policy, read_policy
from job.evaluation.policy_verdict import evaluate_policy, lines, passes, reasons, sentence
from job.evaluation.statistics import holm, one_sided_p, tango_interval


def task(n: int, improved: int, regressed: int) -> dict[str, Any]:
    """What a rule reads of a task in the manifest."""
    return {"n": n, "improved": improved, "regressed": regressed, "acc_norm": None}


KNOWN = {
    "arc": ["acc,none", "acc_norm,none"],
    "gsm": ["exact_match,strict-match", "exact_match,flexible-extract"],
    "all": ["acc,none"],
    "part": ["acc,none"],
}
GROUPS = {"all": ["arc", "wino"], "part": ["wino"]}
GAINED, LOST, UNCLEAR, SAME = task(1000, 80, 20), task(1000, 20, 80), task(1000, 30, 22), task(1000, 5, 5)


def judged(rules: dict[str, Any], **tasks: dict[str, Any]) -> dict[str, Any]:
    """A policy's verdict; `rules` by task, `combined` and other keys beside them."""
    top = {key: rules.pop(key) for key in ("combined", "alpha", "on_inconclusive") if key in rules}
    policy = Policy.model_validate({**top, "tasks": rules})
    found = evaluate_policy(policy, tasks)
    return {**found, "passed": passes(policy, found), "reasons": reasons(found)}


@pytest.mark.parametrize(
    ("asked", "found", "outcome"),
    [
        ({"role": "critical", "min_gain": 0.0}, GAINED, "passed"),
        ({"role": "critical", "min_gain": 0.0}, LOST, "failed"),
        ({"role": "critical", "min_gain": 0.0}, UNCLEAR, "inconclusive"),
        ({"role": "critical", "min_gain": 0.02}, GAINED, "passed"),
        ({"role": "critical", "min_gain": 0.05}, GAINED, "inconclusive"),
        ({"role": "critical", "min_gain": 0.1}, GAINED, "failed"),
        ({"role": "guarded", "max_loss": 0.02}, SAME, "passed"),
        ({"role": "guarded", "max_loss": 0.0}, SAME, "inconclusive"),
        ({"role": "guarded", "max_loss": 0.02}, LOST, "failed"),
        ({"role": "critical", "max_detectable_effect": 0.03}, GAINED, "passed"),
        ({"role": "critical", "max_detectable_effect": 0.01}, GAINED, "inconclusive"),
        ({"role": "critical", "metric": "acc_norm", "min_gain": 0.0}, GAINED, "failed"),
    ],
)
def test_each_kind_of_rule_has_three_ends(asked: dict[str, Any], found: dict[str, Any], outcome: str) -> None:
    """A rule is met, missed, or its questions cannot tell; only the first passes, and the others say why."""
    verdict = judged({"arc": asked}, arc=found)
    assert verdict["outcome"] == outcome
    assert verdict["passed"] is (outcome == "passed")
    assert [reason.partition(":")[0] for reason in verdict["reasons"]] == ([] if verdict["passed"] else ["arc"])
    assert all(sentence(rule) for rule in verdict["rules"])


def measured(delta: float, half: float, *, n: int = 101, rises: bool = True, **more: Any) -> dict[str, Any]:
    """What a rule reads of a task without choices, or of a group: a metric compared by a t test."""
    one = {"test": "paired_t", "delta": delta, "ci95": [delta - half, delta + half], "higher_is_better": rises}
    return {"kind": "generate_until", "n": n, "metrics": {"score,none": {"aggregation": "mean", **one, **more}}}


@pytest.mark.parametrize(
    ("asked", "found", "outcome"),
    [
        ({"role": "critical", "min_gain": 0.0}, measured(0.10, 0.05), "passed"),
        ({"role": "critical", "min_gain": 0.0}, measured(-0.10, 0.05), "failed"),
        ({"role": "critical", "min_gain": 0.0}, measured(0.02, 0.05), "inconclusive"),
        ({"role": "guarded", "max_loss": 0.03}, measured(-0.01, 0.01), "passed"),
        ({"role": "guarded", "max_loss": 0.03}, measured(-0.08, 0.01), "failed"),
        ({"role": "guarded", "max_loss": 0.03}, measured(-0.03, 0.02), "inconclusive"),
        ({"role": "critical", "min_gain": 0.0}, measured(-0.10, 0.05, rises=False), "passed"),
        ({"role": "guarded", "max_loss": 0.03}, measured(0.08, 0.01, rises=False, aggregation="perplexity"), "failed"),
        ({"role": "critical", "max_detectable_effect": 0.05}, measured(0.0, 0.03), "passed"),
        ({"role": "critical", "max_detectable_effect": 0.04}, measured(0.0, 0.03), "inconclusive"),
        ({"role": "critical", "max_detectable_effect": 0.04}, measured(0.0, 0.0), "inconclusive"),
        ({"role": "guarded", "max_loss": 0.03}, measured(0.0, 0.0), "inconclusive"),
        ({"role": "guarded", "max_loss": 0.03}, measured(0.0, 0.0, aggregation="bits_per_byte"), "passed"),
        ({"role": "critical", "min_gain": 0.0}, measured(0.0, 0.0, aggregation="bits_per_byte"), "inconclusive"),
    ],
)
def test_rules_of_other_metrics_have_three_ends(asked: dict[str, Any], found: dict[str, Any], outcome: str) -> None:
    """By a t test, where a gain is an improvement whichever way the figure rises; 0 of a few grades shows nothing."""
    verdict = judged({"t": {**asked, "metric": "score"}}, t=found)
    assert verdict["outcome"] == outcome, verdict
    assert lines(verdict)[-1] == outcome


def test_exact_answers_are_judged_by_their_counts() -> None:
    """`exact_match` of right and wrong answers by the same exact tests as accuracies; one filter is to be named."""
    metrics = {
        f"exact_match,{name}": {"test": "mcnemar", "improved": up, "regressed": down, "higher_is_better": True}
        for name, up, down in (("strict", 80, 20), ("loose", 20, 80))
    }
    task = {"kind": "generate_until", "n": 1000, "metrics": metrics}
    rule = {"role": "critical", "min_gain": 0.0}
    for name, outcome in (("exact_match,strict", "passed"), ("exact_match,loose", "failed"), ("exact_match", "failed")):
        assert judged({"t": {**rule, "metric": name}}, t=task)["outcome"] == outcome
    assert judged({"t": {**rule, "metric": "exact_match"}}, t=task)["rules"][0]["n"] is None
    ours, theirs = (
        judged({"t": {**rule, "metric": m}}, t=found) for m, found in (("exact_match,strict", task), ("acc", GAINED))
    )
    assert ours["rules"][0]["p_met"] == theirs["rules"][0]["p_met"]


def test_a_group_is_judged_like_a_task() -> None:
    """Its figure, with the degrees of freedom of its strata; and by its counts where all questions weigh the same."""
    group = {
        "metrics": {"acc,none": {"n": 60, "tasks": 3, "freedom": 57, **measured(0.10, 0.05)["metrics"]["score,none"]}}
    }
    task = measured(0.10, 0.05, n=58)
    rule = {"role": "critical", "min_gain": 0.06}
    found = judged({"g": rule}, g=group)["rules"][0]
    same = judged({"t": {**rule, "metric": "score"}}, t=task)["rules"][0]
    assert (found["p_met"], found["n"]) == (same["p_met"], 60)


def test_different_kinds_of_evidence_are_combined() -> None:
    """Counts and averages of the same metric: weighted by their questions, with the errors of both."""
    rules = {name: {"role": "critical", "metric": "score", "min_gain": -0.5} for name in ("one", "two")}
    both = judged({**rules, "combined": {"min_gain": 0.0}}, one=measured(0.1, 0.02), two=measured(0.2, 0.02, n=202))
    assert both["rules"][-1]["found"] == pytest.approx((0.1 * 101 + 0.2 * 202) / 303)
    assert both["outcome"] == "passed"
    counts = {"n": 101, "metrics": {"score,none": {"test": "mcnemar", "improved": 30, "regressed": 5}}}
    mixed = judged({**rules, "combined": {"min_gain": 0.0}}, one=measured(0.1, 0.02), two=counts)
    assert mixed["rules"][-1]["found"] == pytest.approx((0.1 + 25 / 101) / 2)
    assert mixed["rules"][-1]["n"] == 202


def test_two_tasks_are_combined_as_welch_s_test_has_it() -> None:
    """With equally many questions their mean is half the difference of one and the other's negative, as scipy has it.

    A task in which all questions changed alike adds neither error nor degrees of freedom.
    """
    generator = np.random.default_rng(5)
    rules = {name: {"role": "critical", "metric": "score", "min_gain": 0.0} for name in ("one", "two")}

    def combined(*tasks: Any) -> Any:
        found = []
        for task in tasks:
            low, high = ttest_1samp(task, 0).confidence_interval(0.95)
            found.append(measured((low + high) / 2, (high - low) / 2, n=len(task)))
        asked = {**rules, "combined": {"min_gain": 0.0}}
        return judged(asked, **dict(zip(("one", "two"), found, strict=True)))["rules"][-1]

    one, two = generator.normal(0.3, 1, 10), generator.normal(0.3, 0.2, 10)
    theirs = ttest_ind(one, -two, equal_var=False, alternative="greater")
    found = combined(one, two)
    assert (found["found"], found["p_met"]) == pytest.approx(((one.mean() + two.mean()) / 2, theirs.pvalue))
    same = judged({**rules, "combined": {"min_gain": 0.0}}, one=measured(0.3, 0.4, n=10), two=measured(0.1, 0.0, n=10))[
        "rules"
    ][-1]
    exact = measured(0.0, 0.0, n=10, aggregation="bits_per_byte")
    detected = judged({**rules, "combined": {"max_detectable_effect": 0.1}}, one=exact, two=exact)["rules"][-1]
    assert (detected["found"], detected["outcome"]) == (0, "met")
    assert same["p_met"] == pytest.approx(t.sf(0.2 / (0.4 / t.ppf(0.975, 9) / 2), 9))


def test_a_t_test_that_has_no_difference_passes_at_the_nominal_rate() -> None:
    """Of 1,000 runs without a difference, 5 % show a gain."""
    from job.evaluation.statistics import paired_ratio

    generator, met = np.random.default_rng(21), 0
    policy = Policy.model_validate({"tasks": {"t": {"role": "critical", "metric": "score", "min_gain": 0.0}}})
    for _ in range(1000):
        delta, (low, high), _ = paired_ratio(generator.normal(0, 1, 30).tolist(), [1.0] * 30)
        rule = evaluate_policy(policy, {"t": measured(delta, (high - low) / 2, n=30)})["rules"][0]
        met += rule["p_met"] < policy.alpha
    assert binom.ppf(0.001, 1000, 0.05) <= met <= binom.ppf(0.999, 1000, 0.05)


def test_what_is_compared_elsewhere_only_is_refused() -> None:
    """A gate on an exported format, or against an earlier run, has figures of multiple-choice tasks only."""
    for name, metric in (("gsm", "exact_match,strict-match"), ("all", "acc")):
        policy = Policy.model_validate({"tasks": {name: {"role": "critical", "metric": metric, "min_gain": 0}}})
        check_policy(policy, "p.yaml", KNOWN, groups=GROUPS)
        with pytest.raises(
            SettingsError, match="is compared only where the gate judges the adapter against the base; why"
        ):
            check_policy(policy, "p.yaml", KNOWN, groups=GROUPS, only="why")


def test_supporting_tasks_decide_together_only() -> None:
    """A lost supporting task fails nothing alone; in `combined` it weighs as its questions, guarded ones do not."""
    rules = {"arc": {"role": "critical", "min_gain": 0.0}, "wino": {"role": "supporting", "min_gain": 0.0}}
    assert judged(dict(rules), arc=GAINED, wino=LOST)["passed"]
    together = judged({**rules, "combined": {"min_gain": 0.0}}, arc=GAINED, wino=LOST)
    assert (together["outcome"], together["rules"][-1]["found"]) == ("inconclusive", 0)
    assert [reason.partition(":")[0] for reason in together["reasons"]] == ["all tasks together"]
    guarded = {**rules, "wino": {"role": "guarded", "max_loss": 0.2}, "combined": {"min_gain": 0.0}}
    assert judged(guarded, arc=GAINED, wino=LOST)["rules"][-1]["n"] == 1000


def test_inconclusive_may_pass_but_what_was_not_scored_may_not() -> None:
    """With `on_inconclusive: pass` a gate fails only on what is shown; a task without scores shows nothing."""
    rules = {"arc": {"role": "critical", "min_gain": 0.0}, "on_inconclusive": "pass"}
    assert judged(dict(rules), arc=UNCLEAR)["passed"]
    assert not judged(dict(rules), arc=LOST)["passed"]
    assert not judged(dict(rules))["passed"]


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        ([0.1274], [0.1274]),
        ([0.054, 0.0082, 0.0033, 0.1627, 0.054], [0.162, 0.0328, 0.0165, 0.1627, 0.162]),
        ([0.1213, 0.1459, 0.1087, 0.187, 0.1632, 0.0005, 0.1213], [*[0.6522] * 5, 0.0035, 0.6522]),
    ],
)
def test_holm_is_that_of_statsmodels(p: list[float], adjusted: list[float]) -> None:
    """As `multipletests(p, method="holm")` of statsmodels 0.15.0 prints them, and equal ones stay equal."""
    assert holm(p) == pytest.approx(adjusted, abs=1e-9)


@pytest.mark.parametrize(("improved", "regressed", "n"), [(30, 12, 400), (3, 9, 100), (0, 0, 50), (10, 0, 100)])
def test_the_one_sided_test_inverts_the_interval(improved: int, regressed: int, n: int) -> None:
    """At the lower bound of Tango's 95 % interval its p value is 2.5 %; at 0 it is the exact binomial tail."""
    low, _ = tango_interval(improved, regressed, n)
    assert one_sided_p(improved, regressed, n, low) == pytest.approx(0.025, rel=1e-6)
    assert one_sided_p(improved, regressed, n, 0) == binom.sf(improved - 1, improved + regressed, 0.5)
    ordered = [one_sided_p(improved, regressed, n, margin) for margin in (-0.1, -0.05, -0.01, 0.01, 0.05, 0.1)]
    assert ordered == sorted(ordered)


def test_null_runs_pass_at_the_nominal_rate() -> None:
    """Of 1,000 runs without any difference in 5 tasks, no more than 5 % show a gain anywhere, and as many in all."""
    generator = np.random.default_rng(20)
    rules = {f"t{k}": {"role": "critical", "min_gain": 0.0} for k in range(5)}
    policy = Policy.model_validate({"combined": {"min_gain": 0.0}, "tasks": rules})
    alone = Policy.model_validate(
        {"combined": {"min_gain": 0.0}, "tasks": {k: {"role": "supporting", "max_loss": 1.0} for k in rules}}
    )
    anywhere = together = passed = 0
    for _ in range(1000):
        improved = generator.binomial(500, 0.04, 5)
        regressed = [generator.binomial(500 - up, 0.04 / 0.96) for up in improved]
        tasks = {name: task(500, int(up), int(down)) for name, up, down in zip(rules, improved, regressed, strict=True)}
        found = evaluate_policy(policy, tasks)
        anywhere += any(rule["outcome"] == "met" for rule in found["rules"])
        passed += found["outcome"] == "passed"
        rule = evaluate_policy(alone, tasks)["rules"][-1]
        together += rule["p_met"] < alone.alpha
    upper = binom.ppf(0.999, 1000, 0.05)
    assert passed <= anywhere <= upper
    assert binom.ppf(0.001, 1000, 0.03) <= together <= upper


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: {arc: {role: critical, min_gain: 0.0}, arc: {role: guarded, max_loss: 0}}", "a key is given twice"),
        ("tasks: {arc: {role: vital, min_gain: 0.0, gain: 1}}", "tasks.arc.role: must be 'critical'"),
        ("tasks: {arc: {role: vital, min_gain: 0.0, gain: 1}}", "tasks.arc.gain: is not known"),
        ("tasks: {arc: {role: critical}}", "tasks.arc: has no rule"),
        ("tasks: {other: {role: critical, min_gain: 0.0}}", "tasks.other: is not scored by this run"),
        ("tasks: {arc: {role: critical, min_gain: .nan}}", "tasks.arc.min_gain"),
        ("tasks: {arc: {role: supporting, min_gain: 0.0}}", "no rule decides"),
        ("tasks: {arc: {role: guarded, max_loss: 0.0}}\ncombined: {min_gain: 0.0}", "no task is critical"),
        ("tasks: {arc: {role: critical, metric: f1, min_gain: 0}}", "has no metric f1; it has acc,none, acc_norm,none"),
        ("tasks: {gsm: {role: critical, metric: exact_match, min_gain: 0}}", "has several metrics exact_match"),
        (
            "combined: {min_gain: 0}\ntasks: {all: {role: critical, min_gain: 0}, arc: {role: critical, min_gain: 0}}",
            "questions of arc twice",
        ),
        (
            "combined: {min_gain: 0}\ntasks: {all: {role: critical, min_gain: 0}, part: {role: critical, min_gain: 0}}",
            "questions of wino twice, for all and for part",
        ),
        ("tasks: {}", "tasks: "),
        ("alpha: 0.7", "tasks: is missing"),
        ("[1, 2]", "must be a mapping"),
        ("tasks: !!python/object/apply:os.system [exit]", "is not valid YAML (line 1)"),
        ("a: &a [1]\ntasks: *a", "an alias of a list or mapping"),
        ("tasks: {arc", "is not valid YAML"),
        ("? [1, 2]\n: 3", "is not valid YAML (line 1): found unhashable key"),
    ],
)
def test_a_policy_that_is_none_is_refused(text: str, said: str, tmp_path: Path) -> None:
    """Everything that is wrong, in one error, with the file and the place in it."""
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        check_policy(read_policy(str(file)), str(file), KNOWN, groups=GROUPS)
    assert said in str(caught.value)
    assert all(problem.where == f"JOB_GATE__POLICY ({file})" for problem in caught.value.problems)


def test_a_missing_policy_is_named(tmp_path: Path) -> None:
    """Its setting, its path, and why it cannot be read."""
    with pytest.raises(SettingsError, match=r"JOB_GATE__POLICY .*cannot be read: No such file"):
        read_policy(str(tmp_path / "none.yaml"))
