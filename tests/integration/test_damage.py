"""A few of `make damage` and `make hostile`: what these do at length is tried in every run of the tests."""

from __future__ import annotations

from pathlib import Path

from tests.chaos import damage, hostile


def test_damaged_run_folders_give_the_same_result_or_are_refused(tmp_path: Path) -> None:
    """Twenty damages, the same in every run of the tests: no other result, no traceback, and `verify` sees them."""
    world = damage.build(tmp_path)
    outcomes = list(damage.explore(world, range(20), seed=1))
    assert not [outcome for outcome in outcomes if outcome.broken]
    assert {outcome.state for outcome in outcomes} == set(damage.STATES)


def test_hostile_models_and_templates_are_refused(tmp_path: Path) -> None:
    """One of each kind: in words, in time, and without running their code."""
    names = ["config: a list", "weights: pickled only", "tokenizer: broken", "template: imports os by a name"]
    outcomes = list(hostile.explore(tmp_path, hostile.prepare(tmp_path), names, seconds=120))
    assert [outcome.broken for outcome in outcomes] == [None] * 4
