"""A finished run for tests: a manifest that is valid by the schema, and the files next to it, all invented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from job.common.hashing import hash_file, sealed
from job.evaluation import comparison, statistics
from job.records import Artifact, AttemptRecord, DatasetRecord, ModelRecord, StepMetrics, TaskScores, TrainingRecord
from job.report.report import ReportData
from job.results import manifest
from job.settings.load import load_settings, redacted
from tests.helpers import write_jsonl

HASH = "0123456789abcdef" * 4
MODEL = ModelRecord(
    id="mistralai/Mistral-7B-v0.1",
    revision="27d67f1b5f57dc0953326b2601d68371d40ea8da",
    sha256=HASH,
    architecture="MistralForCausalLM",
    quantization="nf4",
    double_quantization=True,
    dtype="bf16",
    parameters=7_241_732_096,
    trainable_parameters=41_943_040,
)
DATASET = DatasetRecord(
    source="tatsu-lab/alpaca",
    revision="dce01c9b08f87459cf36a430d809084718273017",
    split="train",
    format="alpaca",
    rows=1500,
    skipped={"empty_target": 28},
    sha256=HASH,
    tokens=180_000,
    target_tokens=178_500,
    longest=512,
)
TRAINING = TrainingRecord(
    steps=94,
    examples=3000,
    target_tokens=357_000,
    loss=0.91,
    tokens_per_second=812.5,
    seconds=440.0,
    peak_memory_bytes=14_000_000_000,
    optimizer="adamw_8bit",
    global_batch_size=32,
    micro_batch_tokens=4096,
    substitutions=[],
)
ATTEMPTS = (
    AttemptRecord(
        number=1,
        started="2026-01-05T09:00:00.000Z",
        finished="2026-01-05T09:05:00.000Z",
        outcome="preempted",
        seconds=300.0,
        stage_seconds={"pull": 40.0, "evaluate-base": 60.0, "train": 170.0},
        steps=34,
        repeated_steps=0,
        last_step=34,
        usd_per_hour=2.5,
    ),
    AttemptRecord(
        number=2,
        started="2026-01-05T10:00:00.000Z",
        finished=None,
        outcome="killed",
        seconds=150.0,
        stage_seconds={"pull": 10.0},
        steps=20,
        repeated_steps=0,
        last_step=54,
        usd_per_hour=2.5,
    ),
    AttemptRecord(
        number=3,
        started="2026-01-05T10:10:00.000Z",
        finished="2026-01-05T10:17:00.000Z",
        outcome="complete",
        seconds=420.0,
        stage_seconds={"pull": 10.0, "train": 250.0, "evaluate-adapter": 70.0},
        steps=50,
        repeated_steps=10,
        last_step=94,
        usd_per_hour=2.5,
    ),
)
Sides = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def answers(improved: int, regressed: int, n: int) -> Sides:
    """Records of `n` questions with three choices, of which so many changed; every fifth question is always wrong."""
    sides: Sides = ([], [])
    for number in range(n):
        change = (False, True) if number < improved else (True, False)
        right = change if number < improved + regressed else (number % 5 > 0,) * 2
        for records, correct in zip(sides, right, strict=True):
            picked = 1 if correct else 2
            records.append(
                {
                    "id": f"question-{number}",
                    "doc_hash": HASH,
                    "question": f"Question: What is {number} and one?\nAnswer:",
                    "choices": [f"it is {number + add}" for add in (0, 1, 2)],
                    "log_likelihoods": [-1.0 - abs(choice - picked) for choice in range(3)],
                    "choice_lengths": [7, 7, 7],
                    "prediction": picked,
                    "prediction_norm": picked,
                    "gold": 1,
                    "acc": float(correct),
                    "acc_norm": float(correct),
                }
            )
    return sides


def evidence(**tasks: Sides) -> ReportData:
    """94 steps of metrics, and the answers."""
    metrics = [
        StepMetrics(
            step=step,
            epoch=step / 47,
            loss=1.0 + 0.5 / step,
            learning_rate=2e-4 * (1 - step / 94),
            grad_norm=1.0,
            examples=32,
            target_tokens=3800,
            measured={"seconds": 4.7, "tokens_per_second": 800.0 + step, "memory_bytes": 14_000_000_000 - step},
        )
        for step in range(1, 95)
    ]
    return ReportData(metrics, tasks)


def results(
    found: ReportData, arguments: Sequence[str] = (), run_id: str = "example", **changes: Any
) -> dict[str, Any]:
    """The manifest of a run with these answers, settings and changed records, before anything is published.

    `changes` are those of `build`, and of the sections `run` and `evaluation`.
    """
    tasks = comparison.compare_tasks(
        *({task: _scores(task, sides[side]) for task, sides in found.answers.items()} for side in (0, 1))
    )

    def changed(section: type) -> dict[str, Any]:
        return {one.name: changes.pop(one.name) for one in fields(section) if one.name in changes}

    run = {"id": run_id, "attempts": ATTEMPTS, "finished": "2026-01-05T10:17:00.000Z"}
    built = manifest.build(
        run=manifest.RunSection(**{**run, **changed(manifest.RunSection)}),
        evaluation=manifest.EvaluationSection(**{"tasks": tasks, **changed(manifest.EvaluationSection)}),
        **{
            "settings": redacted(load_settings(["--run.id", "example", *arguments], {})),
            "model": MODEL,
            "dataset": DATASET,
            "training": TRAINING,
            "gate": comparison.evaluate_gate(tasks, metric="acc", min_delta=None, max_regression=None),
            "artifacts": [],
            "evidence": [],
            "image_digest": None,
            "on_demand_usd_per_hour": None,
            **changes,
        },
    )
    manifest.validate(built)
    return built


def publish(folder: Path, found: ReportData, made: dict[str, Any]) -> dict[str, Any]:
    """Writes the run's files and its manifest, with them in it, into a folder; returns the manifest."""
    (folder / "artifacts/evaluation").mkdir(parents=True)
    paths = [write_jsonl(folder / "artifacts/metrics.jsonl", (asdict(step) for step in found.metrics))]
    for task, sides in found.answers.items():
        for side, records in zip(("base", "adapter"), sides, strict=True):
            paths.append(write_jsonl(folder / f"artifacts/evaluation/{task}.{side}.jsonl", records))
    files = [Artifact(p.relative_to(folder).as_posix(), p.stat().st_size, hash_file(p)) for p in paths]
    return write_results(folder, {**made, "artifacts": [asdict(file) for file in files]})


def write_results(folder: Path, made: dict[str, Any]) -> dict[str, Any]:
    """Seals a manifest and writes it into a run's folder; returns it with its seal."""
    complete = manifest.sealed(made)
    (folder / "results.json").write_bytes(sealed(complete))
    return complete


def _scores(task: str, records: list[dict[str, Any]]) -> TaskScores:
    correct = tuple(bool(record["acc"]) for record in records)
    acc, stderr = sum(correct) / len(correct), statistics.standard_error(correct)
    return TaskScores(
        task=task,
        source="allenai/ai2_arc",
        task_hash=HASH,
        version="1.0",
        n=len(correct),
        acc=acc,
        stderr=stderr,
        acc_norm=acc,
        acc_norm_stderr=stderr,
        correct=correct,
        correct_norm=correct,
    )
