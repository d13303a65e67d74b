"""Row weights: weight 2 equals the same row twice in its step, and weight 0 equals its absence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.data.batch_plan import by_weight, weighted_targets
from job.data.dataset import load_examples
from job.data.training_and_validation import ValidationSource, load_rows
from job.errors import DataError
from job.training.trainer import Hooks, train
from tests.helpers import READING, alpaca_rows, fill_adapter, make_examples, make_model, write_jsonl
from tests.unit.training.recipes import PLAN
from tests.unit.training.training_runs import (
    LONGER,
    RECIPE,
    RESUMED,
    THROUGHOUT,
    adapter_hash,
    assert_same,
    facts,
    fused_model,
    gradients,
    run,
)

ROWS = make_examples(4)
WEIGHTED = [replace(row, weight=weight) for row, weight in zip(ROWS, (2.0, 1.0, 0.0, 0.5), strict=True)]


def test_the_divisor_counts_a_row_as_often_as_it_weighs() -> None:
    """It is what transformers calls num_items_in_batch; whole and exact where all rows weigh 1."""
    counts = [sum(row.targets) for row in ROWS]
    assert weighted_targets(WEIGHTED) == 2 * counts[0] + counts[1] + counts[3] / 2
    assert weighted_targets(ROWS) == sum(counts)
    assert isinstance(weighted_targets(ROWS), int)
    assert weighted_targets([replace(row, weight=0.0) for row in ROWS]) == 1
    assert by_weight(ROWS) == [(ROWS, 1.0)]
    assert [(list(part), weight) for part, weight in by_weight(WEIGHTED)] == [
        ([WEIGHTED[0]], 2.0),
        ([WEIGHTED[1]], 1.0),
        ([WEIGHTED[3]], 0.5),
    ]


@pytest.mark.parametrize("fused", [False, True], ids=["packed", "fused and padded"])
def test_weight_2_is_the_row_twice(base_folder: Path, tokenizer: Any, tmp_path: Path, *, fused: bool) -> None:
    """Loss and gradient of a step with weights 2, 1, 0, 0.5 are those of four of the first row, two, none and one."""
    steps = []
    for rows in (WEIGHTED, [ROWS[0], ROWS[0], ROWS[0], ROWS[0], ROWS[1], ROWS[1], ROWS[3]]):
        made = fused_model(base_folder) if fused else fill_adapter(make_model(base_folder))
        plan = THROUGHOUT if fused else PLAN
        with gradients(made) as found:
            trained, _ = run(made, tokenizer, rows, replace(RECIPE, global_batch_size=len(rows)), tmp_path, plan=plan)
        steps.append((trained.history[0].loss, found[0]))
    (loss, gradient), (expected, wanted) = steps
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same(wanted, gradient)


def test_a_stopped_run_with_weights_resumes_exactly(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """NF4 with dropout, stopped in the middle of an epoch: the bits of a whole run."""
    rows = [replace(row, weight=(2.0, 1.0, 0.0, 0.5, 1 / 3)[number % 5]) for number, row in enumerate(LONGER)]

    def model() -> Any:
        return make_model(base_folder, quantization="nf4", dropout=0.1, rank=8)

    whole, killed, resumed = (model() for _ in range(3))
    uninterrupted, _ = run(whole, tokenizer, rows, RESUMED, tmp_path / "whole")
    stopped, (*_, state) = run(killed, tokenizer, rows, RESUMED, tmp_path / "stopped", stop_after=4)
    assert not stopped.complete
    gone_on, _ = run(fill_adapter(resumed), tokenizer, rows, RESUMED, tmp_path / "resumed", resume=state)
    assert adapter_hash(resumed) == adapter_hash(whole)
    assert facts(gone_on) == facts(uninterrupted)


def test_validation_rows_weigh_alike(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The validation loss before training is the loss of a step of the same rows; a step of weight 0 learns nothing."""
    recipe = replace(RECIPE, global_batch_size=4, learning_rate=0.0, validate_every_steps=1)
    for rows in (WEIGHTED, [replace(row, weight=0.0) for row in ROWS]):
        trained = train(
            fill_adapter(make_model(base_folder)),
            tokenizer,
            rows,
            recipe=recipe,
            plan=PLAN,
            hooks=Hooks(lambda _: None, lambda *_: None, lambda: False),
            folder=tmp_path,
            validation=rows,
        )
        assert trained.validations[0].loss == pytest.approx(trained.history[0].loss, rel=1e-6)
    assert trained.history[0].loss == 0


def test_rows_say_what_they_weigh(tokenizer: Any, tmp_path: Path) -> None:
    """Numbers from 0 on, as text too, 1 where there is none; the data's hash has them; anything else is a bad row."""
    given = READING | {"tokenizer": tokenizer}
    weights = [{"weight": 2}, {"weight": "0.5"}, {}, {"weight": 0}]
    rows = [row | weight for row, weight in zip(alpaca_rows(4), weights, strict=True)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    examples, _ = load_examples(path, row_weights=True, **given)
    assert [example.weight for example in examples] == [2, 0.5, 1, 0]
    path = str(write_jsonl(tmp_path / "positive.jsonl", rows[:3]))
    plain, unweighted = load_examples(path, **given)
    _, weighted = load_examples(path, row_weights=True, **given)
    assert [example.weight for example in plain] == [1] * 3
    assert weighted.sha256 != unweighted.sha256
    wrong: list[Any] = [-1, "much", True, float("inf")]
    bad = [row | {"weight": weight} for row, weight in zip(alpaca_rows(4), wrong, strict=True)]
    with pytest.raises(DataError) as caught:
        load_examples(str(write_jsonl(tmp_path / "bad.jsonl", bad)), row_weights=True, **given)
    assert [str(problem).partition(": ")[0].rpartition("/")[2] for problem in caught.value.problems] == [
        f"bad.jsonl:{line} weight" for line in range(1, 5)
    ]


@pytest.mark.parametrize("validation", [None, 2, "own"])
def test_rows_that_all_weigh_nothing_are_refused(tokenizer: Any, tmp_path: Path, validation: Any) -> None:
    """To train on, or to validate on, where the loss would be 0 whatever the model; one row that weighs is enough."""
    reading = {name: value for name, value in READING.items() if name not in {"revision", "split"}}

    def load(name: str, *weighing: int) -> Any:
        rows = [row | {"weight": int(number in weighing)} for number, row in enumerate(alpaca_rows(8))]
        return str(write_jsonl(tmp_path / name, rows))

    def read(source: str, held_out: Any) -> Any:
        how: dict[str, Any] = {"revision": None, "split": "train", "row_weights": True, "tokenizer": tokenizer}
        return load_rows(source, held_out, **how, **reading)

    nothing, own = load("nothing.jsonl"), load("own.jsonl", 3)
    source = ValidationSource(own, own, None, "train") if validation == "own" else validation
    with pytest.raises(DataError, match=r"rows to train on, and their field weight is 0"):
        read(nothing, source)
    if validation == "own":
        with pytest.raises(DataError, match=r"nothing.jsonl: has 8 rows to validate on"):
            read(own, replace(source, location=nothing, name=nothing))
    read(load("all.jsonl", *range(8)), source)
