"""JOB_GATE__POLICY: a file with rules for several tasks, and the one verdict that they give.

A policy in YAML:

    alpha: 0.05                # level of all tests together
    on_inconclusive: fail      # or pass
    combined: {min_gain: 0.0}  # critical and supporting tasks as one set of questions
    tasks:
      arc_easy: {role: critical, metric: acc, min_gain: 0.0, max_detectable_effect: 0.05}
      hellaswag: {role: supporting, min_gain: 0.0}
      winogrande: {role: guarded, max_loss: 0.02}

Roles: every rule of a `critical` or `guarded` task has to be met. Rules of a `supporting` task are reported and decide
nothing alone. `critical` and `supporting` tasks enter `combined`; `guarded` ones, which are there to lose nothing, do
not.

Each rule is met, missed, or inconclusive where the questions cannot tell. The p values of all rules are adjusted
together by Holm's method.

To add a kind of rule: a field of `Rules`, and its entry in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from job.errors import Problem, SettingsError
from job.evaluation import statistics

SETTING = "JOB_GATE__POLICY"
_MAX_BYTES = 1 << 20

Outcome = Literal["met", "missed", "inconclusive"]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Gain = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rules(_Strict):
    """Thresholds, as fractions of the questions: 0.01 is one percentage point. None asks for nothing."""

    min_gain: Gain | None = None
    """The true gain of accuracy is shown to be larger than this."""
    max_loss: Fraction | None = None
    """The true loss of accuracy is shown to be smaller than this."""
    max_detectable_effect: Fraction | None = None
    """The smallest difference that the questions can detect is not larger than this."""


class TaskRules(Rules):
    """What is asked of one task."""

    role: Literal["critical", "supporting", "guarded"]
    metric: Literal["acc", "acc_norm"] = "acc"


class Policy(_Strict):
    """A whole policy."""

    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    on_inconclusive: Literal["fail", "pass"] = "fail"
    combined: Rules | None = None
    tasks: Annotated[dict[str, TaskRules], Field(min_length=1)]


def read_policy(path: str, tasks: Sequence[str]) -> Policy:
    """Reads and checks a policy.

    Args:
        path: A local YAML file.
        tasks: Those that the run scores; the policy may name no other.

    Raises:
        SettingsError: With everything that is wrong with it.
    """
    import yaml

    place = f"{SETTING} ({path})"
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise SettingsError([Problem(place, f"is larger than {_MAX_BYTES >> 20} MiB, so it is no policy")])
        tree = _loader()(data).get_single_data()
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
    if problems := [Problem(place, what) for what in _faults(policy, tasks)]:
        raise SettingsError(problems)
    return policy


def _loader() -> Any:
    """YAML's safe loader, which also refuses a key given twice and an alias: an alias can unfold without end."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "an alias is not allowed here", mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - PyYAML's signature
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    problem = f"{str(key.value)[:80]!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    return Loader


def _words(error: Any) -> str:
    match error["type"]:
        case "extra_forbidden":
            return "is not known"
        case "missing":
            return "is missing"
        case "model_type" | "dict_type":
            return "must be a mapping"
    return str(error["msg"]).replace("Input should be", "must be")


def _faults(policy: Policy, tasks: Sequence[str]) -> Iterator[str]:
    for name, asked in policy.tasks.items():
        if name not in tasks:
            yield f"tasks.{name}: is not scored by this run; add it to JOB_EVAL__TASKS, or remove it"
        if not any(True for _ in _asked(asked)):
            yield f"tasks.{name}: has no rule; give {', '.join(KINDS)}"
    if policy.combined is None:
        if all(asked.role == "supporting" for asked in policy.tasks.values()):
            yield "no rule decides: give a task the role critical or guarded, or give combined"
        return
    if not any(True for _ in _asked(policy.combined)):
        yield f"combined: has no rule; give {', '.join(KINDS)}"
    pooled = {asked.metric for asked in policy.tasks.values() if asked.role != "guarded"}
    if not pooled:
        yield "combined: no task is critical or supporting"
    if len(pooled) > 1:
        yield "combined: its tasks have different metrics; give them the same"


@dataclass(frozen=True)
class Counts:
    """What a rule looks at: paired answers to the same questions."""

    n: int
    improved: int
    regressed: int

    @property
    def delta(self) -> float:
        """The observed difference of accuracy, a fraction."""
        return (self.improved - self.regressed) / self.n


