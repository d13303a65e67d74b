"""A run with two training stages names the first by its hash; false statements about it are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from job.common.hashing import sealed
from job.errors import DataError
from job.report import wording
from job.results.first_stage import adapter_hash, first_stage_record, read_first_stage
from job.results.inventory import is_evidence
from job.results.manifest import validate
from job.storage.local import LocalStore
from job.verification.check_first_stage import check_first_stage
from job.verification.differences import CheckResult, Difference
from tests.example_run import HASH, answers, evidence, results

FOUND = evidence(arc_easy=answers(5, 2, 20))
FILES = [
    {"path": f"artifacts/{name}", "bytes": 3, "sha256": HASH, "facts_sha256": None}
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "metrics.jsonl")
]


def make(store: LocalStore) -> dict[str, Any]:
    """Writes the first stage; returns the manifest of the whole."""
    first = results(FOUND, ["--data.source=a.jsonl"], run_id="x-sft", part_of="x")
    first = {**first, "artifacts": FILES}
    store.write("sft/results.json", sealed(first))
    whole = results(FOUND, ["--train.method=sft,dpo", "--data.sft_source=a.jsonl"], run_id="x")
    record = asdict(read_first_stage(store))
    training = {**whole["training"], "first_stage": record, "start_sha256": adapter_hash(first)}
    return {**whole, "training": {**training, "method": "dpo", "beta": 0.1, "reference": "start"}}


def check(made: dict[str, Any], store: LocalStore) -> list[Difference]:
    """What is found; the checks of the first stage itself find one thing."""
    below = [CheckResult("training", "", (Difference("artifacts/metrics.jsonl", "a", "b"),))]
    checks = check_first_stage(made, store, lambda: below)
    return [difference for found in checks for difference in found.differences]


def test_the_first_stage_is_checked_with_the_whole(tmp_path: Path) -> None:
    """What it published is what the whole claims, and its own checks come along with its folder before them."""
    store = LocalStore(tmp_path)
    made = make(store)
    validate(made)
    assert [one.where for one in check(made, store)] == ["sft/artifacts/metrics.jsonl"]
    assert "after 94 steps of supervised fine-tuning" in wording.learned(made["training"])
    assert not is_evidence("sft/stages/pull.json", 1)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda made: made["training"]["first_stage"].update(steps=93), "first_stage.steps"),
        (lambda made: made["training"]["first_stage"].update(results_sha256=HASH), "first_stage.results_sha256"),
        (lambda made: made["training"].update(start_sha256=HASH), "training.start_sha256"),
        (lambda made: made["model"].update(sha256=HASH[::-1]), "model.sha256"),
        (lambda made: made["run"].update(id="y"), "part_of"),
        (lambda made: made["training"].pop("first_stage"), "training.first_stage"),
        (lambda made: made["settings"]["train.method"].update(value="dpo"), "training.first_stage"),
        (lambda made: made["settings"]["data.sft_source"].update(value="b.jsonl"), "settings data.source"),
        (lambda made: made["settings"]["data.sft_on_long_row"].update(value="skip"), "settings data.on_long_row"),
    ],
)
def test_another_claim_is_a_difference(tmp_path: Path, change: Callable[[dict[str, Any]], object], where: str) -> None:
    """Another figure, hash, adapter, base or run, and a stage that the settings do or do not ask for."""
    store = LocalStore(tmp_path)
    made = make(store)
    change(made)
    assert any(where in one.where for one in check(made, store))


def test_a_first_stage_that_is_gone_is_an_error(tmp_path: Path) -> None:
    """Removed or not the job's: training says so with the path, and `verify` as a difference."""
    store = LocalStore(tmp_path)
    made = make(store)
    store.write("sft/results.json", b"{}")
    assert any(one.where == "sft/results.json" for one in check(made, store))
    with pytest.raises(DataError, match="not the manifest of a first stage"):
        read_first_stage(store)
    store.delete("sft/results.json")
    assert any(one.where == "sft/results.json" for one in check(made, store))
    with pytest.raises(DataError, match="was removed"):
        read_first_stage(store)
    with pytest.raises(KeyError):
        first_stage_record({**made, "artifacts": []}, b"")
