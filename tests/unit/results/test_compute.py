"""Operations of training: the formula, the share of pre-training, and what `verify` says about a forged figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.results.compute import compute_spent
from job.storage.local import LocalStore
from job.verification.verify import verify
from tests.published_run import forge, pairs, publish_run


def facts(**changes: Any) -> dict[str, Any]:
    """The parts of a manifest that it follows from: a model of 1000 numbers, 10 of them trained, two epochs."""
    return {
        "model": {"id": "org/base", "revision": "c" * 40, "parameters": 1000, "trainable_parameters": 10},
        "dataset": {"tokens": 500, "rows": 20},
        "training": {"examples": 40, "reference": None},
        "settings": {},
        **changes,
    }


def test_the_formula() -> None:
    """Two epochs of 500 tokens: 4 operations for a frozen number and 6 for a trained one, for each token."""
    found = compute_spent(facts())
    assert found["tokens"] == 1000
    assert found["training_pflop"] == pytest.approx(1000 * (4 * 1000 + 6 * 10) / 1e15)
    assert (found["pretraining_tokens"], found["share"]) == (None, None)


def test_idle_parameters() -> None:
    """Those that no text passes through, such as an image encoder's and their adapter's, compute nothing."""
    idle = {"idle_parameters": 300, "idle_trainable_parameters": 4}
    model = {"id": "org/base", "revision": "c" * 40, "parameters": 1300, "trainable_parameters": 14, **idle}
    assert compute_spent(facts(model=model)) == compute_spent(facts())


def test_a_reference_model() -> None:
    """A forward pass of the base over all rows comes on top, once."""
    found = compute_spent(facts(training={"examples": 40, "reference": "base"}))
    assert found["training_pflop"] == pytest.approx((1000 * 4060 + 500 * 2 * 1000) / 1e15)


def test_the_share_of_pre_training() -> None:
    """By the table of public bases, or by the setting, which comes first; unknown where nobody published it."""
    model = {"id": "HuggingFaceTB/SmolLM2-135M", "revision": "c" * 40, "parameters": 1000, "trainable_parameters": 10}
    found = compute_spent(facts(model=model))
    assert (found["pretraining_tokens"], found["pretraining_source"]) == (
        2e12,
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
    )
    assert found["share"] == pytest.approx(1000 * 4060 / (6 * 1000 * 2e12))
    given = compute_spent(facts(model=model, settings={"model.pretraining_tokens": {"value": 1e6}}))
    assert given["share"] == pytest.approx(1000 * 4060 / (6 * 1000 * 1e6))
    unknown = compute_spent(facts(model={**model, "id": "mistralai/Mistral-7B-v0.1"}))
    assert unknown["share"] is None


@pytest.mark.parametrize(("name", "value"), [("training_pflop", 1.0), ("share", 0.5), ("tokens", 1)])
def test_a_forged_figure(tmp_path: Path, name: str, value: float) -> None:
    """Is named by `verify`, which computes it again from the rest of the manifest."""
    run = publish_run(tmp_path / "run", {"quiz": pairs(20)})
    assert json.loads((run / "results.json").read_bytes())["compute"]["training_pflop"] > 0
    forge(run, lambda results: results["compute"].update({name: value}))
    (tmp_path / "work").mkdir()
    failed = [check.what for check in verify(LocalStore(run), tmp_path / "work") if check.differences]
    assert failed == ["compute"]
