"""The stages of a run, and every path below a run's folder, which no other module spells out.

    results.json                                 the manifest, written last
    model.sig                                    signature of the manifest and the artifacts, written right before it
    settings.json                                the settings that the run began with
    lease.json                                   which attempt owns the run
    attempts/0001.json                           run log: one record for each attempt
    stages/<stage>.json                          the result of a finished stage
    stages/base.json                             which quantized base the run began with
    stages/first-values.safetensors              the adapter's first values, where the data or the base decide them
    stages/exported-run.json                     the finished run whose stages this run took over (JOB_EXPORT__RUN)
    checkpoints/step-00000040/0003/<file>        a checkpoint's files, by the attempt that wrote them
    checkpoints/step-00000040/COMMITTED.json     its commit marker, written after them
    artifacts/...                                the results: adapter, metrics, answers, report
    artifacts/export/<format>/<file>             the model in a requested format
    scores/...                                   answers of an evaluation that is going on
    faults/<fault>                               injected faults that have fired
    pushed/<target>-<hash of its place>.json     where the complete run was pushed, written after the manifest
    served/<format>-<server>.json                what serve-check --record found, written after the manifest
    sft/...                                      the first stage of JOB_TRAIN__METHOD=sft,dpo: a complete run

How to add a stage: name it in `Stage` at its position in the order (and in `BUILT_ON` if another one works with what it
publishes), then call it in `job/pipeline.py`. Faults, logs, times and costs know it by the enum.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from job.common import methods


class Stage(StrEnum):
    """The stages of a run, in their order."""

    PULL = "pull"
    EVALUATE_BASE = "evaluate-base"
    TRAIN = "train"
    EVALUATE_ADAPTER = "evaluate-adapter"
    EXPORT = "export"
    PUBLISH = "publish"


BUILT_ON: Mapping[str, tuple[Stage, ...]] = {Stage.TRAIN: (Stage.EVALUATE_ADAPTER, Stage.EXPORT)}
"""Stage -> the stages that work with what it published, and are done again when it is."""

RESULTS = "results.json"
SIGNATURE = "model.sig"
"""Name of a signature, by OpenSSF Model Signing: at the top of a signed run, and in the folders that are used alone."""
SETTINGS = "settings.json"
LEASE = "lease.json"
SCORES = "scores"
FIRST_STAGE = f"{methods.FIRST_STAGE}/"
FAULTS = "faults/"
PUSHED = "pushed/"
SERVED = "served/"
BASE = "base"
PACKING = "packing"
REFERENCE = "reference"
FULL_PRECISION = "full-precision"
UPLOADED = "export-files"
DERIVED_EXPORT = "export-"
FIRST_VALUES = "first-values"
EXPORTED_RUN = "exported-run"
"""Records besides those of the stages: which quantized base a run began with, whether its sequences are packed, the
log-probabilities by the reference model, with which preferences are compared, the scores of the base before it is
quantized, the exported files in the store, each exported format that was made from the merged model (the beginning of
its name), the adapter's first values, and the finished run that this one exports."""
ORIGINAL_SIDE = "original"
"""Side of the answers (`answers_key`) of the base before it is quantized."""
STAGES = "stages/"
FIRST_TENSORS = f"{STAGES}first-values.safetensors"

ARTIFACTS = "artifacts/"
ADAPTER = f"{ARTIFACTS}adapter/"
WEIGHTS = f"{ADAPTER}adapter_model.safetensors"
CARD = f"{ADAPTER}README.md"
EXPORT_CARD = "README.md"
METRICS = f"{ARTIFACTS}metrics.jsonl"
VALIDATIONS = f"{ARTIFACTS}validation.jsonl"
LOG_PROBS = f"{ARTIFACTS}reference.jsonl"
PROMPTS = f"{ARTIFACTS}prompts/"
TENSORBOARD = f"{ARTIFACTS}tensorboard/"
REPORT = f"{ARTIFACTS}report.html"
BOM = f"{ARTIFACTS}bom.cdx.json"
"""What the model was made of, as a CycloneDX ML-BOM."""
FINDINGS = f"{ARTIFACTS}findings.jsonl"
"""What the audit found in the training data, by place and kind."""
EXPORT = f"{ARTIFACTS}export/"
MADE_OF_TIMES = (TENSORBOARD, REPORT)

