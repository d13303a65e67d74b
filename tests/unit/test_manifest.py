"""The manifest: figures that follow from the answers, a gate that judges by the interval, a schema that is enforced."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job import manifest, statistics
from job.records import Artifact, AttemptRecord, DatasetRecord, ModelRecord, TaskScores, TrainingRecord

HASH = "0123456789abcdef" * 4
ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


def scores(task: str, correct: list[bool], correct_norm: list[bool] | None = None) -> TaskScores:
    """The scores of a task with these answers."""
    return TaskScores(
        task=task,
        source="questions.jsonl",
        task_hash=HASH,
        version="1.0",
        n=len(correct),
        acc=sum(correct) / len(correct),
        stderr=statistics.standard_error(correct),
        acc_norm=sum(correct_norm) / len(correct_norm) if correct_norm else None,
        acc_norm_stderr=statistics.standard_error(correct_norm) if correct_norm else None,
        correct=tuple(correct),
        correct_norm=tuple(correct_norm) if correct_norm else None,
    )


def compared(improved: int, regressed: int, n: int = 1000) -> dict[str, Any]:
    """`evaluation.tasks` of a manifest in which so many questions got better and worse, by both metrics."""
    before = [False] * improved + [True] * (n - improved)
    after = [True] * improved + [False] * regressed + [True] * (n - improved - regressed)
    return manifest.compare_tasks({"t": scores("t", before, after)}, {"t": scores("t", after, before)})


@given(ANSWERS, ANSWERS)
def test_tasks_are_compared_by_the_statistics(one: list[tuple[bool, bool]], two: list[tuple[bool, bool]]) -> None:
    """Every figure of a task is `statistics.compare`'s on its answers; p values are Holm's over the tasks."""
    pairs = {"one": one, "two": two}
    base = {name: scores(name, [before for before, _ in answers]) for name, answers in pairs.items()}
    adapter = {name: scores(name, [after for _, after in answers]) for name, answers in pairs.items()}
    tasks = manifest.compare_tasks(base, adapter)
    expected = {name: statistics.compare(base[name].correct, adapter[name].correct) for name in pairs}
    corrected = statistics.holm([expected[name].mcnemar_p for name in pairs])
    for (name, task), holm_p in zip(tasks.items(), corrected, strict=True):
        same = ("delta", "ci95", "mcnemar_p", "improved", "regressed", "minimum_detectable_effect", "n")
        assert [task[key] for key in same] == [getattr(expected[name], key) for key in same]
        assert task["holm_p"] == holm_p
        assert task["verdict"] == statistics.verdict(holm_p, expected[name].ci95)
        assert (task["base"]["acc"], task["adapter"]["acc"]) == (expected[name].base, expected[name].adapter)
        assert task["acc_norm"] is None


def test_a_verdict_holds_for_all_tasks_at_once() -> None:
    """What is significant alone need not be among several tasks: the word is about the corrected p."""
    before, after = [False] * 8 + [True] * 92, [True] * 8 + [False] + [True] * 91
    base, adapter = scores("x", before), scores("x", after)
    alone = manifest.compare_tasks({"a": base}, {"a": adapter})["a"]
    among = manifest.compare_tasks(dict.fromkeys("abc", base), dict.fromkeys("abc", adapter))["a"]
    assert alone["mcnemar_p"] == among["mcnemar_p"] < 0.05
    assert alone["verdict"] == "improved"
    assert among["holm_p"] == pytest.approx(3 * alone["mcnemar_p"])
    assert among["verdict"] == "inconclusive"


def test_acc_norm_is_compared_apart() -> None:
    """The second metric has its own comparison, and its own correction, over the tasks that have it."""
    task = compared(improved=40, regressed=10)["t"]
    assert (task["improved"], task["regressed"]) == (40, 10)
    assert (task["acc_norm"]["improved"], task["acc_norm"]["regressed"]) == (10, 40)
    assert task["acc_norm"]["delta"] == -task["delta"]
    assert task["acc_norm"]["holm_p"] == task["mcnemar_p"]


def test_no_gate_is_no_verdict() -> None:
    """Where nothing was asked for, there is nothing to pass."""
    assert manifest.gate(compared(0, 500), "acc", None, None) is None


@given(st.integers(0, 100), st.integers(0, 100), st.floats(-0.1, 0.1))
def test_the_gate_asks_the_interval_for_the_gain(improved: int, regressed: int, least: float) -> None:
    """It passes exactly where the whole interval is at or above the gain that was asked for."""
    tasks = compared(improved, regressed)
    reasons = manifest.gate(tasks, "acc", least, None)
    assert (reasons == []) is (tasks["t"]["ci95"][0] >= least)


@given(st.integers(0, 100), st.integers(0, 100), st.floats(0, 0.1))
def test_the_gate_asks_the_interval_for_the_loss(improved: int, regressed: int, most: float) -> None:
    """It passes exactly where no loss greater than the allowed one is within the interval."""
    tasks = compared(improved, regressed)
    reasons = manifest.gate(tasks, "acc", None, most)
    assert (reasons == []) is (-tasks["t"]["ci95"][0] <= most)


def test_a_point_above_the_gate_is_not_enough() -> None:
    """A gain that may be chance does not pass, though its point lies above what was asked for."""
    tasks = compared(improved=12, regressed=8)
    assert tasks["t"]["delta"] == pytest.approx(0.004)
    (reason,) = manifest.gate(tasks, "acc", 0.0, None) or []
    assert reason.startswith("t: acc may have gained only -0.00")
    assert reason.endswith("the gate asks for +0.0000")


def test_the_gate_looks_at_the_metric_it_was_told() -> None:
    """A gain in one metric does not pass for the other; a task that lacks the metric does not pass."""
    tasks = compared(improved=80, regressed=0)
    assert manifest.gate(tasks, "acc", 0.01, 0.0) == []
    reasons = manifest.gate(tasks, "acc_norm", 0.01, 0.0) or []
    assert len(reasons) == 2
    assert "may have lost 0.09" in reasons[1]
    tasks["t"]["acc_norm"] = None
    assert manifest.gate(tasks, "acc_norm", None, 0.5) == ["t has no acc_norm"]


def test_one_task_below_the_gate_is_enough() -> None:
    """All tasks have to pass; those that do not are named."""
    tasks = {"good": compared(80, 0)["t"], "bad": compared(0, 80)["t"]}
    (reason,) = manifest.gate(tasks, "acc", None, 0.01) or []
    assert reason.startswith("bad: ")


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
    )
    killed = replace(attempt, finished=None, outcome="killed", repeated_steps=0)
    tasks = manifest.compare_tasks(
        {"arc_easy": scores("arc_easy", before, before)}, {"arc_easy": scores("arc_easy", after, after)}
    )
    given_facts = {
        "run_id": "a-run",
        "settings": {"run.seed": {"value": 0, "source": "default"}},
        "attempts": [killed, replace(attempt, number=2)],
        "finished": "2026-01-05T09:10:00Z",
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
        "tasks": tasks,
        "gate_metric": "acc",
        "gate_reasons": None,
        "artifacts": [Artifact("b", 1, HASH), Artifact("a", 2, HASH, HASH)],
        "image_digest": None,
        "usd_per_hour": 1.5,
    }
    return manifest.build(**(given_facts | changes))


def test_a_built_manifest_is_valid_json_and_fits_its_schema() -> None:
    """What is built passes the shipped schema, and reads back from JSON as it is."""
    results = built()
    manifest.validate(results)
    assert json.loads(json.dumps(results)) == results


def test_costs_add_up_over_the_attempts() -> None:
    """Seconds, dollars and repeated steps are those of all attempts; without a price there are no dollars."""
    cost = built()["cost"]
    assert cost["seconds"] == 1200
    assert cost["usd"] == pytest.approx(0.5)
    assert cost["repeated_steps"] == 2
    assert built(usd_per_hour=None)["cost"]["usd"] is None


def test_artifacts_are_sorted_and_the_gate_is_told() -> None:
    """The list does not depend on the order of publishing; a gate that was not set is told apart from one met."""
    assert [artifact["path"] for artifact in built()["artifacts"]] == ["a", "b"]
    assert built()["gate"] == {"metric": "acc", "passed": None, "reasons": []}
    assert built(gate_reasons=[])["gate"]["passed"] is True
    assert built(gate_reasons=["no"])["gate"] == {"metric": "acc", "passed": False, "reasons": ["no"]}


@pytest.mark.parametrize("path", ["run.id", "model.sha256", "training.loss", "evaluation.tasks.arc_easy.n", "gate"])
def test_a_manifest_that_lacks_something_is_not_valid(path: str) -> None:
    """Validation names the place."""
    results = copy.deepcopy(built())
    *parents, name = path.split(".")
    place = results
    for parent in parents:
        place = place[parent]
    del place[name]
    with pytest.raises(ValueError, match=f"{'.'.join(parents)}: .*{name}.* is a required property"):
        manifest.validate(results)


def test_what_json_cannot_hold_is_not_built() -> None:
    """A loss that is no number would be written as NaN, which is no JSON: it is an error instead."""
    training = TrainingRecord(6, 80, 800, float("nan"), 10.0, 80.0, 10**9, "adamw_8bit", 32, 1024, [])
    with pytest.raises(ValueError, match="JSON compliant"):
        built(training=training)


def test_the_summary_says_it_in_five_lines() -> None:
    """What was trained, both accuracies with the interval, the verdict with its p, the cost, where the results lie."""
    task = built()["evaluation"]["tasks"]["arc_easy"]
    lines = manifest.summary(built(), "/x/results.json")
    assert len(lines) == 5
    assert "6 steps on 80 examples, loss 1.500" in lines[0]
    assert f"{100 * task['base']['acc']:.2f} % -> {100 * task['adapter']['acc']:.2f} %" in lines[1]
    assert "200 questions" in lines[1]
    assert lines[2].startswith(f"verdict: improved, {task['improved']} questions better and {task['regressed']} worse")
    assert "in 2 attempts, $0.50" in lines[3]
    assert lines[4] == "results: /x/results.json"


def test_the_machine_and_the_software_are_told() -> None:
    """Versions of all packages that can change a result, and a machine that is really this one."""
    software = manifest.software()
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "lm-eval"} <= software.keys()
    hardware = manifest.hardware()
    assert hardware["cpus"] >= 1
    assert hardware["memory_bytes"] > 2**28
    assert hardware["cpu"]


def test_the_commit_comes_from_the_image_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stamp that the image's build left beside the code wins; without stamp and checkout nothing is claimed."""
    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "job" / "manifest.py"))
    (tmp_path / "job").mkdir()
    assert manifest.git_commit() is None
    (tmp_path / "job" / "COMMIT").write_text("abc123\n")
    assert manifest.git_commit() == "abc123"