def _above(counts: Counts, margin: float) -> tuple[float, float]:
    """One-sided p values against "the true difference is at most `margin`", and against "at least `margin`"."""
    return (
        statistics.one_sided_p(counts.improved, counts.regressed, counts.n, margin),
        statistics.one_sided_p(counts.regressed, counts.improved, counts.n, -margin),
    )


KINDS: Mapping[str, Callable[[Counts, float], tuple[float, float]] | None] = {
    "min_gain": _above,
    "max_loss": lambda counts, threshold: _above(counts, -threshold),
    "max_detectable_effect": None,  # known without a test: it depends on the number of questions
}
"""By kind of rule, the p values of the tests that show that it is met, and that it is missed."""


def _asked(rules: Rules) -> Iterator[tuple[str, float]]:
    for kind in KINDS:
        if (threshold := getattr(rules, kind)) is not None:
            yield kind, threshold


def judge_policy(policy: Policy, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's `gate.policy`: every rule with its outcome, and the verdict.

    Args:
        policy: The rules.
        tasks: By task, the comparison as `comparison.compare_tasks` gives it.

    Returns:
        `asked` is the policy itself; `rules` has one entry for each rule; `outcome` is passed, failed or inconclusive.
    """
    found = {name: _counts(tasks.get(name), asked.metric) for name, asked in policy.tasks.items()}
    rules = [
        _judged(name, asked.role, rule, found[name], policy.alpha)
        for name, asked in policy.tasks.items()
        for rule in _asked(asked)
    ]
    if policy.combined is not None:
        pooled = _pooled([found[name] for name, asked in policy.tasks.items() if asked.role != "guarded"])
        rules += [_judged(None, "combined", rule, pooled, policy.alpha) for rule in _asked(policy.combined)]
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


def sentence(rule: Mapping[str, Any]) -> str:
    """A rule of the manifest and its outcome in words."""
    if rule["n"] is None:
        return f"was not scored by the metric of its rule {rule['kind']}"
    if rule["kind"] == "max_detectable_effect":
        return (
            f"its {rule['n']} questions can detect a difference of {rule['found']:.4f} or more; "
            f"the policy asks for {rule['threshold']:.4f}"
        )
    wanted = (
        f"a gain above {rule['threshold']:+.4f}"
        if rule["kind"] == "min_gain"
        else f"a loss below {rule['threshold']:.4f}"
    )
    what = {
        "met": f"{wanted} is shown",
        "missed": f"{wanted} is asked for, and the opposite is shown",
        "inconclusive": f"{wanted} is asked for, and {rule['n']} questions cannot tell",
    }[rule["outcome"]]
    p = rule["holm_p_met"] if rule["outcome"] != "missed" else rule["holm_p_missed"]
    return f"{what} (difference {rule['found']:+.4f}, p = {p:.2g} after Holm)"


def _counts(task: Mapping[str, Any] | None, metric: str) -> Counts | None:
    found = task if task is None or metric == "acc" else task[metric]
    return None if found is None or task is None else Counts(task["n"], found["improved"], found["regressed"])


def _pooled(counts: Sequence[Counts | None]) -> Counts | None:
    """All questions as one sample; None if a task has no counts.

    Without any difference the improved ones of all discordant pairs are binomial with 1/2 in the pooled table too, so
    the exact test holds for it.
    """
    known = [one for one in counts if one is not None]
    if len(known) < len(counts):
        return None
    return Counts(*(sum(getattr(one, name) for one in known) for name in ("n", "improved", "regressed")))


def _judged(
    task: str | None, role: str, asked: tuple[str, float], counts: Counts | None, alpha: float
) -> dict[str, Any]:
    """One rule, (kind, threshold), before Holm's adjustment."""
    kind, threshold = asked
    rule: dict[str, Any] = {
        "task": task,
        "role": role,
        "kind": kind,
        "threshold": threshold,
        "n": counts and counts.n,
        "found": counts and counts.delta,
        "p_met": None,
        "p_missed": None,
        "holm_p_met": None,
        "holm_p_missed": None,
        "outcome": "inconclusive",
    }
    if counts is None:  # what was not measured is not met, whatever on_inconclusive says
        return {**rule, "outcome": "missed"}
    test = KINDS[kind]
    if test is None:
        effect = statistics.minimum_detectable_effect(counts.n, counts.improved + counts.regressed, alpha=alpha)
        return {**rule, "found": effect, "outcome": "met" if effect <= threshold else "inconclusive"}
    met, missed = test(counts, threshold)
    return {**rule, "p_met": met, "p_missed": missed}
