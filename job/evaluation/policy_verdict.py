"""Whether the rules of a policy (`policy`) are met: each rule's evidence and outcome, and the one verdict of all.

Each rule is met, missed, or inconclusive where the questions cannot tell. Where every answer is right or wrong, that is
tested by their counts (`statistics.one_sided_p`); else by Student's t, from the interval in the manifest. The p values
of all rules are adjusted together by Holm's method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.evaluation import statistics
from job.evaluation.policy import KINDS, Policy, asked_of, of_metric


@dataclass(frozen=True)
class Counts:
    """What a rule looks at where every answer is right or wrong: paired answers to the same questions."""

    n: int
    improved: int
    regressed: int

    @property
    def gain(self) -> float:
        """The observed difference, a fraction; positive where it is better."""
        return (self.improved - self.regressed) / self.n

    def above(self, margin: float) -> tuple[float, float]:
        """One-sided p values against "the true gain is at most `margin`", and against "at least `margin`"."""
        return (
            statistics.one_sided_p(self.improved, self.regressed, self.n, margin),
            statistics.one_sided_p(self.regressed, self.improved, self.n, -margin),
        )

    def detectable(self, alpha: float) -> float:
        """The smallest difference that the test detects with a probability of 80 %."""
        return statistics.minimum_detectable_effect(self.n, self.improved + self.regressed, alpha=alpha)

    @property
    def spread(self) -> Spread:
        """The same as a mean of -1, 0 and 1."""
        variance = ((self.improved + self.regressed) / self.n - self.gain**2) / (self.n - 1)
        return Spread(self.n, self.gain, max(0.0, variance) ** 0.5, self.n - 1)


@dataclass(frozen=True)
class Spread:
    """What a rule looks at elsewhere: an estimate of the gain with its standard error, for a t test.

    Attributes:
        n: Questions.
        gain: The estimate; positive where it is better.
        error: Its standard error.
        freedom: Degrees of freedom, by Satterthwaite where several tasks are pooled.
        exact: Whether an error of 0 shows that all is equal: of likelihoods it does, of a few grades it does not.
    """

    n: int
    gain: float
    error: float
    freedom: float
    exact: bool = False

    def above(self, margin: float) -> tuple[float, float]:
        """As `Counts.above`."""
        from scipy.stats import t

        excess = self.gain - margin
        if self.error == 0:
            return (float(excess <= 0), float(excess >= 0)) if self.exact else (1.0, 1.0)
        return float(t.sf(excess / self.error, self.freedom)), float(t.cdf(excess / self.error, self.freedom))

    def detectable(self, alpha: float, power: float = 0.8) -> float:
        """As `Counts.detectable`, by the usual approximation: the sum of two quantiles, times the standard error.

        1, the largest threshold that a rule can have, where the error shows nothing.
        """
        from scipy.stats import t

        if self.error == 0 and not self.exact:  # a few grades that are all alike: nothing is known of their spread
            return 1.0
        return self.error * float(t.ppf(1 - alpha / 2, self.freedom) + t.ppf(power, self.freedom))


def evaluate_policy(policy: Policy, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's `gate.policy`: every rule with its outcome, and the verdict.

    Args:
        policy: The rules.
        tasks: By task or group, the comparison as `comparison.compare_tasks`, `task_metrics.compare_measured` or
            `groups.compare_groups` gives it.

    Returns:
        `asked` is the policy itself; `rules` has one entry for each rule; `outcome` is passed, failed or inconclusive.
    """
    evidence = {name: _evidence(tasks.get(name), rules_of_task.metric) for name, rules_of_task in policy.tasks.items()}
    rules = [
        _test_rule(name, rules_of_task.role, rule, evidence[name], policy.alpha)
        for name, rules_of_task in policy.tasks.items()
        for rule in asked_of(rules_of_task)
    ]
    if policy.combined is not None:
        pooled = _pooled(
            [evidence[name] for name, rules_of_task in policy.tasks.items() if rules_of_task.role != "guarded"]
        )
        rules += [_test_rule(None, "combined", rule, pooled, policy.alpha) for rule in asked_of(policy.combined)]
    tested = [rule for rule in rules if rule["p_met"] is not None]
    for key in ("met", "missed"):
        for rule, adjusted in zip(tested, statistics.holm([rule[f"p_{key}"] for rule in tested]), strict=True):
            rule[f"holm_p_{key}"] = adjusted
            if adjusted < policy.alpha:
                rule["outcome"] = key
    decisive = [rule["outcome"] for rule in rules if rule["role"] != "supporting"]
    outcome = "failed" if "missed" in decisive else "inconclusive" if "inconclusive" in decisive else "passed"
    return {"asked": policy.model_dump(), "rules": rules, "outcome": outcome}


def passes(policy: Policy, verdict: Mapping[str, Any]) -> bool:
    """Whether the gate is met."""
    return verdict["outcome"] == "passed" or (verdict["outcome"] == "inconclusive" and policy.on_inconclusive == "pass")


