"""JOB_GATE__POLICY: a file with rules for several tasks, and the one verdict that they give.

A policy in YAML:

    alpha: 0.05                # level of all tests together
    on_inconclusive: fail      # or pass
    combined: {min_gain: 0.0}  # critical and supporting tasks as one set of questions
    tasks:
      arc_easy: {role: critical, metric: acc, min_gain: 0.0, max_detectable_effect: 0.05}
      hellaswag: {role: supporting, min_gain: 0.0}
      winogrande: {role: guarded, max_loss: 0.02}
      gsm8k: {role: guarded, metric: "exact_match,strict-match", max_loss: 0.03}
      forgetting: {role: guarded, metric: bits_per_byte, max_loss: 0.05}
      mmlu: {role: guarded, max_loss: 0.01}  # a group

Metrics are named as in the manifest, without lm-eval's filter where a task has one only. Gains and losses are in the
metric's own unit, and of perplexities in the logarithm of the ratio: 0.05 is about 5 %. A gain is an improvement, also
where a lower figure is better.

Roles: every rule of a `critical` or `guarded` task has to be met. Rules of a `supporting` task are reported and decide
nothing alone. `critical` and `supporting` tasks enter `combined`; `guarded` ones, which are there to lose nothing, do
not.

Each rule is met, missed, or inconclusive where there are too few questions. Where every answer is right or wrong, that
is tested by their counts (`statistics.one_sided_p`); else by Student's t, from the interval in the manifest. The p
values of all rules are adjusted together by Holm's method.

To add a kind of rule: a field of `Rules`, and its entry in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from job.common.config_files import strict_yaml
from job.errors import Problem, SettingsError
from job.evaluation import statistics

SETTING = "JOB_GATE__POLICY"
_MAX_BYTES = 1 << 20
_SHOWN = 10
"""Names in a message."""

Outcome = Literal["met", "missed", "inconclusive"]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Gain = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
CHOICES = ("acc", "acc_norm")
"""Metrics of multiple-choice tasks, as the manifest names them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rules(_Strict):
    """Thresholds; of accuracies, 0.01 is one percentage point. None requires nothing."""

    min_gain: Gain | None = None
    """The true gain is shown to be larger than this."""
    max_loss: Fraction | None = None
    """The true loss is shown to be smaller than this."""
    max_detectable_effect: Fraction | None = None
    """The smallest difference that the questions can detect is not larger than this."""


class TaskRules(Rules):
    """What is asked of one task."""

    role: Literal["critical", "supporting", "guarded"]
    metric: Annotated[str, Field(min_length=1)] = "acc"


class Policy(_Strict):
    """A whole policy."""

    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    on_inconclusive: Literal["fail", "pass"] = "fail"
    combined: Rules | None = None
    tasks: Annotated[dict[str, TaskRules], Field(min_length=1)]


