"""A published run, generated in a second without a model: all files of a run, consistent with each other."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from job.checkpoints import checkpoint_store
from job.checkpoints.trainer_state import ADAPTER, METRICS, write_metrics, write_validations
from job.checkpoints.trainer_state import VALIDATIONS as STATE_VALIDATIONS
from job.common import host
from job.common.hashing import hash_facts, hash_file, sealed
from job.evaluation import samples
from job.evaluation.comparison import choose_candidate, compare_near_ties, compare_tasks, evaluate_gate
from job.evaluation.groups import compare_groups
from job.evaluation.policy import read_policy
from job.records import (
    Artifact,
    AttemptRecord,
    DatasetRecord,
    Evaluated,
    Exported,
    ExportRecord,
    FullPrecision,
    GroupSpec,
    ModelRecord,
    Pulled,
    StepMetrics,
    Trained,
    TrainingRecord,
    ValidationMetrics,
    ValidationRows,
)
from job.results import manifest
from job.results.inventory import collect
from job.results.reader import open_run
from job.runs import stage_records
from job.runs.layout import ORIGINAL_SIDE, VALIDATIONS, answers_key, attempt_key
from job.runs.lease import LeaseRecord
from job.settings.affects_result import affects_result
from job.settings.load import describe, load_settings, redacted
from job.storage.local import LocalStore
from job.training.early_stopping import validation_record
from job.verification.verify import require_verified, verify

ROWS, STEPS = 8, 4
SETTINGS = ("--train.global_batch_size=4", "--train.epochs=2", "--checkpoint.every_steps=2")
VALIDATED = (
    "--train.epochs=4",
    "--data.validation=2",
    "--train.validate_every_steps=2",
    "--train.stop_after=1",
    "--train.keep=best",
)
"""Further settings of a run that validates: it stops halfway, after step 4, and keeps the adapter of step 2."""
Pairs = Mapping[str, Sequence[tuple[bool, bool]]]
"""By task: whether the base and the adapter are right, for each question."""


def pairs(n: int, *, improved: int = 0, regressed: int = 0) -> list[tuple[bool, bool]]:
    """Answers to `n` questions, half of the others right both times."""
    rest = n - improved - regressed
    both = [(True, True)] * (rest // 2) + [(False, False)] * (rest - rest // 2)
    return [(False, True)] * improved + [(True, False)] * regressed + both


def publish_run(
    folder: Path,
    answers: Pairs,
    *,
    attempts: int = 1,
    settings: Sequence[str] = (),
    validated: bool = False,
    exported: Mapping[str, Sequence[bool]] | None = None,
    original: Mapping[str, Sequence[bool]] | None = None,
    baseline: Callable[[LocalStore, Evaluated], tuple[dict[str, Any], list[Artifact]]] | None = None,
    groups: Mapping[str, GroupSpec] | None = None,
) -> Path:
    """Writes a run with the folder's name into `folder`; all attempts but the last were killed. Returns the folder.

    `exported` has the candidates of a merged model, and whether each is right, question by question of every task.
    `original` has, by task, whether the base with its original weights is right; without it this base is not scored.
    """
    store = LocalStore(folder)
    settings = [*settings, *(VALIDATED if validated else ())]
    settings += ["--export.formats=merged"] if exported else []
    chosen = load_settings([*SETTINGS, *settings, f"--run.id={folder.name}"], environ={})
    work = folder.with_name(f"{folder.name}.work")
    work.mkdir(parents=True)
    decisive = {name: value for name, value, _ in describe(chosen) if affects_result(name)}
    store.write("settings.json", sealed(decisive))
    ledger = [_attempt(number, last=number == attempts) for number in range(1, attempts + 1)]
    model = _model()
    dataset = DatasetRecord("rows.jsonl", None, None, "alpaca", ROWS, {}, _hash("rows"), 90, 80, 20)
    if validated:
        shared = {field.name for field in fields(DatasetRecord)} & {field.name for field in fields(ValidationRows)}
        facts = {name: value for name, value in asdict(dataset).items() if name in shared}
        facts |= {"rows": 2, "target_tokens": 15, "sha256": _hash("held out")}
        held = ValidationRows(**facts, held_out=True, duplicates=0, near_duplicates=0)
        dataset = replace(dataset, validation=held)
    pulled = Pulled(
        dataset, model.sha256, None, {task: _hash(task) for task in answers}, groups=groups and dict(groups)
    )
    run = stage_records.fingerprint(decisive, pulled)
    for record in ledger[:-1]:
        store.write(attempt_key(record.number), _logged(replace(record, outcome="running"), run))
    base, adapter = (_evaluated(store, answers, side, work) for side in ("base", "adapter"))
    if original:
        answered = {task: [(right, right) for right in told] for task, told in original.items()}
        unquantized = _evaluated(store, answered, ORIGINAL_SIDE, work)
        base = replace(
            base,
            artifacts=[*base.artifacts, *unquantized.artifacts],
            full_precision=FullPrecision("fp32", unquantized.scores),
        )
    trained = _trained(store, work, attempts, run, validated=validated)
    exports = _exported(store, answers, exported or {}, work)
    for name, found in (
        *(("pull", pulled), ("evaluate-base", base), ("train", trained), ("evaluate-adapter", adapter)),
        *([("export", exports)] if exported else []),
    ):
        key = f"stages/{name}.json"
        store.write(key, stage_records.render(key, json.dumps(asdict(found)), run, attempts))
    store.write("scores/0123/kept.jsonl", b"{}\n")
    against, copies = baseline(store, adapter) if baseline else (None, [])
    on_merged = chosen.gate.on == "merged" and exported
    judged = exports.exports[0].scores[exports.exports[0].candidate] if on_merged else adapter.scores
    results = manifest.build(
        run=manifest.RunSection(id=folder.name, attempts=ledger, finished="2026-01-05T10:00:00Z"),
        settings=redacted(chosen),
        model=model,
        dataset=dataset,
        training=trained.training,
        evaluation=manifest.EvaluationSection(
            tasks=compare_tasks(base.scores, adapter.scores),
            groups=compare_groups(groups or {}, base, adapter),
            full_precision=manifest.full_precision_record(base, adapter.scores),
            near_ties=compare_near_ties(base.scores, adapter.scores, model.dtype),
        ),
        exports=manifest.exports_record(exports, base, adapter.scores),
        gate=evaluate_gate(
            compare_tasks(base.scores, judged),
            **chosen.gate.model_dump(exclude={"baseline", "policy"}),
            baseline=against,
            policy=None if chosen.gate.policy is None else read_policy(chosen.gate.policy),
        ),
        artifacts=[*base.artifacts, *trained.artifacts, *adapter.artifacts, *exports.artifacts, *copies],
        evidence=collect(store, work / "evidence", attempts),
        image_digest=None,
        on_demand_usd_per_hour=chosen.cost.on_demand_usd_per_hour,
    )
    store.write("results.json", sealed(results))
    store.write(attempt_key(attempts), _logged(_gone_on(ledger[-1]), run))
    holder = LeaseRecord(epoch=attempts, holder="host/1", started="2026-01-05T09:00:00Z", heartbeat=7)
    store.write("lease.json", sealed(holder.model_dump()))
    return folder


def publish_file(store: LocalStore, key: str, data: bytes, facts: str | None = None) -> Artifact:
    """Writes an artifact; returns its entry."""
    store.write(key, data)
    return Artifact(key, len(data), hashlib.sha256(data).hexdigest(), facts)


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest and recomputes its seal."""
    path = folder / "results.json"
    results = json.loads(path.read_bytes())
    change(results)
    path.write_bytes(sealed(results))