def reasons(verdict: Mapping[str, Any]) -> list[str]:
    """Why a policy is not met: one sentence for each decisive rule that is not."""
    return [
        f"{rule['task'] or 'all tasks together'}: {sentence(rule)}"
        for rule in verdict["rules"]
        if rule["role"] != "supporting" and rule["outcome"] != "met"
    ]


def lines(verdict: Mapping[str, Any]) -> list[str]:
    """Every rule with its role and outcome in words, and the verdict last."""
    rules = [f"{rule['task'] or 'all tasks together'} ({rule['role']}), {sentence(rule)}" for rule in verdict["rules"]]
    return [*rules, verdict["outcome"]]


def sentence(rule: Mapping[str, Any]) -> str:
    """A rule of the manifest and its outcome in words."""
    if rule["n"] is None:
        return f"was not scored by the metric of its rule {rule['kind']}"
    if rule["kind"] == "max_detectable_effect":
        return (
            f"its {rule['n']} questions can detect a difference of {rule['found']:.4f} or more; "
            f"the policy requires {rule['threshold']:.4f}"
        )
    requirement = (
        f"a gain above {rule['threshold']:+.4f}"
        if rule["kind"] == "min_gain"
        else f"a loss below {rule['threshold']:.4f}"
    )
    outcome = {
        "met": f"{requirement} is shown",
        "missed": f"{requirement} is required, and the opposite was shown",
        "inconclusive": f"{requirement} is required, and {rule['n']} questions cannot tell",
    }[rule["outcome"]]
    p = rule["holm_p_met"] if rule["outcome"] != "missed" else rule["holm_p_missed"]
    return f"{outcome} (difference {rule['found']:+.4f}, p = {p:.2g} after Holm)"


def _evidence(task: Mapping[str, Any] | None, metric: str) -> Counts | Spread | None:
    """What the rules of a task look at; None if it was not scored by this metric."""
    compared = None if task is None else of_metric(task, metric)
    if compared is None or task is None:
        return None
    n = compared.get("n", task.get("n"))
    if compared.get("test", "mcnemar") == "mcnemar":
        return Counts(n, compared["improved"], compared["regressed"])
    from scipy.stats import t

    (low, high), freedom = compared["ci95"], compared.get("freedom", n - 1)
    error = (high - low) / 2 / float(t.ppf(0.975, freedom))
    gain = compared["delta"] if compared["higher_is_better"] else -compared["delta"]
    return Spread(n, gain, error, freedom, exact=compared.get("aggregation", "mean") != "mean")


def _pooled(evidence: Sequence[Counts | Spread | None]) -> Counts | Spread | None:
    """All questions as one sample; None if a task has no evidence.

    Without any difference the improved ones of all discordant pairs are binomial with 1/2 in the pooled table too, so
    the exact test holds for it.
    """
    available = [sample for sample in evidence if sample is not None]
    if len(available) < len(evidence):
        return None
    counts = [sample for sample in available if isinstance(sample, Counts)]
    if len(counts) == len(available):
        return Counts(*(sum(getattr(sample, name) for sample in counts) for name in ("n", "improved", "regressed")))
    spreads = [sample.spread if isinstance(sample, Counts) else sample for sample in available]
    n = sum(sample.n for sample in spreads)
    parts = [(sample.n * sample.error / n) ** 2 for sample in spreads]
    freedom: float = sum(sample.freedom for sample in spreads)
    if any(parts):
        freedom = sum(parts) ** 2 / sum(part**2 / sample.freedom for part, sample in zip(parts, spreads, strict=True))
    gain = sum(sample.n * sample.gain / n for sample in spreads)
    return Spread(n, gain, sum(parts) ** 0.5, freedom, all(sample.exact for sample in spreads))


def _test_rule(
    task: str | None, role: str, kind_and_threshold: tuple[str, float], evidence: Counts | Spread | None, alpha: float
) -> dict[str, Any]:
    """One rule, (kind, threshold), before Holm's adjustment."""
    kind, threshold = kind_and_threshold
    rule: dict[str, Any] = {
        "task": task,
        "role": role,
        "kind": kind,
        "threshold": threshold,
        "n": evidence and evidence.n,
        "found": evidence and evidence.gain,
        "p_met": None,
        "p_missed": None,
        "holm_p_met": None,
        "holm_p_missed": None,
        "outcome": "inconclusive",
    }
    if evidence is None:  # what was not measured is not met, whatever on_inconclusive says
        return {**rule, "outcome": "missed"}
    sign = KINDS[kind]
    if sign is None:
        effect = evidence.detectable(alpha)
        return {**rule, "found": effect, "outcome": "met" if effect <= threshold else "inconclusive"}
    met, missed = evidence.above(sign * threshold)
    return {**rule, "p_met": met, "p_missed": missed}