def read_policy(path: str) -> Policy:
    """Reads a policy; `check_policy` checks it against the tasks of a run.

    Args:
        path: A local YAML file.

    Raises:
        SettingsError: With everything that is wrong with it.
    """
    import yaml

    place = f"{SETTING} ({path})"
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise SettingsError([Problem(place, f"is larger than {_MAX_BYTES >> 20} MiB, too large for a policy")])
        tree = strict_yaml(data)
    except OSError as error:
        raise SettingsError([Problem(place, f"cannot be read: {error.strerror}")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise SettingsError([Problem(place, f"is not valid YAML{where}: {getattr(error, 'problem', error)}")]) from None
    try:
        policy = Policy.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(
            [Problem(place, f"{'.'.join(map(str, e['loc'])) or 'the file'}: {_words(e)}") for e in error.errors()]
        ) from None
    if problems := [Problem(place, what) for what in _faults(policy)]:
        raise SettingsError(problems)
    return policy


def check_policy(
    policy: Policy,
    path: str,
    tasks: Mapping[str, Sequence[str]],
    *,
    groups: Mapping[str, Sequence[str]],
    only: str = "",
) -> None:
    """Refuses a policy that names what a run does not compare.

    Args:
        policy: From `read_policy`.
        path: Its file.
        tasks: By task or group that the run scores, its metrics by lm-eval's name of metric and filter.
        groups: By group, its tasks.
        only: The setting because of which nothing but tasks of choices is compared, if there is one.

    Raises:
        SettingsError: With everything that is wrong with it.
    """
    problems = []
    for name, rules in policy.tasks.items():
        if name not in tasks:
            near = ", ".join(sorted(tasks)[:_SHOWN])
            problems.append(f"tasks.{name}: is not scored by this run; it scores {near}")
            continue
        found = named(rules.metric, tasks[name])
        if len(found) != 1:
            fault = "has no metric" if not found else "has several metrics"
            problems.append(f"tasks.{name}: {fault} {rules.metric}; it has {', '.join(tasks[name])}")
        elif only and (name in groups or not set(tasks[name]) <= {f"{metric},none" for metric in CHOICES}):
            problems.append(
                f"tasks.{name}: is compared only where the gate judges the adapter against the base; {only}"
            )
    if policy.combined is not None:
        pooled = {name for name, rules in policy.tasks.items() if rules.role != "guarded"}
        asked_of = {name: set(groups.get(name, [name])) for name in sorted(pooled)}
        problems += [
            f"combined: would count the questions of {', '.join(both[:_SHOWN])} twice, for {one} and for {other}"
            for one, other in combinations(asked_of, 2)
            if (both := sorted(asked_of[one] & asked_of[other]))
        ]
    if problems:
        raise SettingsError([Problem(f"{SETTING} ({path})", fault) for fault in problems])


def _words(error: Any) -> str:
    match error["type"]:
        case "extra_forbidden":
            return "is not known"
        case "missing":
            return "is missing"
        case "model_type" | "dict_type":
            return "must be a mapping"
    return str(error["msg"]).replace("Input should be", "must be")


def _faults(policy: Policy) -> Iterator[str]:
    for name, rules in policy.tasks.items():
        if not any(True for _ in _thresholds_of(rules)):
            yield f"tasks.{name}: has no rule; give {', '.join(KINDS)}"
    if policy.combined is None:
        if all(rules.role == "supporting" for rules in policy.tasks.values()):
            yield "no rule decides the verdict: give a task the role critical or guarded, or set combined"
        return
    if not any(True for _ in _thresholds_of(policy.combined)):
        yield f"combined: has no rule; give {', '.join(KINDS)}"
    pooled = {rules.metric for rules in policy.tasks.values() if rules.role != "guarded"}
    if not pooled:
        yield "combined: no task is critical or supporting"
    if len(pooled) > 1:
        yield "combined: its tasks have different metrics; give them the same"


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

        if self.error == 0 and not self.exact:  # a few equal grades: their spread is unknown
            return 1.0
        return self.error * float(t.ppf(1 - alpha / 2, self.freedom) + t.ppf(power, self.freedom))


KINDS: Mapping[str, float | None] = {
    "min_gain": 1.0,
    "max_loss": -1.0,
    "max_detectable_effect": None,
}
"""By kind of rule, what its threshold is multiplied by to be the margin that the gain has to be above; None for a rule
without a test, which is known from the number of questions."""


def _thresholds_of(rules: Rules) -> Iterator[tuple[str, float]]:
    for kind in KINDS:
        if (threshold := getattr(rules, kind)) is not None:
            yield kind, threshold


def judge_policy(policy: Policy, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's `gate.policy`: every rule with its outcome, and the verdict.

    Args:
        policy: The rules.
        tasks: By task or group, the comparison as `comparison.compare_tasks`, `measured.compare_measured` or
            `groups.compare_groups` gives it.

    Returns:
        `asked` is the policy itself; `rules` has one entry for each rule; `outcome` is passed, failed or inconclusive.
    """
    evidence = {name: _evidence(tasks.get(name), task_rules.metric) for name, task_rules in policy.tasks.items()}
    rules = [
        _judged(name, task_rules.role, rule, evidence[name], policy.alpha)
        for name, task_rules in policy.tasks.items()
        for rule in _thresholds_of(task_rules)
    ]
    if policy.combined is not None:
        pooled = _pooled([evidence[name] for name, task_rules in policy.tasks.items() if task_rules.role != "guarded"])
        rules += [_judged(None, "combined", rule, pooled, policy.alpha) for rule in _thresholds_of(policy.combined)]
    tested = [rule for rule in rules if rule["p_met"] is not None]
    for key in ("met", "missed"):
        for rule, adjusted in zip(tested, statistics.holm([rule[f"p_{key}"] for rule in tested]), strict=True):
            rule[f"holm_p_{key}"] = adjusted
            if adjusted < policy.alpha:
                rule["outcome"] = key
    decisive = [rule["outcome"] for rule in rules if rule["role"] != "supporting"]
    outcome = "failed" if "missed" in decisive else "inconclusive" if "inconclusive" in decisive else "passed"
    return {"asked": policy.model_dump(), "rules": rules, "outcome": outcome}


def passes(policy: Policy, judged: Mapping[str, Any]) -> bool:
    """Whether the gate is met."""
    return judged["outcome"] == "passed" or (judged["outcome"] == "inconclusive" and policy.on_inconclusive == "pass")


def reasons(judged: Mapping[str, Any]) -> list[str]:
    """Why a policy is not met: one sentence for each decisive rule that is not."""
    return [
        f"{rule['task'] or 'all tasks together'}: {sentence(rule)}"
        for rule in judged["rules"]
        if rule["role"] != "supporting" and rule["outcome"] != "met"
    ]


def lines(judged: Mapping[str, Any]) -> list[str]:
    """Every rule with its role and outcome in words, and the verdict last."""
    rules = [f"{rule['task'] or 'all tasks together'} ({rule['role']}), {sentence(rule)}" for rule in judged["rules"]]
    return [*rules, judged["outcome"]]


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


def named(metric: str, names: Iterable[str]) -> list[str]:
    """The metrics that a name refers to: lm-eval's name of metric and filter, or of the metric alone."""
    names = list(names)
    return [metric] if metric in names else [name for name in names if name.partition(",")[0] == metric]


def of_metric(task: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    """The comparison by a metric in a task or group of the manifest; None if it has none of that name."""
    if "metrics" in task:
        names = named(metric, task["metrics"])
        return task["metrics"][names[0]] if len(names) == 1 else None
    name = metric.removesuffix(",none")
    found: Mapping[str, Any] | None = task if name == "acc" else task["acc_norm"] if name == "acc_norm" else None
    return found


def _evidence(task: Mapping[str, Any] | None, metric: str) -> Counts | Spread | None:
    comparison = None if task is None else of_metric(task, metric)
    if comparison is None or task is None:
        return None
    n = comparison.get("n", task.get("n"))
    if comparison.get("test", "mcnemar") == "mcnemar":
        return Counts(n, comparison["improved"], comparison["regressed"])
    from scipy.stats import t

    (low, high), freedom = comparison["ci95"], comparison.get("freedom", n - 1)
    error = (high - low) / 2 / float(t.ppf(0.975, freedom))
    gain = comparison["delta"] if comparison["higher_is_better"] else -comparison["delta"]
    return Spread(n, gain, error, freedom, exact=comparison.get("aggregation", "mean") != "mean")


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


def _judged(
    task: str | None, role: str, requirement: tuple[str, float], evidence: Counts | Spread | None, alpha: float
) -> dict[str, Any]:
    """One rule, (kind, threshold), before Holm's adjustment."""
    kind, threshold = requirement
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
    if evidence is None:  # what was not measured is not met, regardless of on_inconclusive
        return {**rule, "outcome": "missed"}
    sign = KINDS[kind]
    if sign is None:
        effect = evidence.detectable(alpha)
        return {**rule, "found": effect, "outcome": "met" if effect <= threshold else "inconclusive"}
    met, missed = evidence.above(sign * threshold)
    return {**rule, "p_met": met, "p_missed": missed}
