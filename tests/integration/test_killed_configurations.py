"""Whole runs in those configurations of `make chaos` that no other test kills: they equal uninterrupted ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.small import CONFIGURATIONS, settings
from tests.integration.whole_runs import attempt, published

WAYS = ("weights", "chat", "chat-unmarked", "split-texts", "ipo-start", "muon", "noise", "stable-decay", "mixture")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the base is, and what the runs read."""
    return tmp_path_factory.mktemp("configurations")


@pytest.mark.long
@pytest.mark.parametrize("name", WAYS)
def test_a_killed_run_ends_as_an_undisturbed_one(folder: Path, name: str) -> None:
    """Killed before the first checkpoint and behind it: the same artifacts to the bit, and both verify."""
    plain = settings(folder, rows=20, questions=8)
    environment = {**plain, **CONFIGURATIONS[name](folder), "JOB_TRAIN__MAX_STEPS": "6"}
    assert attempt(environment, JOB_RUN__ID=name).returncode == 0
    killed = {"JOB_RUN__ID": f"{name}-killed", "JOB_FAULT": "kill@step=1,kill@step=5"}
    assert [attempt(environment, **killed).returncode for _ in range(3)] == [-9, -9, 0]
    output = Path(environment["JOB_RUN__OUTPUT"])
    assert published(output, f"{name}-killed") == published(output, name)
    data = json.loads((output / name / "results.json").read_text(encoding="utf-8"))["dataset"]
    if name.startswith("chat"):
        assert [source["rows"] for source in data["sources"]] == [28, 14]
        assert data["long_rows"]["truncated"] > 0
    if name == "split-texts":
        assert data["long_rows"]["split"] > 0
