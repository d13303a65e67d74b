"""`results.json`: everything the run claims, with what is needed to check it. Validated before it is published."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from job.common import hashing
from job.records import Artifact, AttemptRecord, DatasetRecord, ModelRecord, TrainingRecord
from job.results.cost import account
from job.runs.layout import REPORT

SCHEMA = Path(__file__).parents[1].joinpath("results.schema.json")
PACKAGES = (
    *("accelerate", "bitsandbytes", "datasets", "lm-eval", "numpy", "peft"),
    *("safetensors", "scipy", "tokenizers", "torch", "transformers", "trl"),
)


def build(
    *,
    run_id: str,
    settings: Mapping[str, Any],
    attempts: Sequence[AttemptRecord],
    finished: str,
    model: ModelRecord,
    dataset: DatasetRecord,
    training: TrainingRecord,
    tasks: Mapping[str, Any],
    gate: Mapping[str, Any],
    artifacts: Sequence[Artifact],
    evidence: Sequence[Artifact],
    image_digest: str | None,
    on_demand_usd_per_hour: float | None,
    gpus: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Puts the manifest together and seals it.

    `tasks` and `gate` are from `compare_tasks` and `judge`; `gpus` are those of all processes where there are several,
    of which each sees one.
    """
    return sealed(
        {
            "schema_version": "1.0",
            "run": {
                "id": run_id,
                "status": "complete",
                "attempts": [asdict(attempt) for attempt in attempts],
                "started": attempts[0].started,
                "finished": finished,
            },
            "settings": settings,
            "model": asdict(model),
            "dataset": asdict(dataset),
            "training": asdict(training),
            "evaluation": {
                "harness": {"name": "lm-eval", "version": metadata.version("lm-eval")},
                "tasks": tasks,
            },
            "gate": gate,
            "artifacts": [asdict(artifact) for artifact in sorted(artifacts, key=lambda a: a.path)],
            "evidence": [
                {"path": file.path, "bytes": file.bytes, "sha256": file.sha256}
                for file in sorted(evidence, key=lambda file: file.path)
            ],
            "hardware": hardware() if gpus is None else {**hardware(), "gpus": gpus},
            "software": {
                "python": platform.python_version(),
                "packages": software(),
                "git": git_commit(),
                "image_digest": image_digest,
            },
            "cost": account(attempts, training.seconds, on_demand_usd_per_hour),
        }
    )


def validate(results: Mapping[str, Any]) -> None:
    """Checks a manifest against the shipped schema.

    Raises:
        ValueError: With the places that do not fit.
    """
    import jsonschema

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    errors = list(jsonschema.Draft202012Validator(schema, format_checker=checker).iter_errors(results))
    if errors:
        raise ValueError("\n".join(f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors))


def software() -> dict[str, str]:
    """Versions of the packages that can change a result."""
    return {name: metadata.version(name) for name in PACKAGES}


def hardware() -> dict[str, Any]:
    """The machine, as far as it can change a result."""
    import psutil
    import torch

    on_gpu = torch.cuda.is_available()
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if on_gpu else []
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [
            {"name": d.name, "memory_bytes": d.total_memory, "capability": f"{d.major}.{d.minor}"} for d in devices
        ],
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
    }


def _cpu_name() -> str:
    """The processor's own name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def git_commit() -> str | None:
    """The commit of the code, from the image's build where it says so, else from the checkout."""
    root = Path(__file__).parents[2]
    stamp = root / "job/COMMIT"
    if stamp.exists():
        return stamp.read_text(encoding="utf-8").strip() or None
    return _output("git", "-C", str(root), "rev-parse", "HEAD") if (root / ".git").exists() else None


def _output(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def sealed(results: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as it will be read back, with its seal; to be done again after a change."""
    plain: dict[str, Any] = json.loads(hashing.sealed(results))
    return plain


def summary(results: Mapping[str, Any], where: str) -> list[str]:
    """What happened and where the files are, in a few lines for a person."""
    training, cost = results["training"], results["cost"]
    trained = f"{training['steps']} steps on {results['dataset']['rows']:,} examples, loss {training['loss']:.3f}"
    speed = f"{training['tokens_per_second'] or 0:,.0f} target tokens/s"
    lines = [f"{results['model']['id']} + LoRA, {trained}, {speed}"]
    for name, task in results["evaluation"]["tasks"].items():
        before, after, delta, low, high = (
            100 * x for x in (task["base"]["acc"], task["adapter"]["acc"], task["delta"], *task["ci95"])
        )
        interval = f"{delta:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}"
        lines.append(f"{name}, {task['n']:,} questions: accuracy {before:.2f} % -> {after:.2f} % ({interval})")
        counts = f"{task['improved']} questions better and {task['regressed']} worse"
        lines.append(f"verdict: {task['verdict']}, {counts}, McNemar p = {task['mcnemar_p']:.2g}")
    lines.append(_cost_line(cost, len(results["run"]["attempts"])))
    if any(artifact["path"] == REPORT for artifact in results["artifacts"]):
        lines.append(f"report: {where.removesuffix('results.json')}{REPORT}")
    lines.append(f"results: {where}")
    return lines


def _cost_line(cost: Mapping[str, Any], attempts: int) -> str:
    """Time, and dollars and energy where they are known."""
    line = f"{cost['seconds']:.0f} s in {attempts} attempt{'s' if attempts > 1 else ''}"
    if cost["usd"] is not None:
        line += f", ${cost['usd']:.2f}"
    if cost["energy_kwh"] is not None:
        line += f", {cost['energy_kwh']:.2f} kWh of the GPU"
    if attempts > 1:
        line += f"; {cost['wasted_seconds']:.0f} s of it wasted"
    return line


def tell(lines: Sequence[str]) -> None:
    """Prints to stdout, where results go."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