def rewrite(folder: Path, path: str, data: bytes) -> None:
    """Replaces a file and everything that the manifest says about it."""
    (folder / path).write_bytes(data)
    facts = hash_facts(folder / path) if path.endswith(("metrics.jsonl", "validation.jsonl")) else None

    def change(results: dict[str, Any]) -> None:
        (entry,) = [entry for entry in results["artifacts"] + results["evidence"] if entry["path"] == path]
        entry.update(bytes=len(data), sha256=hash_file(folder / path))
        if facts:
            entry["facts_sha256"] = facts

    forge(folder, change)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _attempt(number: int, *, last: bool) -> AttemptRecord:
    return AttemptRecord(
        number=number,
        started=f"2026-01-05T09:{number:02d}:00.000Z",
        finished="2026-01-05T09:59:00.000Z" if last else None,
        outcome="complete" if last else "killed",
        seconds=60.5,
        stage_seconds={"pull": 1.5, "train": 50.25, **({"publish": 2.5} if last else {})},
        steps=2,
        repeated_steps=0,
        last_step=STEPS if last else 2,
        usd_per_hour=1.5,
        energy_joules=9000.0,
    )


def _gone_on(record: AttemptRecord) -> AttemptRecord:
    """The last record of an attempt: half a second later than the one in the manifest, while still publishing."""
    stages = record.stage_seconds | {"publish": record.stage_seconds["publish"] + 0.25}
    return replace(record, seconds=record.seconds + 0.5, stage_seconds=stages, energy_joules=9100.0)


