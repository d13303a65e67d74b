"""Manifests of earlier versions lack fields that were added to records since; they still verify."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from job.records import ExecutionPlan
from job.verification.check_history import _with_defaults
from job.verification.differences import find_differences


@dataclass(frozen=True)
class Record:
    """A record with another one in it, as `Training` has the execution plan."""

    steps: int
    execution: ExecutionPlan | None = None
    added: int = 0


def test_fields_that_were_added_to_a_record_in_a_record_have_their_defaults() -> None:
    """Both in the record and in the one inside it; what the manifest says is compared, and a missing record, too."""
    plan = ExecutionPlan(kept_base=True, kept_activations=True, recorded=False, reason="")
    first = {name: getattr(plan, name) for name in ("kept_base", "kept_activations", "recorded", "reason", "forward")}

    def different(claimed: dict[str, Any], record: Record) -> list[str]:
        return [one.where for one in find_differences("x", _with_defaults(claimed, record), asdict(record))]

    older: dict[str, Any] = {"steps": 2, "execution": first}
    assert different(older, Record(2, plan)) == []
    assert different({**older, "execution": {**first, "recorded": True}}, Record(2, plan)) == ["x execution.recorded"]
    offloaded = ExecutionPlan(kept_base=True, kept_activations=True, recorded=False, reason="", offloaded=True)
    assert different(older, Record(2, offloaded)) == ["x execution.offloaded"]
    assert different({"steps": 2}, Record(2)) == []
    assert different({"steps": 2}, Record(2, plan)) == ["x execution"]
