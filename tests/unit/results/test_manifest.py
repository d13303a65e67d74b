"""The manifest: what it is built from, its seal, and a schema that is enforced."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.common import hashing, host
from job.evaluation import comparison
from job.records import Artifact, AttemptRecord, DatasetRecord, ModelRecord, TrainingRecord
from job.results import manifest
from job.results.summary import summary
from tests.helpers import task_scores as scores

HASH = "0123456789abcdef" * 4


def built(**changes: Any) -> dict[str, Any]:
    """A whole manifest."""
    chance = random.Random(0)
    before, after = ([chance.random() < share for _ in range(200)] for share in (0.4, 0.6))
    attempt = AttemptRecord(
        number=1,
        started="2026-01-05T09:00:00Z",
        finished="2026-01-05T09:10:00Z",
        outcome="complete",
        seconds=600.0,
        stage_seconds={"pull": 100.0, "train": 500.0},
        steps=6,
        repeated_steps=2,
        last_step=6,
        repeated_seconds=20.0,
        usd_per_hour=1.5,
    )
    killed = replace(attempt, finished=None, outcome="killed", repeated_steps=0, repeated_seconds=0.0)
    tasks = comparison.compare_tasks(
        {"arc_easy": scores("arc_easy", before, before)}, {"arc_easy": scores("arc_easy", after, after)}
    )
    given_facts = {
        "run": manifest.RunSection(
            id="a-run", attempts=[killed, replace(attempt, number=2)], finished="2026-01-05T09:10:00Z"
        ),
        "settings": {"run.seed": {"value": 0, "source": "default"}},
        "model": ModelRecord(
            id="m",
            revision=None,
            sha256=HASH,
            architecture="MistralForCausalLM",
            quantization="nf4",
            double_quantization=True,
            dtype="fp32",
            parameters=1000,
            trainable_parameters=10,
        ),
        "dataset": DatasetRecord("d", None, None, "alpaca", 80, {"empty": 2}, HASH, 900, 800, 60),
        "training": TrainingRecord(6, 80, 800, 1.5, 10.0, 80.0, 10**9, "adamw_8bit", 32, 1024, []),
        "evaluation": manifest.EvaluationSection(tasks=tasks),
        "gate": comparison.evaluate_gate(tasks, metric="acc", min_delta=None, max_regression=None),
        "artifacts": [Artifact("b", 1, HASH), Artifact("a", 2, HASH, HASH)],
        "evidence": [Artifact("settings.json", 3, HASH), Artifact("attempts/0001.json", 4, HASH)],
        "image_digest": None,
        "on_demand_usd_per_hour": None,
    }
    return manifest.build(**(given_facts | changes))


def test_a_built_manifest_is_valid_json_and_fits_its_schema() -> None:
    """What is built passes the shipped schema, and reads back from JSON as it is."""
    results = built()
    manifest.validate(results)
    assert json.loads(json.dumps(results)) == results


def test_costs_are_those_of_all_attempts() -> None:
    """What `cost.account` says of the attempts and of the training seconds, and nothing else."""
    results = built(on_demand_usd_per_hour=3.0)
    assert results["cost"]["seconds"] == 1200
    assert results["cost"]["usd"] == pytest.approx(0.5)
    assert results["cost"]["goodput"] == pytest.approx(80 / 1200)
    assert results["cost"]["savings"]["percent"] == pytest.approx(50)
    manifest.validate(results)


def test_files_are_sorted() -> None:
    """The lists do not depend on the order of publishing."""
    assert [artifact["path"] for artifact in built()["artifacts"]] == ["a", "b"]
    assert [file["path"] for file in built()["evidence"]] == ["attempts/0001.json", "settings.json"]
    assert built()["evidence"][1] == {"path": "settings.json", "bytes": 3, "sha256": HASH}


def test_the_seal_is_of_the_rest() -> None:
    """What is built is sealed; what is sealed again after a change has the seal of what it became."""
    results = built()
    assert hashing.unsealed(hashing.sealed(results)) == {key: value for key, value in results.items() if key != "seal"}
    assert results["seal"] == hashing.seal(results)
    changed = manifest.sealed(results | {"schema_version": "2"})
    assert changed["seal"] == hashing.seal(changed) != results["seal"]


@pytest.mark.parametrize("path", ["run.id", "model.sha256", "training.loss", "evaluation.tasks.arc_easy.n", "gate"])
def test_a_manifest_that_lacks_something_is_not_valid(path: str) -> None:
    """Validation names the place."""
    results = copy.deepcopy(built())
    *parents, name = path.split(".")
    place = results
    for parent in parents:
        place = place[parent]
    del place[name]
    place = f"{'.'.join(parents)}: " if parents else "^"
    with pytest.raises(ValueError, match=f"{place}.*{name}.* is a required property"):
        manifest.validate(results)


def test_what_json_cannot_hold_is_not_built() -> None:
    """A loss that is no number would be written as NaN, which is no JSON: it is an error instead."""
    training = TrainingRecord(6, 80, 800, float("nan"), 10.0, 80.0, 10**9, "adamw_8bit", 32, 1024, [])
    with pytest.raises(ValueError, match="JSON compliant"):
        built(training=training)


def test_the_summary_says_it_in_five_lines() -> None:
    """What was trained, both accuracies with the interval, the verdict with its p, the cost, where the results lie."""
    task = built()["evaluation"]["tasks"]["arc_easy"]
    lines = summary(built(), "/x/results.json")
    assert len(lines) == 5
    assert "6 steps on 80 examples (2 rows left out), loss 1.500" in lines[0]
    assert f"{100 * task['base']['acc']:.2f} % -> {100 * task['adapter']['acc']:.2f} %" in lines[1]
    assert "200 questions" in lines[1]
    counts = f"{task['improved']} questions better and {task['regressed']} worse"
    assert lines[2].startswith(f"verdict against the quantized base: improved, {counts}")
    assert lines[3] == "20 min 0 s in 2 attempts, $0.50; 2 min 0 s of it wasted"
    assert lines[4] == (
        "arc_easy better than the quantized base (the unquantized one was not scored); results: /x/results.json"
    )


def test_questions_of_the_user_are_not_called_the_benchmarks() -> None:
    """With JOB_EVAL__DATA, what was scored is the task with the questions of that file, in its line and in the last."""
    results = built()
    results["settings"]["eval.data"] = {"value": {"arc_easy": "s3://bucket/in/ours.jsonl", "other": "x.jsonl"}}
    lines = summary(results, "/x/results.json")
    assert lines[1].startswith("arc_easy (questions of ours.jsonl), 200 questions: accuracy ")
    assert lines[-1].startswith("arc_easy (questions of ours.jsonl) better than ")


def test_the_summary_names_validation() -> None:
    """Which step's adapter is published, and an early stop, are said at the end, not in log and report only."""
    results = built()
    losses = {"first_loss": 3.0, "last_loss": 2.5, "best_loss": 2.0, "best_step": 4}
    results["training"]["validation"] = {**losses, "keep": "best", "stopped_early": True}
    assert summary(results, "/x/results.json")[1] == (
        "validation loss 3.000 -> 2.500, lowest 2.000 after step 4; its adapter is published; stopped early"
    )


