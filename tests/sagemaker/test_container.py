"""The container under SageMaker's conditions: its inputs, interruptions, and outputs."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.common.hashing import hash_file
from job.runs.layout import facts_of
from tests.sagemaker.training_job import LEFT_ALONE, MARKS, ROOT, Ended, TrainingJob

DEMO = ROOT / "job/demo"
METRICS = json.loads((ROOT / "infra/sagemaker/metrics.json").read_text(encoding="utf-8"))
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything lies, with the evaluation channel's file named after its task."""
    path = tmp_path_factory.mktemp("sagemaker")
    shutil.copy(DEMO / "questions.jsonl", path / "arc_easy.jsonl")
    return path


@pytest.fixture(scope="module")
def order(folder: Path) -> Callable[..., TrainingJob]:
    """Makes jobs that train the demo, shortened, from channels. They get the same /opt/ml, one after the other."""

    def make(name: str, **changes: Any) -> TrainingJob:
        # Names and values as different SDKs, templates and tuners write them.
        hyperparameters = {
            "preset": '"demo"',
            "train.max_steps": str(STEPS),
            "Train-Warmup-Steps": "2",
            "eval-limit": "20",
            "JOB_CHECKPOINT__EVERY_STEPS": "3",
            "checkpoint.settle-seconds": "1",
            "run.spot_notices": "off",
            "sagemaker_program": '"train.py"',
        }
        channels = {"training": DEMO / "instructions.jsonl", "model": DEMO / "base"}
        channels["evaluation"] = folder / "arc_easy.jsonl"
        options = {"bucket": folder / f"s3-{name}", "hyperparameters": hyperparameters, "channels": channels}
        return TrainingJob(name, folder / "ml", **(options | changes))

    return make


@pytest.fixture(scope="module")
def undisturbed(order: Callable[..., TrainingJob], folder: Path) -> tuple[Ended, Path]:
    """A job that nothing happened to, and what it left of its /opt/ml."""
    ended = order("undisturbed").run()
    assert ended.code == 0, ended.log[-5:]
    shutil.copytree(folder / "ml", folder / "left")
    return ended, folder / "left"


