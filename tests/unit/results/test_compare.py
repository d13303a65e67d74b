"""`compare`: what differs between two runs, and their adapters paired by question."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

from job.errors import DataError, SettingsError, VerificationError
from job.evaluation import statistics
from job.records import GroupSpec
from job.results.compare import compare, evaluate_by_policy, gate_reasons
from job.results.compare_text import as_markdown, as_text
from job.results.reader import PublishedRun, open_run, read_published
from tests.published_run import forge, pairs, publish_run, rewrite

QUIZ = "artifacts/evaluation/quiz.adapter.jsonl"


def read(folder: Path) -> PublishedRun:
    """A published run."""
    return read_published(open_run(str(folder)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[PublishedRun, PublishedRun]:
    """A has 30 of 60 questions right; B has 12 of A's others right and 2 of A's wrong, and a task more."""
    folder = tmp_path_factory.mktemp("runs")
    right = [(False, n < 30) for n in range(60)]
    better = [(False, 2 <= n < 42) for n in range(60)]
    publish_run(folder / "a", {"quiz": right, "riddles": pairs(20)})
    publish_run(
        folder / "b",
        {"quiz": better, "riddles": pairs(20), "more": pairs(10)},
        attempts=2,
        settings=["--train.learning_rate=1e-3", "--cost.usd_per_hour=2"],
    )
    return read(folder / "a"), read(folder / "b")


def test_adapters_are_paired_by_question(runs: tuple[PublishedRun, PublishedRun]) -> None:
    """Every figure is `statistics.compare`'s of A's answers with B's, corrected over the tasks that both were asked."""
    found = compare(*runs)
    quiz = found["tasks"]["quiz"]
    expected = statistics.compare([n < 30 for n in range(60)], [2 <= n < 42 for n in range(60)])
    assert (quiz["a"]["acc"], quiz["b"]["acc"]) == (0.5, pytest.approx(40 / 60))
    assert (quiz["improved"], quiz["regressed"], quiz["delta"]) == (12, 2, expected.delta)
    assert (quiz["ci95"], quiz["mcnemar_p"]) == (expected.ci95, expected.mcnemar_p)
    assert quiz["holm_p"] == statistics.holm([expected.mcnemar_p, 1.0])[0]
    assert quiz["verdict"] == "improved"
    assert found["tasks"]["riddles"]["verdict"] == "inconclusive"
    assert found["only"] == {"a": [], "b": ["more"]}


def test_each_adapter_is_shown_with_its_own_bases(tmp_path: Path) -> None:
    """What quantization cost, training gave and both gave are the manifest's, for both runs; without any, no table."""
    quiz = [(n >= 20, n >= 8) for n in range(60)]
    publish_run(tmp_path / "a", {"quiz": quiz}, original={"quiz": [True] * 60})
    publish_run(tmp_path / "b", {"quiz": quiz})
    publish_run(tmp_path / "c", {"quiz": quiz})
    forge(tmp_path / "c", lambda results: results["model"].update(quantization="none"))
    a, b, c = (read(tmp_path / name) for name in "abc")
    found = compare(a, b)["bases"]["quiz"]
    one = a.results["evaluation"]["full_precision"]["tasks"]["quiz"]
    for name, told in (("quantization", "base_versus_original"), ("both", "adapter_versus_original")):
        expected = one[told]["acc"]
        assert found["a"][name] == {key: expected[key] for key in ("delta", "ci95", "holm_p", "verdict")}
        assert found["b"][name] is None
    assert (found["a"]["original"], found["a"]["base"], found["b"]["original"]) == (1.0, 40 / 60, None)
    plain = compare(a, c)["bases"]["quiz"]["b"]
    assert (plain["original"], plain["quantization"]) == (plain["base"], None)
    assert plain["both"] == plain["training"]
    text = "\n".join(as_text(compare(a, b)))
    assert "Each adapter and its own bases" in text
    assert "quiz, quantization                   -33.33 (" in text
    assert "Each adapter and its own bases" not in "\n".join(as_markdown(compare(b, b)))