def test_without_a_verdict_the_last_line_has_the_results_alone() -> None:
    """A run of which no task was scored."""
    results = built()
    results["evaluation"]["tasks"] = {}
    assert summary(results, "/x/results.json")[-1] == "results: /x/results.json"


@pytest.mark.parametrize(("quantization", "against"), [("nf4", " against the quantized base"), ("none", "")])
def test_figures_without_an_unquantized_base_name_the_base(quantization: str, against: str) -> None:
    """Groups and generated answers are compared with the base that was trained on, and the lines say which that is."""
    results = built()
    results["model"]["quantization"] = quantization
    figures = {"base": 0.4, "adapter": 0.6, "delta": 0.2, "ci95": [0.1, 0.3], "p": 0.01, "improved": 9, "regressed": 1}
    one = {**figures, "verdict": "improved", "tasks": 2, "n": 30, "weight_by_size": True}
    results["evaluation"]["groups"] = {"many": {"tasks": ["arc_easy"], "metrics": {"acc": one}}}
    told = {**figures, "verdict": "improved", "higher_is_better": True, "aggregation": "mean"}
    results["evaluation"]["measured"] = {"sums": {"n": 30, "metrics": {"exact_match": told}}}
    lines = summary(results, "/x/results.json")
    assert lines[-1] == f"many acc improved{against}, sums exact_match improved{against}; results: /x/results.json"
    assert [line for line in lines if f", improved{against}, 9 better and 1 worse, p = 0.01" in line] == [
        line for line in lines if line.startswith(("many, ", "sums, "))
    ]
    assert len([line for line in lines if line.startswith(("many, ", "sums, "))]) == 2


def test_the_machine_and_the_software_are_told() -> None:
    """Versions of all packages that can change a result, and a machine that is really this one."""
    software = host.software()
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "lm-eval"} <= software.keys()
    hardware = host.hardware()
    assert hardware["cpus"] >= 1
    assert hardware["memory_bytes"] > 2**28
    assert hardware["cpu"]


def test_the_commit_comes_from_the_image_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stamp that the image's build left beside the code wins; without stamp and checkout nothing is claimed."""
    monkeypatch.setattr(host, "__file__", str(tmp_path / "job/common/host.py"))
    (tmp_path / "job").mkdir()
    assert host.git_commit() is None
    (tmp_path / "job" / "COMMIT").write_text("abc123\n")
    assert host.git_commit() == "abc123"