def _model() -> ModelRecord:
    return ModelRecord(
        id="base",
        revision=None,
        sha256=_hash("model"),
        architecture="MistralForCausalLM",
        quantization="nf4",
        double_quantization=True,
        dtype="fp32",
        parameters=1000,
        trainable_parameters=12,
    )


def _logged(record: AttemptRecord, run: str) -> bytes:
    return sealed({**asdict(record), stage_records.RUN: run})


def _record(task: str, number: int, *, right: bool) -> dict[str, Any]:
    """A question with three choices, the second of which is right; the shortest of all is the first."""
    chance = random.Random(f"{task} {number} {right}")
    likelihoods = [-3.0 - chance.random(), -3.0 - chance.random(), -9.0]
    likelihoods[int(right)] = -1.0 - chance.random()
    lengths = [3, 4, 5]
    normalized = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
    return {
        "id": f"{task}-{number}",
        "doc_hash": _hash(f"{task} {number}"),
        "prompt_hash": _hash(f"ask {task} {number}"),
        "target_hash": _hash("1"),
        "log_likelihoods": likelihoods,
        "choice_lengths": lengths,
        "prediction": int(right),
        "prediction_norm": normalized.index(max(normalized)),
        "gold": 1,
        "acc": float(right),
        "acc_norm": float(normalized.index(max(normalized)) == 1),
    }


def _evaluated(store: LocalStore, answers: Pairs, side: str, work: Path) -> Evaluated:
    scores, artifacts = {}, []
    for task, told in answers.items():
        rows = [_record(task, n, right=pair[side != "base"]) for n, pair in enumerate(told)]
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        artifacts.append(publish_file(store, answers_key(task, side), data))
        records = samples.parse(data)
        scores[task] = samples.task_scores(records, task=task, source=f"{task}.jsonl", version="1.0")
    return Evaluated(scores, artifacts)


