"""Runs of several processes for tests: their settings, starts, results and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.forked import Forks
from tests.helpers import read_jsonl

CLOSE = 1e-5


EXACT = {
    "JOB_MODEL__QUANTIZATION": "nf4",
    "JOB_LORA__DROPOUT": "0.1",
    "JOB_TRAIN__OPTIMIZER": "adamw_8bit",
}
"""What has to be exact between runs of the same number of processes."""


def run_folder(environment: Mapping[str, str], name: str) -> Path:
    """Where a run's files lie."""
    return Path(environment["JOB_RUN__OUTPUT"]) / name


def results(environment: Mapping[str, str], name: str) -> dict[str, Any]:
    """A run's manifest."""
    manifest: dict[str, Any] = json.loads((run_folder(environment, name) / "results.json").read_text("utf-8"))
    return manifest


def metrics(environment: Mapping[str, str], name: str) -> list[dict[str, Any]]:
    """A run's steps."""
    return read_jsonl(run_folder(environment, name) / "artifacts/metrics.jsonl")


def go(forked: Forks, environment: Mapping[str, str], name: str, processes: int, **changes: str) -> list[int]:
    """Runs a group of processes to its end; returns their exit codes."""
    codes, group = forked.run({**environment, "JOB_RUN__ID": name, **changes}, processes, f"{name}-{processes}")
    if any(code not in {0, 1, 75, -9} for code in codes):
        print(*[log.read_text("utf-8")[-2000:] for log in group.logs], sep="\n")
    return codes
