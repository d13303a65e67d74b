"""Validation of preferences: TRL's evaluation, early stopping, the best adapter; killed and resumed bit by bit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.records import Example
from job.training.config import Preference
from tests.helpers import fill_adapter, make_model
from tests.unit.training.test_objectives import (
    CASES,
    EXACT,
    FILLED,
    make_labelled,
    make_pairs,
    model,
    trl_trainer,
    with_references,
)
from tests.unit.training.test_validation import ONCE, RECIPE, Killed, bits, facts, run

assert model  # the fixture

METHODS = ["dpo", *(pytest.param(method, marks=pytest.mark.long) for method in ("kto", "orpo"))]
SIZE = 7
"""Validation rows: two blocks of four, the last one short."""


def rows_of(method: str, made: Any, count: int) -> list[Example]:
    """Examples of a method, with the reference's log-probabilities."""
    return with_references(made, make_labelled(count) if method == "kto" else make_pairs(count))


@pytest.mark.parametrize("case", ["dpo", "ipo", "orpo", "kto"])
def test_it_is_the_evaluation_of_trl(case: str, model: Any, base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Loss, rewards, accuracies and margins are those of TRL's `evaluate` by its names, within 1e-5, in any packing."""
    from datasets import Dataset
    from transformers import Trainer

    options, given = CASES[case]
    examples = rows_of(options.method, model, SIZE)
    assert FILLED
    trainer, rows = trl_trainer(options.method, base_folder, tmp_path / "trl", examples, **given)
    # Trainer's own, since the rows are tokens already, which TRL's would tokenize; TRL adds the rewards to the log.
    Trainer.evaluate(trainer, Dataset.from_list(rows))
    expected = trainer.state.log_history[-1]
    for budget in (10_000, 1):
        recipe = replace(ONCE, preference=options, micro_batch_tokens=budget)
        mine = fill_adapter(make_model(base_folder))
        trained, _ = run(mine, tokenizer, tmp_path, recipe, examples=examples, held_out=examples)
        (found, _) = trained.validations
        assert found.loss == pytest.approx(expected["eval_loss"], **EXACT)
        named = {name: pytest.approx(expected[f"eval_{name}"], **EXACT) for name in found.preference}
        assert found.preference == named
        assert "rewards/margins" in named


@pytest.mark.parametrize("method", METHODS)
def test_killed_anywhere_it_ends_alike(method: Any, base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Killed twice after a validation, a run stops at the same step, and keeps the same best adapter."""
    recipe = replace(RECIPE, preference=Preference(method, beta=0.3), stop_after=1, learning_rate=1e-1)

    def fresh() -> Any:
        return make_model(base_folder, quantization="nf4", dropout=0.1)

    made = fresh()
    examples, held_out = rows_of(method, made, 8), rows_of(method, made, 13)[8:]
    where: dict[str, Any] = {"examples": examples, "held_out": held_out}
    expected, _ = run(made, tokenizer, tmp_path / "whole", recipe, **where)
    assert expected.complete
    assert expected.history[-1].step < recipe.total_steps
    resume: Path | None = None
    for most in (2, 1, None):
        again = fresh()
        saved: list[Path] = []
        events = itertools.count(1)

        def kill(_: Any, events: Any = events, most: int | None = most) -> None:
            if next(events) == most:
                raise Killed

        def save(path: Path, _: int, saved: list[Path] = saved) -> None:
            saved.append(path)

        try:
            folder = tmp_path / str(most)
            trained, _ = run(again, tokenizer, folder, recipe, resume=resume, on_validation=kill, on_save=save, **where)
        except Killed:
            resume = saved[-1] if saved else resume
            assert most is not None
    assert facts(trained) == facts(expected)
    assert bits(again) == bits(made)