def _exported(store: LocalStore, answers: Pairs, candidates: Mapping[str, Sequence[bool]], work: Path) -> Exported:
    """A merged model of one weight, and the answers of its candidates."""
    if not candidates:
        return Exported([], [])
    found = {
        name: _evaluated(store, {task: [(False, right) for right in told] for task in answers}, f"merged-{name}", work)
        for name, told in candidates.items()
    }
    scores = {name: one.scores for name, one in found.items()}
    one = next(iter(scores)), "JOB_EXPORT__MERGE_ONTO is said"
    chosen, reason = choose_candidate(scores) if len(scores) > 1 else one
    save_file({"model.q_proj.weight": np.ones((3, 4), dtype=np.float16)}, work / "merged", {"format": "pt"})
    files = [
        publish_file(store, "artifacts/export/merged/config.json", b'{"dtype": "float16"}'),
        publish_file(store, "artifacts/export/merged/model.safetensors", (work / "merged").read_bytes()),
    ]
    artifacts = [artifact for one in found.values() for artifact in one.artifacts]
    return Exported([ExportRecord("merged", chosen, reason, "fp16", "fp16", scores)], [*artifacts, *files])


def _trained(store: LocalStore, work: Path, attempts: int, run: str, *, validated: bool) -> Trained:
    """Four steps of two epochs, a checkpoint after the second and the fourth, and the adapter of the last, or best."""
    history = [
        StepMetrics(
            step=step,
            epoch=step / 2,
            loss=4.0 - step / 3,
            learning_rate=1e-3 / step,
            grad_norm=1.0,
            examples=4,
            target_tokens=40 + step,
            measured={"seconds": 0.1 * step, "memory_bytes": 10**6, "micro_batch_tokens": 64},
        )
        for step in range(1, STEPS + 1)
    ]
    validations = [
        ValidationMetrics(step, step / 2, loss, 2, 15, {"seconds": 0.5, "micro_batch_tokens": 64})
        for step, loss in ((0, 4.0), (2, 3.0), (4, 3.5))
    ]
    for step in (2, 4):
        state = work / f"step-{step}"
        state.mkdir()
        weights = np.full((3, 4), step, dtype=np.float32)
        save_file({"model.q_proj.lora_A.default.weight": weights}, state / ADAPTER)
        write_metrics(state / METRICS, history[:step])
        if validated:
            best = {"model.q_proj.lora_A.default.weight": torch.full((3, 4), 2.0)}
            write_validations(state, validations[: 1 + step // 2], best if step == STEPS else None)
        epoch = attempts if step == STEPS else 1
        checkpoint_store.commit(store, state, step, checkpoint_store.MarkerFields(epoch, 1, host.software(), run))
    if validated:
        weights = np.full((3, 4), 2, dtype=np.float32)
    save_file({"model.q_proj.lora_A.weight": weights}, work / "adapter", {"format": "pt"})
    adapter = publish_file(store, "artifacts/adapter/adapter_model.safetensors", (work / "adapter").read_bytes())
    metrics = work / "step-4" / METRICS
    lines = publish_file(store, "artifacts/metrics.jsonl", metrics.read_bytes(), hash_facts(metrics))
    if not validated:
        return Trained(_training(history), [adapter, lines])
    kept = work / "step-4" / STATE_VALIDATIONS
    losses = publish_file(store, VALIDATIONS, kept.read_bytes(), hash_facts(kept))
    record = validation_record(validations, every_steps=2, total_steps=8, stop_after=1, keep="best")
    return Trained(replace(_training(history), validation=record), [adapter, lines, losses])


def _training(history: Sequence[StepMetrics]) -> TrainingRecord:
    last, seconds = history[2:], sum(float(step.measured["seconds"] or 0) for step in history)
    targets = sum(step.target_tokens for step in history)
    return TrainingRecord(
        steps=STEPS,
        examples=16,
        target_tokens=targets,
        loss=sum(step.loss * step.target_tokens for step in last) / sum(step.target_tokens for step in last),
        tokens_per_second=targets / seconds,
        seconds=seconds,
        peak_memory_bytes=10**6,
        optimizer="adamw_8bit",
        global_batch_size=4,
        micro_batch_tokens=64,
        substitutions=[],
    )


def verified_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run, which verifies."""
    with tempfile.TemporaryDirectory() as work:
        require_verified(verify(open_run(str(run)), Path(work)))
    results: dict[str, Any] = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return results
