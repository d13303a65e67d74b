"""Whole runs with validation, also on two processes: a killed run stops at the same step with the same adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from job.runs.layout import facts_of
from tests.chaos.small import settings, validation
from tests.forked import Forks
from tests.helpers import read_jsonl
from tests.integration.whole_runs import attempt, published


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run that stops early and keeps the best adapter: NF4, dropout, 8-bit Adam."""
    folder = tmp_path_factory.mktemp("validation")
    return {**settings(folder, rows=20, questions=8), **validation(folder)}


def results(output: str | Path, run: str) -> dict[str, Any]:
    """A run's manifest."""
    found: dict[str, Any] = json.loads((Path(output) / run / "results.json").read_bytes())
    return found


def losses(output: str | Path, run: str) -> list[float]:
    """A run's validation losses."""
    return [line["loss"] for line in read_jsonl(Path(output) / run / "artifacts/validation.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(environment: dict[str, str]) -> dict[str, str]:
    """The facts of a run that nobody disturbed, which verifies."""
    done = attempt(environment, JOB_RUN__ID="undisturbed")
    assert done.returncode == 0, done.stderr[-3000:]
    return published(Path(environment["JOB_RUN__OUTPUT"]), "undisturbed")


@pytest.mark.long
def test_killed_around_validations(environment: dict[str, str], undisturbed: dict[str, str], tmp_path: Path) -> None:
    """Killed between a step and its validation, and between that and a checkpoint, a run ends with the same bits."""
    found = results(environment["JOB_RUN__OUTPUT"], "undisturbed")["training"]
    stopped = found["validation"]
    assert stopped["stopped_early"]
    assert 0 < stopped["kept_step"] < found["steps"] < stopped["planned_steps"]
    faults = [
        "kill@validation=4",
        f"sigterm@validation={stopped['kept_step']}",
        f"kill@validation={found['steps']}",
    ]
    codes = []
    while not codes or codes[-1] != 0:
        changes = {"JOB_RUN__ID": "hit", "JOB_RUN__OUTPUT": str(tmp_path), "JOB_FAULT": ",".join(faults)}
        done = attempt(environment, **changes)
        codes.append(done.returncode)
        assert done.returncode in {0, 75, -9}, done.stderr[-3000:]
        assert len(codes) < 9
    assert len(codes) == len(faults) + 1
    assert published(tmp_path, "hit") == undisturbed
    assert results(tmp_path, "hit")["training"]["validation"] | {"seconds": 0} == stopped | {"seconds": 0}


def go(forked: Forks, environment: Mapping[str, str], name: str, **changes: str) -> list[int]:
    """Runs two processes to their end; returns their exit codes."""
    codes, group = forked.run({**environment, "JOB_RUN__ID": name, **changes}, 2, name)
    if any(code not in {0, 1, 75, -9} for code in codes):
        print(*[log.read_text("utf-8")[-2000:] for log in group.logs], sep="\n")
    return codes


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.long
def test_two_processes_share_a_validation(forked: Forks, environment: dict[str, str], tmp_path: Path) -> None:
    """Before training the loss of two is that of one; killed in the middle, two end with the bits of two."""
    elsewhere = {"JOB_RUN__OUTPUT": str(tmp_path)}
    assert go(forked, environment, "whole", **elsewhere) == [0, 0]
    one, two = losses(environment["JOB_RUN__OUTPUT"], "undisturbed"), losses(tmp_path, "whole")
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert go(forked, environment, "killed", **elsewhere, JOB_FAULT="kill@validation=4") == [-9, 1]
    assert go(forked, environment, "killed", **elsewhere) == [0, 0]
    assert facts_of(results(tmp_path, "killed")) == facts_of(results(tmp_path, "whole"))
    assert published(tmp_path, "killed")
