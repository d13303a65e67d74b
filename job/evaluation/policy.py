"""JOB_GATE__POLICY: a file with rules for several tasks; `policy_verdict` gives their one verdict.

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

To add a kind of rule: a field of `Rules`, and its entry in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from job.common.config_files import strict_yaml
from job.errors import Problem, SettingsError

SETTING = "JOB_GATE__POLICY"
_MAX_BYTES = 1 << 20
_SHOWN = 10
"""Names in a message."""

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


KINDS: Mapping[str, float | None] = {
    "min_gain": 1.0,
    "max_loss": -1.0,
    "max_detectable_effect": None,
}
"""By kind of rule, what its threshold is multiplied by to be the margin that the gain has to be above; None for a rule
without a test, which is known from the number of questions."""


def asked_of(rules: Rules) -> Iterator[tuple[str, float]]:
    """(kind, threshold) of each rule that is set."""
    for kind in KINDS:
        if (threshold := getattr(rules, kind)) is not None:
            yield kind, threshold


def read_policy(path: str) -> Policy:
    """Reads a policy; `check_policy` checks it against the tasks of a run.

    Args:
        path: A local YAML file.

    Raises:
        SettingsError: With everything that is wrong with it.
    """
    import yaml

    setting_and_path = f"{SETTING} ({path})"
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise SettingsError(
                [Problem(setting_and_path, f"is larger than {_MAX_BYTES >> 20} MiB, too large for a policy")]
            )
        tree = strict_yaml(data)
    except OSError as error:
        raise SettingsError([Problem(setting_and_path, f"cannot be read: {error.strerror}")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise SettingsError(
            [Problem(setting_and_path, f"is not valid YAML{where}: {getattr(error, 'problem', error)}")]
        ) from None
    try:
        policy = Policy.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(
            [
                Problem(setting_and_path, f"{'.'.join(map(str, e['loc'])) or 'the file'}: {_words(e)}")
                for e in error.errors()
            ]
        ) from None
    if problems := [Problem(setting_and_path, what) for what in _faults(policy)]:
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
        metrics = named(rules.metric, tasks[name])
        if len(metrics) != 1:
            fault = "has no metric" if not metrics else "has several metrics"
            problems.append(f"tasks.{name}: {fault} {rules.metric}; it has {', '.join(tasks[name])}")
        elif only and (name in groups or not set(tasks[name]) <= {f"{metric},none" for metric in CHOICES}):
            problems.append(
                f"tasks.{name}: is compared only where the gate judges the adapter against the base; {only}"
            )
    if policy.combined is not None:
        pooled = {name for name, rules in policy.tasks.items() if rules.role != "guarded"}
        tasks_of = {name: set(groups.get(name, [name])) for name in sorted(pooled)}
        problems += [
            f"combined: would count the questions of {', '.join(both[:_SHOWN])} twice, for {one} and for {other}"
            for one, other in combinations(tasks_of, 2)
            if (both := sorted(tasks_of[one] & tasks_of[other]))
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
        if not any(True for _ in asked_of(rules)):
            yield f"tasks.{name}: has no rule; give {', '.join(KINDS)}"
    if policy.combined is None:
        if all(rules.role == "supporting" for rules in policy.tasks.values()):
            yield "no rule decides the verdict: give a task the role critical or guarded, or set combined"
        return
    if not any(True for _ in asked_of(policy.combined)):
        yield f"combined: has no rule; give {', '.join(KINDS)}"
    pooled = {rules.metric for rules in policy.tasks.values() if rules.role != "guarded"}
    if not pooled:
        yield "combined: no task is critical or supporting"
    if len(pooled) > 1:
        yield "combined: its tasks have different metrics; give them the same"


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
    comparison: Mapping[str, Any] | None = task if name == "acc" else task["acc_norm"] if name == "acc_norm" else None
    return comparison
