"""Whole runs whose gate is a policy over a group, generated answers and a perplexity: failed, and inconclusive."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import warm
from tests.helpers import alpaca_rows, write_jsonl
from tests.unit.evaluation.example_tasks import write_group, write_prose


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, str]:
    """A tiny model, a step of training, a group of the user's own of three tasks, and a perplexity task."""
    folder = tmp_path_factory.mktemp("policy")
    prose = folder / "prose"
    prose.mkdir()
    given = {
        "RUN__OUTPUT": str(folder / "runs"),
        "MODEL__ID": str(base_folder),
        "DATA__SOURCE": str(write_jsonl(folder / "rows.jsonl", alpaca_rows(8))),
        "EVAL__TASKS": f"{write_group(folder)},{write_prose(prose)}",
        "TRAIN__MAX_LENGTH": "512",
        "TRAIN__MAX_STEPS": "1",
        "TRAIN__GLOBAL_BATCH_SIZE": "4",
        "LORA__RANK": "4",
        "RUN__DEVICE": "cpu",
        "GATE__POLICY": str(folder / "policy.yaml"),
    }
    return {**os.environ, **{f"JOB_{name}": value for name, value in given.items()}}


def run(environment: dict[str, str], name: str, policy: dict[str, Any]) -> tuple[Any, dict[str, Any], Path]:
    """A run with this policy: how it ended, its manifest and its folder."""
    Path(environment["JOB_GATE__POLICY"]).write_text(yaml.safe_dump(policy, sort_keys=False), encoding="utf-8")
    done = warm.run([], {**environment, "JOB_RUN__ID": name})
    folder = Path(environment["JOB_RUN__OUTPUT"]) / name
    assert (folder / "results.json").exists(), done.stderr
    return done, json.loads((folder / "results.json").read_bytes()), folder


@pytest.mark.long
def test_a_policy_that_fails_ends_the_run_with_3(environment: dict[str, str]) -> None:
    """The results are published and verify; each rule's outcome stands on stdout, in manifest, report and `verify`."""
    rules = {
        "own": {"role": "guarded", "metric": "acc", "max_loss": 1.0},
        "said": {"role": "supporting", "metric": "exact_match", "min_gain": 0.5},
        "prose": {"role": "critical", "metric": "bits_per_byte", "min_gain": 1.0},
    }
    done, results, folder = run(environment, "fails", {"tasks": rules})
    assert done.returncode == 3, done.stderr
    judged = results["gate"]["policy"]
    assert judged["outcome"] == "failed"
    assert [(rule["task"], rule["n"]) for rule in judged["rules"]] == [("own", 13), ("said", 6), ("prose", 4)]
    assert judged["rules"][2]["outcome"] == "missed"
    assert "policy: prose (critical), a gain above +1.0000 is required, and the opposite was shown" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("own acc,none inconclusive against the quantized base, ")
    assert "gate not met, policy failed" in done.stdout
    assert "prose: a gain above" in done.stderr
    group = results["evaluation"]["groups"]["own"]
    assert (group["tasks"], group["metrics"]["acc,none"]["n"]) == (["few", "many", "said"], 13)
    page = (folder / "artifacts/report.html").read_text(encoding="utf-8")
    assert "own, acc,none" in page
    assert "| own | 2 | 13 | acc,none | questions |" in (folder / "artifacts/adapter/README.md").read_text("utf-8")
    verified = warm.run(["verify", str(folder)], environment)
    assert verified.returncode == 0, verified.stdout
    assert "policy failed" in verified.stdout


@pytest.mark.long
def test_a_policy_that_cannot_tell_fails_unless_it_says_otherwise(environment: dict[str, str]) -> None:
    """Four questions show no gain of a step: inconclusive, exit code 3; with `on_inconclusive: pass` exit code 0."""
    rules = {"tasks": {"said": {"role": "critical", "metric": "exact_match", "min_gain": 0.0}}}
    done, results, folder = run(environment, "unclear", rules)
    assert (done.returncode, results["gate"]["policy"]["outcome"]) == (3, "inconclusive")
    assert "6 questions cannot tell" in done.stderr
    done, results, other = run(environment, "passes", {**rules, "on_inconclusive": "pass"})
    assert (done.returncode, results["gate"]["passed"]) == (0, True)
    assert "gate met, policy inconclusive" in done.stdout
    for one in (folder, other):
        assert warm.run(["verify", str(one)], environment).returncode == 0

    policy = environment["JOB_GATE__POLICY"]
    compared = warm.run(["compare", str(folder), str(other), "--policy", policy], environment)
    assert compared.returncode == 0, compared.stderr
    assert "policy: said (critical), a gain above +0.0000 is required" in compared.stdout
    Path(policy).write_text(yaml.safe_dump({"tasks": {"other": {"role": "critical", "min_gain": 0.0}}}))
    refused = warm.run(["compare", str(folder), str(other), "--policy", policy], environment)
    assert refused.returncode == 2
    assert "tasks.other: is not scored by this run" in refused.stderr
    planned = warm.run(["plan"], {**environment, "JOB_RUN__ID": "planned"})
    assert "tasks.other: is not scored by this run" in planned.stdout + planned.stderr