def measured_by(run: PublishedRun, task: str, values: list[float]) -> PublishedRun:
    """A run that was asked of all its tasks only one, and one without choices, with these values of the adapter's."""
    hashes = dict.fromkeys(("doc_hash", "prompt_hash", "target_hash"), "0" * 64)
    rest: dict[str, Any] = {"prompt": "", "target": "", "responses": [], "filtered": {}}
    rows = [{"id": str(n), **hashes, **rest, "values": {"f1,none": [one, 1.0]}} for n, one in enumerate(values)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = "artifacts/evaluation/said.adapter.jsonl"
    run.store.write(path, data)
    said = {"kind": "generate_until", "source": "s", "version": "1", "num_fewshot": 0}
    said |= {
        "reused_from": {"adapter": None},
        "metrics": {"f1,none": {"aggregation": "mean", "higher_is_better": True}},
    }
    evaluation = run.results["evaluation"]
    evaluation = {**evaluation, "tasks": {task: evaluation["tasks"][task]}, "measured": {"said": said}}
    file = {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    results = {**run.results, "evaluation": evaluation, "artifacts": [*run.results["artifacts"], file]}
    return replace(run, results=results)


def test_tasks_without_choices_are_paired_by_question(runs: tuple[PublishedRun, PublishedRun]) -> None:
    """Figures, interval and p value are scipy's paired t test of the adapters' answers, also where no task has choices.

    A task that only one run was asked is named, and the gate judges by the metric of the common ones.
    """
    chance = random.Random(1)
    before = [chance.random() for _ in range(30)]
    after = [one + chance.gauss(0.2, 0.2) for one in before]
    a, b = measured_by(runs[0], "quiz", before), measured_by(runs[1], "more", after)
    found = compare(a, b)
    metric, theirs = found["measured"]["said"]["metrics"]["f1,none"], ttest_rel(after, before)
    assert (metric["a"], metric["b"]) == pytest.approx((sum(before) / 30, sum(after) / 30))
    assert metric["ci95"] == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert (metric["p"], metric["verdict"]) == (pytest.approx(theirs.pvalue), "improved")
    assert (found["tasks"], found["only"]) == ({}, {"a": ["quiz"], "b": ["more"]})
    assert gated(a, b) == gated(a, b, metric="f1,none") == ["quiz was not asked of B"]
    drop = f"said: f1,none regressed by {metric['delta']:.4f}, p = {theirs.pvalue:.2g}"
    assert gated(b, a, metric="f1,none") == ["more was not asked of B", drop]
    with pytest.raises(SettingsError, match="--metric: is bleu,none, which no task has"):
        gated(a, b, metric="bleu,none")


def test_a_first_stage_is_compared_without_the_path_of_its_metrics(runs: tuple[PublishedRun, PublishedRun]) -> None:
    """Of a run that trained in two stages against one that did not."""
    a, b = runs
    first = {"method": "sft", "steps": 9, "loss": 1.75}
    training = {**b.results["training"], "first_stage": first | {"metrics": {"path": "sft/artifacts/metrics.jsonl"}}}
    found = compare(a, replace(b, results={**b.results, "training": training}))["training"]
    stage = {name: pair for name, pair in found.items() if name.startswith("first_stage.")}
    assert stage == {f"first_stage.{name}": {"a": None, "b": value} for name, value in first.items()}


def test_groups_and_exports_are_compared(tmp_path: Path) -> None:
    """Groups that both runs have, by the adapters' answers; formats with their accuracy and what each lost."""
    spec = GroupSpec("1", ("quiz", "riddles"), {"acc,none": False}, {"acc,none": True})
    riddles = pairs(20)
    merged = [right for _, right in pairs(60, improved=9)]
    one = publish_run(tmp_path / "a", {"quiz": pairs(60), "riddles": riddles}, groups={"own": spec, "mine": spec})
    two = publish_run(
        tmp_path / "b",
        {"quiz": pairs(60, improved=9)},
        exported={"dequantized": merged},
    )
    three = publish_run(
        tmp_path / "c",
        {"quiz": pairs(60, improved=40), "riddles": riddles},
        groups={"own": spec, "mine": replace(spec, metrics={"acc,none": True})},
    )
    found = compare(read(one), read(three))
    group = found["groups"]["own"]["metrics"]["acc,none"]
    sides = [[right for _, right in pairs(60, improved=count)] for count in (0, 40)]
    means = [(sum(side) / 60 + sum(right for _, right in riddles) / 20) / 2 for side in sides]
    assert (group["a"], group["b"], group["delta"]) == pytest.approx((*means, means[1] - means[0]))
    assert (group["test"], group["n"], group["tasks"]) == ("stratified_t", 80, 2)
    assert found["groups_not_compared"] == ["mine"]
    text = "\n".join(as_text(found))
    assert "own, acc,none" in text
    assert 'groups that are not compared, since the runs do not have the same: ["mine"]' in text
    path = tmp_path / "policy.yaml"
    path.write_text("tasks: {own: {role: guarded, metric: acc, max_loss: 0.01}}\n", encoding="utf-8")
    assert evaluate_by_policy(found, str(path))["passed"]

    found = compare(read(one), read(two))
    assert (found["groups"], found["groups_not_compared"]) == ({}, ["mine", "own"])
    export = found["exports"]["merged"]
    assert export["a"] is None
    assert export["b"]["tasks"]["quiz"]["acc"] == sum(merged) / 60
    assert export["b"]["tasks"]["quiz"]["versus_adapter"]["delta"] == 0
    text = "\n".join(as_text(found))
    assert re.search(rf"merged, quiz +- +{100 * sum(merged) / 60:.2f} %", text)
    assert re.search(r"merged, quiz, less adapter +- +\+0\.00 \(", text)
    assert "B less A" not in text


def test_exports_of_two_runs_are_paired_by_question(tmp_path: Path) -> None:
    """Where both have the format and scored it: B's answers against A's, as `statistics.compare` has them."""
    answers = [[right for _, right in pairs(60, improved=count)] for count in (9, 30)]
    one, two = (
        publish_run(tmp_path / name, {task: pairs(60) for task in tasks}, exported={"dequantized": right})
        for name, tasks, right in zip("ab", (["riddles", "quiz"], ["quiz"]), answers, strict=True)
    )
    forge(two, lambda results: results["evaluation"].update(precision={"dtype": "fp16", "sums": "fp32", "reason": ""}))
    found = compare(read(one), read(two))
    expected = statistics.compare(*answers)
    assert list(found["exports"]["merged"]["paired"]) == ["quiz"]  # B was not asked the riddles
    paired = found["exports"]["merged"]["paired"]["quiz"]
    assert (paired["delta"], paired["ci95"], paired["holm_p"]) == (expected.delta, expected.ci95, expected.mcnemar_p)
    assert paired["verdict"] == "improved"
    assert found["differs"]["scoring"] == {"dtype": {"a": "fp32", "b": "fp16"}}
    other = publish_run(tmp_path / "c", {"quiz": pairs(60)})
    half = dict.fromkeys(("dtype", "sums"), "fp16")
    forge(other, lambda results: results["evaluation"].update(precision={**half, "reason": ""}))
    assert compare(read(two), read(other))["differs"]["scoring"] == {"sums": {"a": "fp32", "b": "fp16"}}
    assert re.search(rf"merged, quiz, B less A +\+{100 * expected.delta:.2f} \(", "\n".join(as_text(found)))
    (two / "artifacts/evaluation/quiz.merged-dequantized.jsonl").write_bytes(b"{}\n")
    with pytest.raises(VerificationError, match="merged-dequantized"):
        compare(read(one), read(two))


def test_the_other_way_round_is_the_opposite(runs: tuple[PublishedRun, PublishedRun]) -> None:
    """B against A has the difference with the other sign."""
    one, two = compare(*runs)["tasks"]["quiz"], compare(*reversed(runs))["tasks"]["quiz"]
    assert two["delta"] == -one["delta"]
    assert two["ci95"] == (-one["ci95"][1], -one["ci95"][0])
    assert two["verdict"] == "regressed"


def test_the_same_run_is_no_difference(runs: tuple[PublishedRun, PublishedRun]) -> None:
    """Equal predictions are no test that could not tell: the table and the last line say that nothing differs."""
    same = as_text(compare(runs[0], runs[0]))
    assert all(row.rstrip().endswith("no difference") for row in same if row.lstrip().startswith("quiz,"))
    assert same[-1] == "no difference: both runs have the same adapter"
    found = compare(runs[0], runs[0])
    assert {"a": None, "b": None} in found["cost"].values()  # left out of the table
    assert not any(row.split()[1:] == ["-", "-"] for row in same)
    found["training"] |= {"execution.packed": {"a": True, "b": True}, "adapter.kind": {"a": "lora", "b": "adalora"}}
    assert [row.split()[0] for row in as_text(found) if "adapter, kind" in row or "packed" in row] == ["adapter,"]
    different = as_text(compare(*runs))
    assert [row.split()[-1] for row in different if row.lstrip().startswith("quiz, acc ")] == ["improved"]
    assert not any(line.startswith("no difference:") for line in different)


def test_an_export_differs_in_its_exports_and_cost_only(tmp_path: Path) -> None:
    """What both have of the finished run is one line, not a table for each; another adapter has its tables."""
    publish_run(tmp_path / "a", {"quiz": pairs(60, improved=14)})
    results = read(tmp_path / "a")
    exported = {"id": "a", "results_sha256": results.sha256, "attempts": 1}
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    forge(tmp_path / "b", lambda results: results["run"].update(exported_run=exported))
    forge(tmp_path / "b", lambda results: results["cost"].update(seconds=results["cost"]["seconds"] + 1))
    forge(tmp_path / "b", lambda results: results["settings"]["export.formats"].update(value=["fp8"]))
    lines = as_text(compare(results, read(tmp_path / "b")))
    assert [line for line in lines if line and not line.startswith(" ")] == [
        "Runs",
        "What differs",
        "Cost",
        "no difference: what was trained and scored is the same; one of the two runs exports it, or both do",
    ]
    assert [line.split()[0] for line in lines[lines.index("Cost") + 3 :] if line.startswith("  ")] == ["seconds"]
    forge(tmp_path / "b", lambda results: results["training"].update(loss=9.0))
    assert "Adapters" in as_text(compare(results, read(tmp_path / "b")))


def test_what_differs_is_told_and_nothing_else(runs: tuple[PublishedRun, PublishedRun]) -> None:
    """Settings, model, data, software and hardware: both values where they differ; names and places do not count."""
    found = compare(*runs)
    assert found["differs"] == {
        "settings": {
            "train.learning_rate": {"a": 2e-4, "b": 1e-3},
            "cost.usd_per_hour": {"a": None, "b": 2.0},
        },
        "model": {},
        "dataset": {},
        "software": {},
        "hardware": {},
        "scoring": {},
    }
    assert found["cost"]["attempts"] == {"a": 1, "b": 2}
    assert found["cost"]["seconds"] == {"a": 60.5, "b": 121.0}
    assert found["cost"]["repeated_steps"] == {"a": 0, "b": None}  # the first attempt of B was killed in training
    table = [row.split() for row in as_text(found)]
    assert ["repeated", "steps", "0", "unknown"] in table
    assert found["training"]["loss"]["a"] == found["training"]["loss"]["b"]
    assert compare(runs[0], runs[0])["differs"]["settings"] == {}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that may be damaged."""
    answers = {"quiz": pairs(20, improved=4)}
    return publish_run(tmp_path / "a", answers), publish_run(tmp_path / "b", answers)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The adapter's answers."""
    return [json.loads(line) for line in (folder / QUIZ).read_bytes().splitlines()]


def put(folder: Path, records: list[dict[str, Any]]) -> None:
    """Publishes other ones."""
    rewrite(folder, QUIZ, "".join(json.dumps(record) + "\n" for record in records).encode())


def test_other_questions_are_refused(pair: tuple[Path, Path]) -> None:
    """Ids that differ, in their order too, and a number that differs."""
    records = rows(pair[1])
    for other in ([*records[1:], records[0]], records[:-1]):
        put(pair[1], other)
        with pytest.raises(DataError, match="quiz: the runs were asked other questions, 20 and") as error:
            compare(*map(read, pair))
        assert error.value.exit_code == 65


def test_questions_in_other_words_are_refused(pair: tuple[Path, Path]) -> None:
    """The same ids with another hash: asked otherwise, and so not comparable."""
    records = rows(pair[1])
    records[3]["prompt_hash"] = "0" * 64
    put(pair[1], records)
    with pytest.raises(DataError, match="quiz: the questions of the two runs have different texts; their hashes are"):
        compare(*map(read, pair))


def test_runs_without_a_common_task_are_refused(tmp_path: Path) -> None:
    """There is nothing to compare them by."""
    one = publish_run(tmp_path / "a", {"quiz": pairs(20)})
    two = publish_run(tmp_path / "b", {"riddles": pairs(20)})
    with pytest.raises(DataError, match="runs a and b have no task in common"):
        compare(read(one), read(two))


def test_damaged_runs_are_refused(pair: tuple[Path, Path]) -> None:
    """Answers, or a manifest, that are not what was published end with 4 and the file's name."""
    data = (pair[1] / QUIZ).read_bytes()
    run = read(pair[1])
    for damaged, why in ((data[:-1] + b" ", "altered"), (None, "missing"), (data + b"\n", "more than")):
        (pair[1] / QUIZ).unlink() if damaged is None else (pair[1] / QUIZ).write_bytes(damaged)
        with pytest.raises(VerificationError, match=rf"b/{QUIZ}.*{why}"):
            compare(read(pair[0]), run)
    path = pair[1] / "results.json"
    path.write_bytes(path.read_bytes().replace(b'"steps": 4', b'"steps": 5'))
    with pytest.raises(VerificationError, match=r"results\.json: was altered"):
        read(pair[1])
    forge(pair[1], lambda results: results.update(artifacts=[]))
    with pytest.raises(VerificationError, match="is not among the artifacts"):
        compare(*map(read, pair))


def gated(a: PublishedRun, b: PublishedRun, **thresholds: Any) -> list[str]:
    """Why B does not pass."""
    asked = {"metric": "acc", "min_delta": None, "max_regression": None, **thresholds}
    return gate_reasons(compare(a, b), **asked)


def test_the_gate_without_thresholds_is_about_significance(runs: tuple[PublishedRun, PublishedRun]) -> None:
    """A significantly worse B does not pass; one that may be worse by chance does."""
    a, b = runs
    assert gated(a, b) == []
    assert gated(a, a) == []
    asked, worse = gated(b, a)
    assert asked == "more was not asked of B"
    assert worse.startswith("quiz: acc regressed by 0.1667, p = ")


def test_a_task_that_lacks_the_metric_does_not_pass(pair: tuple[Path, Path]) -> None:
    """One that both runs were asked, so that nothing would be judged by that metric."""
    for folder in pair:
        put(folder, [{**row, "acc_norm": None} for row in rows(folder)])
    assert gated(*map(read, pair), metric="acc_norm") == ["quiz has no acc_norm"]


def test_the_gate_with_thresholds_is_the_jobs(runs: tuple[PublishedRun, PublishedRun]) -> None:
    """The interval has to be at or above what was asked for, for every task that both were asked."""
    low = compare(*runs)["tasks"]["quiz"]["ci95"][0]
    assert [reason.split(":")[0] for reason in gated(*runs, min_delta=low)] == ["riddles"]
    assert [reason.split(":")[0] for reason in gated(*runs, min_delta=low + 1e-6)] == ["quiz", "riddles"]
    assert gated(*runs, max_regression=0.2) == []
    assert [reason.split(":")[0] for reason in gated(*runs, max_regression=0.1)] == ["riddles"]
    assert gated(*runs, metric="acc_norm", max_regression=1.0) == []


def test_it_is_told_in_text_and_markdown(runs: tuple[PublishedRun, PublishedRun]) -> None:
    """The same tables in both; the adapters' differences in points, with interval and verdict."""
    found = {**compare(*runs), "gate": {"passed": False, "reasons": ["quiz: no"]}}
    text, marked = "\n".join(as_text(found)), "\n".join(as_markdown(found))
    for line in ("only B was asked", "gate: not met: quiz: no", "50.00 %", "66.67 %", "+16.67", "improved"):
        assert line in text
        assert line in marked
    assert "train.learning_rate  0.0002  0.001" in text
    assert "| train.learning\\_rate | 0.0002 | 0.001 |" in marked
    assert "### What differs\n\nnothing" in "\n".join(as_markdown(compare(runs[0], runs[0])))
