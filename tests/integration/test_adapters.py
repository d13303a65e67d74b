"""Whole runs with every adapter option: a killed run equals an uninterrupted one, and verifies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.runs.layout import FIRST_TENSORS, facts_of
from job.storage.open import open_store
from job.verification.verify import require_verified, verify
from tests.forked import Forks
from tests.helpers import alpaca_rows, arc_rows, write_jsonl
from tests.integration.runs_of_processes import go, results, run_folder

OPTIONS: dict[str, dict[str, str]] = {
    "tokens": {"JOB_MODEL__ADD_TOKENS": "<sum>,<end of sum>", "JOB_LORA__MODULES_TO_SAVE": "lm_head"},
    "eva": {"JOB_LORA__INIT": "eva"},
    "loftq": {"JOB_LORA__INIT": "loftq"},
    "rslora": {"JOB_LORA__USE_RSLORA": "true"},
    "dora": {"JOB_LORA__USE_DORA": "true"},
    "layers": {"JOB_LORA__LAYERS": "1", "JOB_LORA__TARGET_MODULES": "attention"},
    "patterns": {"JOB_LORA__RANK_PATTERN": "q_proj=4", "JOB_LORA__ALPHA_PATTERN": "v_proj=64"},
    "gaussian": {"JOB_LORA__INIT": "gaussian"},
    "orthogonal": {"JOB_LORA__INIT": "orthogonal", "JOB_MODEL__QUANTIZATION": "none"},
    "pissa_niter_16": {"JOB_LORA__INIT": "pissa_niter_16"},
    "olora": {"JOB_LORA__INIT": "olora"},
    "adalora": {"JOB_LORA__KIND": "adalora", "JOB_LORA__TINIT": "1", "JOB_LORA__TFINAL": "1"},
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, str]:
    """NF4: 4 steps, a checkpoint every other one; the base that the runs share is kept quantized."""
    folder = tmp_path_factory.mktemp("adapters")
    rows = [{**row, "output": f"<sum>{row['output']}<end of sum>"} for row in alpaca_rows(8)]
    write_jsonl(folder / "rows.jsonl", rows)
    write_jsonl(folder / "questions.jsonl", arc_rows(10))
    return {
        "JOB_RUN__OUTPUT": str(folder / "out"),
        "JOB_RUN__SPOT_NOTICES": "off",
        "JOB_STORAGE__CACHE": str(folder / "cache"),
        "JOB_MODEL__ID": str(base_folder),
        "JOB_DATA__SOURCE": str(folder / "rows.jsonl"),
        "JOB_EVAL__DATA": f"arc_easy={folder / 'questions.jsonl'}",
        "JOB_LORA__RANK": "8",
        "JOB_TRAIN__GLOBAL_BATCH_SIZE": "4",
        "JOB_TRAIN__LEARNING_RATE": "2e-3",
        "JOB_TRAIN__MAX_LENGTH": "512",
        "JOB_CHECKPOINT__EVERY_STEPS": "2",
        "JOB_LOG__FORMAT": "json",
    }


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIONS)
def test_a_killed_run_ends_as_an_undisturbed_one(
    forked: Forks, environment: dict[str, str], tmp_path: Path, name: str
) -> None:
    """Killed before the first checkpoint and after it: the same artifacts to the bit, and the run verifies."""
    assert go(forked, environment, name, 1, **OPTIONS[name]) == [0]
    killed, faults = f"{name}-killed", "kill@step=1,kill@step=3"
    codes = [go(forked, environment, killed, 1, **OPTIONS[name], JOB_FAULT=faults) for _ in range(3)]
    assert codes == [[-9], [-9], [0]]
    whole, ended = results(environment, name), results(environment, killed)
    assert facts_of(ended) == facts_of(whole)
    require_verified(verify(open_store(str(run_folder(environment, killed))), tmp_path))
    kept = run_folder(environment, killed) / FIRST_TENSORS
    assert kept.exists() == (name in {"eva", "loftq"})
    adapter = whole["training"]["adapter"]
    assert adapter["init"] == OPTIONS[name].get("JOB_LORA__INIT", "default")
    if name == "tokens":
        assert whole["model"]["added_tokens"] == ["<sum>", "<end of sum>"]
        assert (adapter["modules_to_save"], adapter["trained_tokens"]) == (["lm_head"], 2)
        folder = run_folder(environment, name) / "artifacts/adapter"
        added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
        assert {"<sum>", "<end of sum>"} <= {token["content"] for token in added}
        assert "resize_token_embeddings" in (folder / "README.md").read_text("utf-8")
