"""Preference training resumes bit by bit, also with the fused layers and without packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from job.common.methods import METHODS
from job.model.load_base import PLAIN
from job.model.packed_attention import use
from job.training.config import Preference
from job.training.preference_gradient import reference_log_probs
from tests.helpers import fill_adapter, make_model
from tests.unit.training.recipes import PLAN
from tests.unit.training.test_objectives import make_labelled, make_pairs, with_references
from tests.unit.training.training_runs import LAYERS, RESUMED, THROUGHOUT, adapter_hash, facts, fused_model, run

METHOD = pytest.mark.parametrize("method", [name for name in METHODS if name != "sft"])
ROWS = 20
"""Three steps an epoch, the last of four examples."""


def rows_of(method: str, model: Any) -> list[Any]:
    """Examples of a method, with the reference's log-probabilities."""
    return with_references(model, make_labelled(ROWS) if method == "kto" else make_pairs(ROWS))


@METHOD
def test_a_resumed_run_is_the_same_run(method: Any, base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Resumed from a checkpoint within an epoch, NF4 training ends with the same bits, losses and rewards."""
    recipe = replace(RESUMED, preference=Preference(method), optimizer="adamw_8bit")

    def fresh() -> Any:
        return make_model(base_folder, quantization="nf4", dropout=0.1, rank=32)

    whole = fresh()
    examples = rows_of(method, whole)
    uninterrupted, saved = run(whole, tokenizer, examples, recipe, tmp_path / "whole")
    assert uninterrupted.complete
    assert all(step.preference for step in uninterrupted.history)
    second = fill_adapter(fresh())
    torch.manual_seed(12345)
    resumed, _ = run(second, tokenizer, examples, recipe, tmp_path / "resumed", resume=saved[1])
    assert adapter_hash(second) == adapter_hash(whole)
    assert facts(resumed) == facts(uninterrupted)


def unpacked(folder: Path) -> Any:
    """A model through which sequences go one at a time."""
    model = fill_adapter(make_model(folder))
    use(model.get_base_model(), PLAIN)
    return model


Plainly = Callable[[str], tuple[Any, list[Any]]]


def one_step(method: Any) -> Any:
    """The recipe of one step in several micro-batches."""
    return replace(RESUMED, preference=Preference(method), total_steps=1, micro_batch_tokens=400)


@pytest.fixture(scope="module")
def plainly(base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Plainly:
    """By method: the step as PEFT's layers take it on packed sequences, and its examples."""

    @cache
    def step(method: str) -> tuple[Any, list[Any]]:
        model = fill_adapter(make_model(base_folder))
        examples = rows_of(method, model)
        trained, _ = run(model, tokenizer, examples, one_step(method), tmp_path_factory.mktemp("plain"))
        return trained.history[0], examples

    return step


@METHOD
@pytest.mark.parametrize("how", [(fused_model, LAYERS), (fused_model, THROUGHOUT), (unpacked, PLAN)])
def test_how_it_is_carried_out_changes_rounding_only(
    method: Any,
    how: tuple[Callable[[Path], Any], Any],
    plainly: Plainly,
    *,
    base_folder: Path,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    """The job's fused layers, and sequences that are not packed, give the loss and rewards of PEFT's packed ones."""
    other, examples = plainly(method)
    make, plan = how
    found, _ = run(make(base_folder), tokenizer, examples, one_step(method), tmp_path, plan=plan)
    one = found.history[0]
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
    assert one.preference == {
        name: pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in other.preference.items()
    }


def test_training_begins_at_the_reference(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """With a fresh adapter all rewards of the first step are 0 but for rounding, and the loss is that of a coin."""
    model = make_model(base_folder)
    values = reference_log_probs(model, fused=False)(make_pairs(ROWS))
    examples = [replace(pair, reference=tuple(of_row)) for pair, of_row in zip(make_pairs(ROWS), values, strict=True)]
    recipe = replace(RESUMED, preference=Preference("dpo"), total_steps=1)
    (first,) = run(model, tokenizer, examples, recipe, tmp_path)[0].history
    assert first.loss == pytest.approx(0.6931472, rel=1e-5)
    assert abs(first.preference["rewards/margins"]) < 1e-5
