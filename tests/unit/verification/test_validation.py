"""`verify` of a run with validation: best step, early stop and chosen adapter follow from the published losses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.common.hashing import sealed, unsealed
from job.results.manifest import validate
from job.results.reader import open_run
from job.verification.verify import verify
from tests.published_run import forge, pairs, publish_run, rewrite

LOSSES = "artifacts/validation.jsonl"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after step 4 of 8, and kept the adapter of step 2."""
    return publish_run(tmp_path_factory.mktemp("published") / "a-run", {"quiz": pairs(20, improved=4)}, validated=True)


@pytest.fixture
def run(published: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(published, tmp_path / "a-run"))


def failed(run: Path, tmp_path: Path) -> dict[str, str]:
    """The checks that do not hold, and what they say."""
    work = tmp_path / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    checks = verify(open_run(str(run)), work)
    return {check.what: "\n".join(map(str, check.differences)) for check in checks if check.differences}


def edit(run: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Changes the published validations and every hash of theirs in the manifest."""
    lines = [json.loads(line) for line in (run / LOSSES).read_text().splitlines()]
    change(lines)
    rewrite(run, LOSSES, "".join(json.dumps(line) + "\n" for line in lines).encode())


def test_it_verifies(run: Path, tmp_path: Path) -> None:
    """A run that stopped early is what its settings and losses say; its manifest fits the schema."""
    assert failed(run, tmp_path) == {}
    validate(json.loads((run / "results.json").read_bytes()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_step", 4),
        ("best_loss", 2.9),
        ("kept_step", 4),
        ("stopped_early", False),
        ("stale", 0),
        ("count", 4),
        ("first_loss", 5.0),
        ("last_loss", 1.0),
        ("planned_steps", 4),
        ("every_steps", 1),
        ("stop_after", None),
        ("keep", "last"),
    ],
)
def test_each_figure_is_computed_again(run: Path, tmp_path: Path, name: str, value: Any) -> None:
    """A figure that does not follow from the losses is named."""
    forge(run, lambda results: results["training"]["validation"].update({name: value}))
    assert f"training.validation.{name}" in failed(run, tmp_path)["validation"]


def test_losses_decide_where_training_stops(run: Path, tmp_path: Path) -> None:
    """Losses by which training would have gone on, a missing validation, and other rows are named."""
    edit(run, lambda lines: lines[2].update(loss=2.5))
    assert "training.validation" in failed(run, tmp_path)["validation"]
    edit(run, lambda lines: lines[2].update(loss=3.5, examples=3))
    assert "all validation rows" in failed(run, tmp_path)["validation"]
    edit(run, lambda lines: lines.pop(1))
    assert "validations at the steps [0, 2, 4" in failed(run, tmp_path)["validation"]


def test_checkpoints_hold_the_same_validations(run: Path, tmp_path: Path) -> None:
    """A published loss that is another than that in the checkpoints is named."""
    edit(run, lambda lines: lines[0].update(loss=4.5))
    assert "the first validations in artifacts/validation.jsonl" in failed(run, tmp_path)["checkpoints"]
    edit(run, lambda lines: (lines[0].update(loss=4.0), lines[2].update(loss=3.25)))
    said = failed(run, tmp_path)["checkpoints"]
    assert "step-00000004/0001/validation.jsonl: claimed the first validations" in said
    assert "step-00000002/0001/validation.jsonl" not in said


def test_validations_of_a_checkpoint_that_cannot_be_read(run: Path, tmp_path: Path) -> None:
    """Bytes whose hash the marker lists need not be valid validations."""
    path, marker = "checkpoints/step-00000004/0001/validation.jsonl", "checkpoints/step-00000004/COMMITTED.json"
    (run / path).write_bytes(b"[]\n")
    facts = unsealed((run / marker).read_bytes())
    facts["files"]["validation.jsonl"] = {"bytes": 3, "sha256": hashlib.sha256(b"[]\n").hexdigest()}
    rewrite(run, marker, sealed(facts))
    assert f"{path}: claimed the first validations" in failed(run, tmp_path)["checkpoints"]


def test_target_tokens_are_those_of_the_validation_rows(run: Path, tmp_path: Path) -> None:
    """As many rows as there are, but a loss over another number of tokens."""
    edit(run, lambda lines: lines[1].update(target_tokens=16))
    assert "all validation rows in each validation" in failed(run, tmp_path)["validation"]


def test_the_kept_adapter_is_that_of_the_best_step(run: Path, tmp_path: Path) -> None:
    """The published adapter is compared with the checkpoint of the kept step and the best one of later checkpoints."""
    data = bytearray((run / "artifacts/adapter/adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    rewrite(run, "artifacts/adapter/adapter_model.safetensors", bytes(data))
    said = failed(run, tmp_path)["checkpoints"]
    assert "step-00000002/0001/adapter.safetensors" in said
    assert "step-00000004/0001/best.safetensors" in said


def test_validation_without_the_setting_is_named(run: Path, tmp_path: Path) -> None:
    """Whether there was a validation is a matter of the settings."""
    forge(run, lambda results: results["settings"]["data.validation"].update(value=None))
    assert "as in the settings" in failed(run, tmp_path)["validation"]
    shutil.rmtree(run)
    publish_run(run, {"quiz": pairs(20)})
    forge(run, lambda results: results["settings"]["data.validation"].update(value=0.1))
    assert "as in the settings" in failed(run, tmp_path)["validation"]
