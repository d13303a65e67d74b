"""How Kubernetes' Job controller and JobSet react to a failed pod, by the rules in a manifest."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rules = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """The action for a failed pod, the rule (None: no rule matches, it counts), and the Job's message."""

    action: str
    rule: int | None = None
    message: str = ""


def judge(rules: Rules, exit_code: int | None, conditions: Collection[str] = (), pod: str = "pod") -> Verdict:
    """Applies the first rule that matches; without one the failure counts against backoffLimit.

    Args:
        rules: `spec.podFailurePolicy.rules` of a Job.
        exit_code: The container's; None if the kubelet was lost before it could report it.
        conditions: Types of the pod's conditions that are true.
        pod: Its name, for the message.
    """
    for number, rule in enumerate(rules):
        matching = f"matching {rule['action']} rule at index {number}"
        if (codes := rule.get("onExitCodes")) is not None:
            if exit_code and (exit_code in codes["values"]) == (codes["operator"] == "In"):
                what = f"Container {codes['containerName']} for pod {pod} failed with exit code {exit_code} {matching}"
                return Verdict(rule["action"], number, what)
        elif found := {c["type"] for c in rule["onPodConditions"] if c["status"] == "True"} & set(conditions):
            return Verdict(rule["action"], number, f"Pod {pod} has condition {found.pop()} {matching}")
    return Verdict("Count")


def judge_set(spec: Mapping[str, Any], exit_code: int | None, conditions: Collection[str] = ()) -> str:
    """A JobSet's reaction to a failed pod: its Job fails, and the set has rules for the reason and message of that.

    Args:
        spec: Of the JobSet; its Job must not retry by itself.
        exit_code: See `judge`.
        conditions: See `judge`.
    """
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    verdict = judge(job["podFailurePolicy"]["rules"], exit_code, conditions)
    assert verdict.action in {"FailJob", "Count"}
    assert job["backoffLimit"] == 0
    failed = verdict.action == "FailJob"
    reason = "PodFailurePolicy" if failed else "BackoffLimitExceeded"
    message = verdict.message if failed else "Job has reached the specified backoff limit"
    for rule in spec["failurePolicy"]["rules"]:
        reasons, patterns = rule.get("onJobFailureReasons", []), rule.get("onJobFailureMessagePatterns", [])
        if (not reasons or reason in reasons) and (not patterns or any(re.search(p, message) for p in patterns)):
            return str(rule["action"])
    return "RestartJobSet"