def results(left: Path) -> dict[str, Any]:
    """The delivered manifest."""
    found: dict[str, Any] = json.loads((left / "model/results.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.long
def test_results_are_delivered(undisturbed: tuple[Ended, Path]) -> None:
    """The model folder holds adapter, manifest and report at its top, the data folder everything else; each hashed."""
    ended, left = undisturbed
    listed = {entry["path"]: entry["sha256"] for entry in results(left)["artifacts"]}
    places = {
        path: left
        / ("model" if re.search("/adapter/|/report.html$", path) else "output/data")
        / re.sub("^artifacts/(adapter/)?", "", path)
        for path in listed
    }
    assert {path: hash_file(place) for path, place in places.items()} == listed
    delivered = {path for part in ("model", "output") for path in (left / part).rglob("*") if path.is_file()}
    assert delivered == {*places.values(), left / "model/results.json"}
    assert (left / "model/adapter_model.safetensors").exists()
    assert (left / "model/report.html").exists()
    assert (left / "output/data/evaluation/arc_easy.adapter.jsonl").exists()
    assert ended.failure is None


@pytest.mark.long
def test_channels_and_platform_are_the_sources(undisturbed: tuple[Ended, Path], folder: Path) -> None:
    """What was trained on came by the channels, and the manifest says so; the rest is as the platform has it."""
    settings = results(undisturbed[1])["settings"]
    data = folder / "ml/input/data"
    expected = {
        "data.source": (f"{data}/training", "sagemaker channel training"),
        "model.id": (f"{data}/model", "sagemaker channel model"),
        "eval.data": ({"arc_easy": f"{data}/evaluation/arc_easy.jsonl"}, "sagemaker channel evaluation"),
        "run.id": ("undisturbed", "platform"),
        "run.output": (str(folder / "ml/checkpoints"), "platform"),
        "run.grace_seconds": (120, "platform"),
        "checkpoint.settle_seconds": (1, "hyperparameters.json"),
    }
    assert {name: (settings[name]["value"], settings[name]["source"]) for name in expected} == expected


@pytest.mark.long
def test_metrics_match_the_log(undisturbed: tuple[Ended, Path]) -> None:
    """Every shipped regex finds its metric in the log, line by line, with the values that the run published."""
    ended, left = undisturbed
    found = {
        metric["Name"]: [float(match[1]) for line in ended.log if (match := re.search(metric["Regex"], line))]
        for metric in METRICS
    }
    lines = (left / "output/data/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    task = results(left)["evaluation"]["tasks"]["arc_easy"]
    assert found["train:step"] == [step["step"] for step in history] == list(range(1, STEPS + 1))
    assert found["train:loss"] == [round(step["loss"], 4) for step in history]
    assert found["train:learning_rate"] == [step["learning_rate"] for step in history]
    assert found["train:tokens_per_second"] == [round(step["measured"]["tokens_per_second"], 1) for step in history]
    assert found["train:memory_bytes"] == [step["measured"]["memory_bytes"] for step in history]
    assert found["checkpoint:step"] == [3, 6, 9, 12]
    assert len(found["checkpoint:seconds"]) == 4
    assert found["eval:base_accuracy_percent"] == [pytest.approx(100 * task["base"]["acc"])]
    assert found["eval:adapter_accuracy_percent"] == [pytest.approx(100 * task["adapter"]["acc"])]
    assert found["eval:gain_percent"] == [pytest.approx(100 * task["delta"])]
    assert found["eval:mcnemar_p"] == [pytest.approx(task["mcnemar_p"], rel=0.01)]
    assert set(found) == {metric["Name"] for metric in METRICS}


def test_metrics_fit_sagemakers_limits() -> None:
    """At most 40, none longer than 500 characters, one group in each, and no name twice."""
    assert len(METRICS) <= 40
    assert len({metric["Name"] for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert len(metric["Regex"]) <= 500
        assert re.compile(metric["Regex"]).groups == 1


@pytest.mark.long
def test_two_interruptions(order: Callable[..., TrainingJob], undisturbed: tuple[Ended, Path], folder: Path) -> None:
    """Stopped once and struck once, with its folder copied late and in no order, a job ends with the same bits."""
    job = order("interrupted", lag=0.3)
    stopped = job.run(lambda line: line["event"] == "steps" and line["done"] >= 5 and is_copied(job, 3))
    assert stopped.code == 75
    assert stopped.failure
    assert stopped.failure.startswith("Preempted (exit code 75): stopped by SIGTERM")
    struck = job.run(lambda line: line["event"] == "stage is done" and line["stage"] == "train", how=signal.SIGKILL)
    assert struck.code == -signal.SIGKILL
    assert 0 < struck.events("resuming")[0]["step"] < STEPS
    lose_the_adapter(folder / "ml/checkpoints/interrupted", job.bucket / "interrupted")
    ended = job.run()
    assert ended.code == 0, ended.log[-5:]
    assert [line["stage"] for line in ended.events("stage is done again: files that it published are missing")] == [
        "train"
    ]
    assert ended.failure is None
    assert facts_of(results(folder / "ml")) == facts_of(results(undisturbed[1]))
    adapters = [left / "model/adapter_model.safetensors" for left in (folder / "ml", undisturbed[1])]
    assert hash_file(adapters[0]) == hash_file(adapters[1])
    copied = {path.name for path in job.bucket.rglob("*")}
    assert not [name for name in copied if name.endswith(MARKS) or ".part" in name]
    listed = [entry["path"] for entry in results(folder / "ml")["evidence"]]
    assert listed
    assert not [path for path in listed if path.endswith(MARKS)], "which the copy in S3 does not have"


def is_copied(job: TrainingJob, step: int) -> bool:
    """Whether all files of a checkpoint are in S3."""
    run = job.machine / "checkpoints" / job.name
    files = [path for path in run.glob(f"checkpoints/step-{step:08d}/**/*") if path.is_file()]
    names = [path.relative_to(run) for path in files if not path.name.endswith(LEFT_ALONE)]
    return bool(names) and all((job.bucket / job.name / name).exists() for name in names)


def lose_the_adapter(run: Path, copy: Path) -> None:
    """What no order of copying excludes: the record that training is done is copied, and the adapter is not."""
    # As SageMaker does, without what a kill has left half-written.
    unmarked = shutil.ignore_patterns(*(f"*{ending}" for ending in LEFT_ALONE))
    shutil.copytree(run / "checkpoints", copy / "checkpoints", dirs_exist_ok=True, ignore=unmarked)
    (copy / "stages").mkdir(exist_ok=True)
    shutil.copy(run / "stages/train.json", copy / "stages")
    (copy / "artifacts/adapter/adapter_model.safetensors").unlink(missing_ok=True)


@pytest.mark.long
def test_a_complete_run_is_delivered_again(
    order: Callable[..., TrainingJob], undisturbed: tuple[Ended, Path], folder: Path
) -> None:
    """A job for a run that is done trains nothing, and fills the folders that the platform collects all the same."""
    job = order("again", bucket=folder / "s3-undisturbed")
    job.hyperparameters = {**job.hyperparameters, "run.id": "undisturbed"}
    shutil.copytree(undisturbed[1] / "checkpoints", folder / "s3-undisturbed", dirs_exist_ok=True)
    ended = job.run()
    assert ended.code == 0, ended.log[-5:]
    assert ended.events("this run is complete already")
    assert not ended.events("steps")
    assert results(folder / "ml") == results(undisturbed[1])
    assert (folder / "ml/model/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"hyperparameters": {"preset": "demo", "train.epocs": "3"}},
            "hyperparameters.json train.epocs: is not a setting",
        ),
        ({"ordered": {"training": {"TrainingInputMode": "Pipe"}}}, "sagemaker channel training: is a pipe"),
        ({"hosts": ("algo-1",), "ordered": {"model": {"S3DistributionType": "ShardedByS3Key"}}}, "is divided among"),
        ({"channels": {"train": DEMO / "instructions.jsonl"}}, "sagemaker channel train: is not a known channel"),
        ({"channels": {"evaluation": DEMO / "questions.jsonl"}}, "a channel's files are named after their tasks"),
    ],
)
def test_a_mistake_is_the_reason_of_the_failure(
    order: Callable[..., TrainingJob], changes: dict[str, Any], expected: str
) -> None:
    """What is wrong with the request ends the job at once, and SageMaker is told what, in 1,024 characters."""
    ended = order("mistaken", **changes).run()
    assert ended.code == 2
    assert ended.failure
    assert ended.failure.startswith("SettingsError (exit code 2): ")
    assert expected in ended.failure
    assert len(ended.failure) <= 1024


def test_a_long_reason_begins_with_what_matters(order: Callable[..., TrainingJob]) -> None:
    """Of many mistakes the first ones are told; the reason is never longer than SageMaker shows."""
    ended = order("mistaken", hyperparameters={f"train.wrong_{n}": "1" for n in range(50)}).run()
    assert ended.failure
    assert len(ended.failure) == 1024
    assert ended.failure.startswith("SettingsError (exit code 2): hyperparameters.json train.wrong_0: is not a setting")


def test_where_nothing_is_copied_the_log_says_so(order: Callable[..., TrainingJob], folder: Path) -> None:
    """Without CheckpointConfig and S3 an interruption loses the run: a warning comes before anything else happens."""
    ended = order("lost", bucket=None).run(lambda line: line["level"] == "warning", how=signal.SIGKILL)
    warning = json.loads(ended.log[0])  # more may come before the machine goes
    assert warning["level"] == "warning"
    assert "this run is not copied to S3" in warning["event"]
    assert warning["output"] == str(folder / "ml/checkpoints")


def test_several_machines_need_one_store(order: Callable[..., TrainingJob]) -> None:
    """The folder that SageMaker copies is another one on each machine: a run on several is told to publish to S3."""
    ended = order("wide", hosts=("algo-1", "algo-2")).run()
    assert ended.code == 2
    assert ended.failure
    assert (
        "JOB_RUN__OUTPUT (platform): is a folder of this machine only; for several machines set s3://" in ended.failure
    )