ATTEMPTS = "attempts/"
CHECKPOINTS = "checkpoints/"
COMMITTED = "COMMITTED.json"
_ATTEMPT = re.compile(rf"{ATTEMPTS}(\d{{4,9}})\.json", re.ASCII)
_CHECKPOINT = re.compile(rf"{CHECKPOINTS}step-(\d{{8}}|[1-9]\d{{8,17}})/(.+)", re.ASCII | re.DOTALL)


def run_folder(where: str) -> str:
    """The folder of a run, given it or the `results.json` in it, as a path or a URI."""
    folder = where if where.endswith("://") else where.rstrip("/")
    if folder.rpartition("/")[2] == RESULTS and not Path(folder).is_dir():
        folder = folder.rpartition("/")[0] or "."
    return folder


def stage_key(name: str) -> str:
    """Key of the record of a stage."""
    return f"{STAGES}{name}.json"


def attempt_key(number: int) -> str:
    """Key of the run log's record of an attempt."""
    return f"{ATTEMPTS}{number:04d}.json"


def attempt_number(key: str) -> int | None:
    """The inverse of `attempt_key`; None for every other key."""
    match = _ATTEMPT.fullmatch(key)
    return int(match[1]) if match else None


def pushed_key(target: str, place: str) -> str:
    """Where it is recorded that the run was pushed to a place."""
    return f"{PUSHED}{target}-{hashlib.sha256(place.encode()).hexdigest()[:16]}.json"


def served_key(format_: str, server: str) -> str:
    """Where it is recorded how a kind of server answered with a format."""
    return f"{SERVED}{format_.replace(':', '-')}-{server}.json"


def fault_key(fault: str) -> str:
    """Where it is noted that a fault has fired."""
    return f"{FAULTS}{fault}"


def answers_key(task: str, side: str) -> str:
    """Key of the answers to a task, one question on each line.

    Sides: `base`, `adapter`, `baseline`, `ORIGINAL_SIDE`, `export_side`.
    """
    return f"{ARTIFACTS}evaluation/{task}.{side}.jsonl"


def prompts_key(side: str) -> str:
    """Key of the answers to JOB_EVAL__PROMPTS, one prompt on each line; sides: `base`, `adapter`."""
    return f"{PROMPTS}{side}.jsonl"


JUDGEMENTS = f"{PROMPTS}judgements.jsonl"
"""What the judge of JOB_EVAL__PRINCIPLES says of each pair of answers."""


def export_side(export: str, candidate: str) -> str:
    """The side of a candidate of an exported format, such as `merged-original` or `gguf-q4_k_m-original`."""
    return f"{_plain(export)}-{candidate}"


def export_folder(export: str) -> str:
    """Prefix of the keys of an exported format's files."""
    return f"{EXPORT}{_plain(export)}/"


def derived_export(export: str) -> str:
    """The name of the record of a format that was made from the merged model."""
    return f"{DERIVED_EXPORT}{_plain(export)}"


def _plain(export: str) -> str:
    """The name of a format as part of a path: without the colon before its type."""
    return export.replace(":", "-")


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def marker_key(step: int) -> str:
    """Key of the commit marker of a step's checkpoint."""
    return f"{CHECKPOINTS}{step_name(step)}/{COMMITTED}"


def checkpoint_folder(step: int, epoch: int) -> str:
    """Prefix of the keys of the files that one attempt (`epoch`, the lease's) wrote at a step."""
    return f"{CHECKPOINTS}{step_name(step)}/{epoch:04d}/"


def checkpoint_part(key: str) -> tuple[int, str] | None:
    """The step and the name below its folder, of a key that belongs to a checkpoint; None for all others."""
    match = _CHECKPOINT.fullmatch(key)
    return (int(match[1]), match[2]) if match else None


def facts_of(results: Mapping[str, Any]) -> dict[str, str]:
    """Path -> hash of what identical runs share: every artifact except those with times."""
    return {
        artifact["path"]: artifact["facts_sha256"] or artifact["sha256"]
        for artifact in results["artifacts"]
        if not artifact["path"].startswith(MADE_OF_TIMES)
    }
