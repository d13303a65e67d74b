"""The first stage of a run that trains in two (`JOB_TRAIN__METHOD=sft,dpo`): its entry in the run's manifest.

It is a whole run in a folder of the run's folder (`layout.FIRST_STAGE`), and complete before the second stage begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from job.errors import DataError, Problem
from job.records import Artifact, FirstStage
from job.results.adapter_facts import CONFIG, WEIGHTS
from job.results.reader import parse
from job.runs.layout import ADAPTER, FIRST_STAGE, METRICS, RESULTS
from job.storage.open import ObjectStore


def read_first_stage(store: ObjectStore) -> FirstStage:
    """The record of the first stage of the run in this store.

    Raises:
        DataError: It is not there, or not what the job wrote.
    """
    where = f"{FIRST_STAGE}{RESULTS}"
    stored = store.read(where)
    if stored is None:
        raise DataError([Problem(f"{store.uri}/{where}", "is missing: the first stage of this run was removed")])
    try:
        return first_stage_record(parse(stored.data), stored.data)
    except (KeyError, ValueError) as error:
        raise DataError([Problem(f"{store.uri}/{where}", f"is not the manifest of a first stage: {error}")]) from error


def first_stage_record(results: Mapping[str, Any], data: bytes) -> FirstStage:
    """The record of a first stage, from its manifest and the bytes of that.

    Raises:
        KeyError: It has no metrics.
    """
    training, cost = results["training"], results["cost"]
    metrics = {artifact["path"]: artifact for artifact in results["artifacts"]}[METRICS]
    return FirstStage(
        run=results["run"]["id"],
        results_sha256=hashlib.sha256(data).hexdigest(),
        method=training.get("method", "sft"),
        **{name: training[name] for name in ("steps", "examples", "target_tokens", "loss", "seconds")},
        run_seconds=cost["seconds"],
        usd=cost["usd"],
        metrics=Artifact(**{**metrics, "path": f"{FIRST_STAGE}{METRICS}"}),
    )


def adapter_hash(results: Mapping[str, Any]) -> str | None:
    """The hash of a run's published adapter, as `model.start_adapter.hash_start` computes it; None without one."""
    hashes = {artifact["path"]: artifact["sha256"] for artifact in results["artifacts"]}
    names = [f"{ADAPTER}{name}" for name in (CONFIG, WEIGHTS)]
    if any(name not in hashes for name in names):
        return None
    return hashlib.sha256("\n".join(hashes[name] for name in names).encode()).hexdigest()
